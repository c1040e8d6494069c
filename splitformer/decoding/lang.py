"""The files of a `lang_dir`, which prepare.sh makes.

    bpe.model, tokens.txt tokenizer and `token id`
    words.txt             `word id`: <eps> 0, <UNK>, the words sorted, then #0, <s>, </s>
    lexicon.txt           `word token token ...`, one spelling per word; <UNK> is spelled <unk>
    lexicon_disambig.txt  the same with #1, #2, ... where two words are spelled alike, or one begins another
    L.pt                  lexicon.txt as an FST from tokens to words, any number of words
    L_disambig.pt         lexicon_disambig.txt likewise, with a loop for #0, the back-off symbol of G
    HLG.pt, LG.pt, G.pt   decoding graphs (see graphs.py)

The files are those of icefall's lang_bpe folders with one exception: the disambiguation symbols are not in tokens.txt,
which belongs to the tokenizer. Token #k has the id `vocab_size + k`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from splitformer.errors import UserError

EPSILON, UNKNOWN_WORD, UNKNOWN_TOKEN, BACKOFF = "<eps>", "<UNK>", "<unk>", "#0"
RESERVED_WORDS = (EPSILON, BACKOFF, "<s>", "</s>")
STAGES = {
    "bpe.model": "bpe",
    "tokens.txt": "bpe",
    "words.txt": "lang",
    "L.pt": "lang",
    "L_disambig.pt": "lang",
    "HLG.pt": "graphs",
    "LG.pt": "graphs",
    "G.pt": "graphs",
}
"""{file: the stage of prepare.sh that makes it}"""


def lang_file(lang_dir: str | Path, name: str) -> Path:
    """Return the path of a file of `lang_dir`.

    Raises:
      UserError: it does not exist; the message names the stage of prepare.sh that makes it.
    """
    path = Path(lang_dir) / name
    if not path.is_file():
        raise UserError(f"{path} does not exist: run ./prepare.sh, whose {STAGES[name]} stage makes it")
    return path


def read_symbols(path: str | Path) -> list[str]:
    """Return the symbols of a table `symbol id` (tokens.txt, words.txt) in the order of their ids 0, 1, 2, ...

    Raises:
      UserError: a line is no such pair, or an id is missing or repeated.
    """
    symbols: dict[int, str] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != 2 or not fields[1].isdigit() or int(fields[1]) in symbols:
                raise UserError(f"{path}, line {number}: {line.rstrip()!r} is no `symbol id` with an id of its own")
            symbols[int(fields[1])] = fields[0]
    if not symbols or max(symbols) != len(symbols) - 1:
        raise UserError(f"{path} has {len(symbols)} symbols, whose ids must be 0, 1, 2, ... without a gap")
    return [symbols[i] for i in range(len(symbols))]


def words_checksum(path: str | Path) -> str:
    """Return a hash of words.txt. Graphs carry that of the file whose word ids they hold."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
