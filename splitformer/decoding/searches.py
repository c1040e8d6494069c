"""The searches that `bin/decode` offers, each from one exit's log-probabilities to words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.decoding.ctc import ctc_decoding, one_best
from splitformer.decoding.graphs import ctc_topology
from splitformer.decoding.lang import load_graph, read_symbols
from splitformer.greedy import ctc_greedy_search

METHODS = ("greedy_search", "ctc-decoding", "1best")

Search = Callable[[Tensor, Tensor], tuple[list[list[str]], list[int]]]
"""(N, T', V) log-probabilities and (N,) lengths to the words of N utterances and the indices of those that had an
empty lattice and fell back to greedy search."""

Spell = Callable[[list[int]], list[str]]
"""Token ids to words."""


def greedy_search(spell: Spell) -> Search:
    """The best token in each frame."""

    def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
        return [spell(hypothesis.tokens) for hypothesis in ctc_greedy_search(log_probs, lengths)], []

    return search


def ctc_topology_search(spell: Spell, vocab_size: int, device: torch.device) -> Search:
    """`ctc-decoding`: the best path through the k2 CTC topology."""
    topology = ctc_topology(vocab_size).to(device)

    def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
        hypotheses, fallen_back = ctc_decoding(log_probs, lengths, topology)
        return [spell(hypothesis.tokens) for hypothesis in hypotheses], fallen_back

    return search


class OneBestWeights(NamedTuple):
    """What `1best` is tuned by; see `one_best`."""

    hlg_scale: float = 1.0
    blank_penalty: float = 0.0


def one_best_searches(
    lang_dir: Path, spell: Spell, device: torch.device, weights: Iterable[OneBestWeights]
) -> dict[OneBestWeights, Search]:
    """`1best`: the best path through `lang_dir/HLG.pt`, one search for each of `weights`."""
    path = lang_dir / "HLG.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: prepare.sh's graphs stage makes it; or leave 1best out of --methods")
    hlg = load_graph(path).to(device)
    words = read_symbols(lang_dir / "words.txt")

    def weighted(weight: OneBestWeights) -> Search:
        def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
            return one_best(log_probs, lengths, hlg, words, spell, **weight._asdict())

        return search

    return {weight: weighted(weight) for weight in weights}
