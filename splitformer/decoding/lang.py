"""What a `lang_dir` holds beside the tokenizer: words, the lexicon, and the lexicon as k2 FSAs.

    words.txt             `word id`: <eps> 0, <UNK>, the words sorted, then #0, <s>, </s>
    lexicon.txt           `word token token ...`, one spelling a word; <UNK> is spelled <unk>
    lexicon_disambig.txt  the same with #1, #2, ... where two words are spelled alike, or one begins another
    L.pt                  lexicon.txt as an FST from tokens to words, any number of words
    L_disambig.pt         lexicon_disambig.txt likewise, with a loop for #0, the back-off symbol of G

The files are those of icefall's lang_bpe folders, but for one thing: the disambiguation symbols are not
written into tokens.txt, which belongs to the tokenizer. Token #k has the id `vocab_size + k`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import k2
import torch

from splitformer.checkpoint import CheckpointError, load_contents, save_checkpoint
from splitformer.errors import UserError

EPSILON, UNKNOWN_WORD, UNKNOWN_TOKEN, BACKOFF = "<eps>", "<UNK>", "<unk>", "#0"
RESERVED_WORDS = (EPSILON, BACKOFF, "<s>", "</s>")


class GraphError(UserError):
    """A graph that cannot be read; the message says what to do."""


def read_symbols(path: str | Path) -> list[str]:
    """The symbols of a table `symbol id` (tokens.txt, words.txt) in the order of their ids 0, 1, 2, ...

    Raises ValueError where the ids leave a gap or repeat.
    """
    symbols: dict[int, str] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != 2 or not fields[1].isdigit() or int(fields[1]) in symbols:
                raise ValueError(f"{path}, line {number}: {line.rstrip()!r} is not a symbol with an id of its own")
            symbols[int(fields[1])] = fields[0]
    if not symbols or max(symbols) != len(symbols) - 1:
        raise ValueError(f"{path}: {len(symbols)} symbols; their ids are to be 0, 1, 2, ... without a gap")
    return [symbols[i] for i in range(len(symbols))]


def words_checksum(path: str | Path) -> str:
    """Tells one words.txt from others: graphs keep that of the file whose word ids they hold."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def save_graph(graph: k2.Fsa, path: str | Path) -> None:
    """Write an FSA with its attributes: as icefall's `graph.as_dict()`, but of plain values and tensors alone.

    Raises:
      OSError: the file cannot be written; what was there before stays.
    """
    attributes = graph.as_dict()
    arcs = {name: value for name, value in attributes.items() if isinstance(value, torch.Tensor)}
    ragged = {
        name: {"values": value.values, "row_splits": value.shape.row_splits(1)}
        for name, value in attributes.items()
        if isinstance(value, k2.RaggedTensor)
    }
    plain = {name: value for name, value in attributes.items() if name not in arcs and name not in ragged}
    save_checkpoint(path, {"tensors": arcs, "ragged": ragged, "attributes": plain})


def load_graph(path: str | Path, device: torch.device | str = "cpu") -> k2.Fsa:
    """Read what `save_graph` wrote; nothing in the file is executed.

    Raises:
      GraphError: the file is missing, damaged, or made by something else.
    """
    try:
        stored = load_contents(path, device)
    except CheckpointError as error:
        raise GraphError(f"{path} is no graph that can be read: remove it, and ./prepare.sh makes it again") from error
    if not {"tensors", "ragged", "attributes"} <= stored.keys():
        raise GraphError(f"{path} holds something else than a graph: remove it, and ./prepare.sh makes it again")
    ragged = {
        name: k2.RaggedTensor(k2.ragged.create_ragged_shape2(value["row_splits"]), value["values"])
        for name, value in stored["ragged"].items()
    }
    return k2.Fsa.from_dict({**stored["tensors"], **ragged, **stored["attributes"]})
