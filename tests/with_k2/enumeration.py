"""A small language whose alignments and word sequences can all be enumerated, and scores to compare searches with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import BOS, EOS, NgramModel
from splitformer.decoding import nbest
from splitformer.decoding.ctc import NBEST_BEAM, Beam, hlg_lattice
from splitformer.decoding.hypothesis import Hypothesis, SearchResult, UncertainResult

WIDE = Beam(search_beam=100.0, output_beam=5.0, min_active_states=1000, max_active_states=100000)

# Five symbols, so that all alignments of seven frames can be enumerated; A and A2 sound alike, A begins AB.
TOKENS = ["<blk>", "<sos/eos>", "<unk>", "a", "b"]
SPELLINGS = {"A": [3], "A2": [3], "AA": [3, 3], "AB": [3, 4], "B": [4], "BA": [4, 3]}
TEXT = "A B\nA AB BA\nB A2 A2\nAA B\nA B AB\nBA A2 B\nB B\nAB\nA AA\nB A2\n"


def make_small_lang(lang_dir: Path) -> Path:
    """Write the files of a lang_dir for SPELLINGS, and `text`; return the lang_dir."""
    (lang_dir / "tokens.txt").write_text("".join(f"{token} {i}\n" for i, token in enumerate(TOKENS)))
    (lang_dir / "text").write_text(TEXT)
    prepare_lang(lang_dir, SPELLINGS, SPELLINGS.__getitem__)
    return lang_dir


def random_log_probs(frames: int, vocab_size: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(1, frames, vocab_size, generator=generator)).log_softmax(dim=2)


def readings(alignment: tuple[int, ...], modified: bool) -> set[tuple[int, ...]]:
    """Return the token sequences of an alignment: one, or, in the modified topology, one per way to cut its runs."""
    runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(alignment)]
    choices = [[(s,) * k for k in range(1, n + 1 if modified else 2)] for s, n in runs if s != 0]
    return {tuple(itertools.chain(*choice)) for choice in itertools.product(*choices)}


def acoustic_scores(log_probs: torch.Tensor, modified: bool = False) -> dict[tuple[int, ...], float]:
    """Return {tokens: log-probability of their best alignment}, without `<sos/eos>` and `<unk>`."""
    frames = log_probs.double().tolist()
    scores: dict[tuple[int, ...], float] = {}
    for alignment in itertools.product((0, 3, 4), repeat=len(frames)):
        score = sum(frame[symbol] for frame, symbol in zip(frames, alignment))
        for tokens in readings(alignment, modified):
            scores[tokens] = max(score, scores.get(tokens, -math.inf))
    return scores


def alignment_score(log_probs: torch.Tensor, hypothesis: Hypothesis, modified: bool = False) -> float:
    """Return the log-probability of the best alignment in which the tokens start at their timestamps."""
    frames = log_probs.double().tolist()
    tokens, starts = hypothesis.tokens, hypothesis.timestamps
    total = sum(frame[0] for frame in frames[: starts[0] if starts else None])
    for i, (token, start) in enumerate(zip(tokens, starts)):
        end = starts[i + 1] if i + 1 < len(starts) else len(frames)
        # a blank is due before an equal token; not in the modified topology
        longest = end - 1 if tokens[i + 1 : i + 2] == [token] and not modified else end
        total += max(
            sum(frame[token] for frame in frames[start:change]) + sum(frame[0] for frame in frames[change:end])
            for change in range(start + 1, longest + 1)
        )
    return total


def word_sequences(tokens: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every word sequence with this spelling."""
    if not tokens:
        yield ()
    for word, spelling in SPELLINGS.items():
        if tokens[: len(spelling)] == tuple(spelling):
            for rest in word_sequences(tokens[len(spelling) :]):
                yield (word, *rest)


def graph_score(model: NgramModel, words: tuple[str, ...]) -> float:
    """Return the score (nats) of the best path of `words` through the model's graph.

    A path may back off although the n-gram exists. In an interpolated model no n-gram is worse than that, but from
    order 3 on the shorter history may be better for the next word.
    """
    reached = {(BOS,)[: model.order - 1]: 0.0}
    for word in (*words, EOS):
        after: dict[tuple[str, ...], float] = {}
        for history, total in reached.items():
            for start in range(len(history) + 1):
                ngram = (*history[start:], word)
                if ngram in model.log10_probs:
                    state = ngram[1:] if len(ngram) == model.order else ngram
                    after[state] = max(after.get(state, -math.inf), total + model.log10_probs[ngram])
                total += model.log10_backoffs.get(history[start:], 0.0)
        reached = after
    return max(reached.values()) * math.log(10)


PHRASES = [[1, 2], [2, 1, 3], [3, 3]]
"""hot words"""


def phrase_score(tokens: tuple[int, ...], boost: float) -> float:
    """Return boost x tokens of the phrase, summed over the occurrences of PHRASES."""
    return boost * sum(
        len(phrase)
        for phrase in PHRASES
        for start in range(len(tokens))
        if list(tokens[start : start + len(phrase)]) == phrase
    )


def collapsed(alignment: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(alignment) if symbol)


def enumerated(log_probs: torch.Tensor, blank_penalty: float = 0.0) -> dict[tuple[int, ...], list]:
    """Return {tokens: [summed log-probability, that of the best alignment, best alignment]} for log_probs (T', V)."""
    log_probs = log_probs.double().clone()
    log_probs[:, 0] -= blank_penalty
    rows = log_probs.tolist()
    found: dict[tuple[int, ...], list] = {}
    for alignment in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        score = sum(row[symbol] for row, symbol in zip(rows, alignment))
        entry = found.setdefault(collapsed(alignment), [0.0, -math.inf, None])
        entry[0] += math.exp(score)
        if score > entry[1]:
            entry[1:] = [score, alignment]
    for entry in found.values():
        entry[0] = math.log(entry[0])
    return found


def one_best(log_probs, lengths, hlg, words, **weights) -> SearchResult:
    return hlg_lattice(log_probs, lengths, hlg, words, **weights).one_best()


def one_best_with_uncertainty(
    log_probs, lengths, hlg, words, num_paths=200, nbest_scale=1.0, beam=NBEST_BEAM, **weights
) -> UncertainResult:
    lattice = hlg_lattice(log_probs, lengths, hlg, words, beam=beam, **weights)
    return nbest.one_best_with_uncertainty(lattice, num_paths, nbest_scale)
