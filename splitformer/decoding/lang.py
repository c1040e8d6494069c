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
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import k2
import torch

from splitformer.checkpoint import CheckpointError, load_contents, save_checkpoint
from splitformer.results import atomic_write

EPSILON, UNKNOWN_WORD, UNKNOWN_TOKEN, BACKOFF = "<eps>", "<UNK>", "<unk>", "#0"
RESERVED_WORDS = (EPSILON, BACKOFF, "<s>", "</s>")

Lexicon = list[tuple[str, list[str]]]


class GraphError(ValueError):
    """A graph that cannot be read; the message says what to do."""


def prepare_lang(lang_dir: str | Path, words: Iterable[str], spell: Callable[[str], list[int]]) -> Lexicon:
    """Write the files of the module's docstring into `lang_dir`, whose tokens.txt is read.

    Args:
      words: the vocabulary, in any order; repetitions and <UNK> are ignored.
      spell: gives the token ids of a word, such as Tokenizer.encode.
    Returns:
      the lexicon with disambiguation symbols.
    Raises:
      ValueError: for no words, words that are reserved, and words that the tokenizer cannot spell.
    """
    lang_dir = Path(lang_dir)
    tokens = read_symbols(lang_dir / "tokens.txt")
    vocabulary = sorted(set(words) - {UNKNOWN_WORD})
    _check_words(vocabulary)

    lexicon: Lexicon = [(UNKNOWN_WORD, [UNKNOWN_TOKEN])]
    lexicon += [(word, [tokens[i] for i in spell(word)]) for word in vocabulary]
    unspellable = [word for word, spelling in lexicon[1:] if not spelling or UNKNOWN_TOKEN in spelling]
    if unspellable:
        raise ValueError(
            f"{len(unspellable)} words hold characters that {lang_dir / 'bpe.model'} does not know: "
            f"{', '.join(unspellable[:10])}; leave them out, or train the tokenizer on a text that has them"
        )
    disambiguated, last_symbol = add_disambiguation_symbols(lexicon)

    symbols = [EPSILON, UNKNOWN_WORD, *vocabulary, BACKOFF, "<s>", "</s>"]
    word_ids = {word: i for i, word in enumerate(symbols)}
    token_ids = {token: i for i, token in enumerate(tokens)}
    token_ids |= {f"#{k}": len(tokens) + k for k in range(last_symbol + 1)}

    _write_lines(lang_dir / "words.txt", (f"{word} {i}" for i, word in enumerate(symbols)))
    _write_lines(lang_dir / "lexicon.txt", (f"{word} {' '.join(s)}" for word, s in lexicon))
    _write_lines(lang_dir / "lexicon_disambig.txt", (f"{word} {' '.join(s)}" for word, s in disambiguated))
    save_graph(lexicon_to_fst(lexicon, token_ids, word_ids), lang_dir / "L.pt")
    loop = (token_ids[BACKOFF], word_ids[BACKOFF])
    save_graph(lexicon_to_fst(disambiguated, token_ids, word_ids, loop), lang_dir / "L_disambig.pt")
    return disambiguated


def add_disambiguation_symbols(lexicon: Lexicon) -> tuple[Lexicon, int]:
    """Append #1, #2, ... to the spellings that several words share, or that begin another word's spelling.

    Without them the composition of lexicon and grammar could not be determinised (Mohri, Pereira & Riley,
    "Weighted finite-state transducers in speech recognition", 2002, section 4.2).

    Returns:
      the lexicon in the same order, and the largest number used (0 where none was needed).
    """
    shared = Counter(tuple(spelling) for _, spelling in lexicon)
    prefixes = {tuple(spelling[:length]) for _, spelling in lexicon for length in range(1, len(spelling))}
    used: Counter[tuple[str, ...]] = Counter()
    result: Lexicon = []
    for word, spelling in lexicon:
        key = tuple(spelling)
        if shared[key] > 1 or key in prefixes:
            used[key] += 1
            spelling = [*spelling, f"#{used[key]}"]
        result.append((word, spelling))
    return result, max(used.values(), default=0)


def lexicon_to_fst(
    lexicon: Lexicon, token_ids: dict[str, int], word_ids: dict[str, int], loop: tuple[int, int] | None = None
) -> k2.Fsa:
    """The FST that reads the tokens of any number of words (labels) and writes the words (aux_labels).

    All scores are 0: a word has one spelling. State 0 lies between words; a word is written at its first
    token. `loop`: token and word of one more arc there, the grammar's back-off.
    """
    final = 1 + sum(len(spelling) - 1 for _, spelling in lexicon)
    # (from, to, token, score, word); k2 wants arcs in the order of the states that they leave
    leaving_zero, inside = [], []
    state = 1
    for word, spelling in lexicon:
        ends = [0, *range(state, state + len(spelling) - 1), 0]
        state += len(spelling) - 1
        outputs = [word_ids[word]] + [0] * (len(spelling) - 1)
        path = list(zip(ends, ends[1:], [token_ids[t] for t in spelling], [0] * len(spelling), outputs))
        leaving_zero.append(path[0])
        inside += path[1:]
    if loop is not None:
        leaving_zero.append((0, 0, loop[0], 0, loop[1]))
    leaving_zero.append((0, final, -1, 0, -1))

    arcs = torch.tensor(leaving_zero + inside, dtype=torch.int32)
    fst = k2.Fsa(arcs[:, :4].contiguous(), aux_labels=arcs[:, 4].contiguous())
    return k2.arc_sort(fst)


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


def _check_words(vocabulary: list[str]) -> None:
    if not vocabulary:
        raise ValueError("no words: the text that the lexicon is made of is empty")
    reserved = [w for w in vocabulary if w in RESERVED_WORDS or (w.startswith("#") and w[1:].isdigit())]
    if reserved:
        raise ValueError(f"{', '.join(reserved)}: reserved for graphs and cannot be words; normalise the text")


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)
