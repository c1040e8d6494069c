"""Make the words, the lexicon and the lexicon FSTs of a `lang_dir`; `splitformer.decoding.lang` describes the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import k2
import torch

from splitformer.decoding.graphs import save_graph
from splitformer.decoding.lang import BACKOFF, EPSILON, RESERVED_WORDS, UNKNOWN_TOKEN, UNKNOWN_WORD, read_symbols
from splitformer.errors import UserError
from splitformer.files import atomic_write

Lexicon = list[tuple[str, list[str]]]


def prepare_lang(lang_dir: str | Path, words: Iterable[str], spell: Callable[[str], list[int]]) -> Lexicon:
    """Write words.txt, lexicon.txt, lexicon_disambig.txt, L.pt and L_disambig.pt into `lang_dir`, beside tokens.txt.

    Args:
      words: the vocabulary, in any order; repetitions and <UNK> are ignored.
      spell: returns the token ids of a word, such as Tokenizer.encode.
    Returns:
      the lexicon with disambiguation symbols.
    Raises:
      UserError: there are no words, some are reserved, or the tokenizer cannot spell some.
    """
    lang_dir = Path(lang_dir)
    tokens = read_symbols(lang_dir / "tokens.txt")
    vocabulary = sorted(set(words) - {UNKNOWN_WORD})
    _check_words(vocabulary)

    lexicon: Lexicon = [(UNKNOWN_WORD, [UNKNOWN_TOKEN])]
    lexicon += [(word, [tokens[i] for i in spell(word)]) for word in vocabulary]
    unspellable = [word for word, spelling in lexicon[1:] if not spelling or UNKNOWN_TOKEN in spelling]
    if unspellable:
        raise UserError(
            f"{len(unspellable)} words have characters that {lang_dir / 'bpe.model'} does not know: "
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
    """Append #1, #2, ... to spellings that several words share, or that begin another word's spelling.

    Without them the composition of lexicon and grammar could not be determinised (Mohri, Pereira & Riley, "Weighted
    finite-state transducers in speech recognition", 2002, section 4.2).

    Returns:
      the lexicon in the same order, and the largest number used (0 if none was needed).
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
    """Return the FST from the tokens of any number of words (labels) to the words (aux_labels).

    All scores are 0, as every word has one spelling. State 0 is between words; a word is written at its first token.
    `loop` is the token and the word of one more arc there, the grammar's back-off.
    """
    final = 1 + sum(len(spelling) - 1 for _, spelling in lexicon)
    # (from, to, token, score, word); k2 wants arcs sorted by the state that they leave
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
    return k2.arc_sort(k2.Fsa(arcs[:, :4].contiguous(), aux_labels=arcs[:, 4].contiguous()))


def _check_words(vocabulary: list[str]) -> None:
    if not vocabulary:
        raise UserError("no words: the text that the lexicon is made of is empty")
    reserved = [w for w in vocabulary if w in RESERVED_WORDS or (w.startswith("#") and w[1:].isdigit())]
    if reserved:
        raise UserError(f"{', '.join(reserved)}: reserved for graphs and cannot be words; normalise the text")


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(f"{line}\n" for line in lines)
