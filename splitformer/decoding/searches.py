"""The searches that `bin/decode` offers, each from one exit's log-probabilities to hypotheses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import k2
import torch
from torch import Tensor

from splitformer.decoding.ctc import ctc_decoding, one_best
from splitformer.decoding.graphs import ctc_topology
from splitformer.decoding.lang import load_graph, read_symbols, words_checksum
from splitformer.greedy import Hypothesis, ctc_greedy_search

METHODS = ("greedy_search", "ctc-decoding", "1best")

Search = Callable[[Tensor, Tensor], tuple[list[Hypothesis], list[int]]]
"""(N, T', V) log-probabilities and (N,) lengths to the hypotheses of N utterances and the indices of those that had an
empty lattice and fell back to greedy search. Where a hypothesis has no words, its tokens are to be spelled."""


def greedy_search(log_probs: Tensor, lengths: Tensor) -> tuple[list[Hypothesis], list[int]]:
    """The best token in each frame: a Search."""
    return ctc_greedy_search(log_probs, lengths), []


def ctc_topology_search(vocab_size: int, device: torch.device) -> Search:
    """`ctc-decoding`: the best path through the k2 CTC topology."""
    topology = ctc_topology(vocab_size).to(device)

    def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[Hypothesis], list[int]]:
        return ctc_decoding(log_probs, lengths, topology)

    return search


class OneBestWeights(NamedTuple):
    """What `1best` is tuned by; see `one_best`."""

    hlg_scale: float = 1.0
    blank_penalty: float = 0.0


def one_best_searches(
    lang_dir: Path, device: torch.device, weights: Iterable[OneBestWeights]
) -> dict[OneBestWeights, Search]:
    """`1best`: the best path through `lang_dir/HLG.pt`, one search for each of `weights`."""
    hlg = load_lang_graph(lang_dir, "HLG.pt", device)
    words = read_symbols(lang_dir / "words.txt")

    def weighted(weight: OneBestWeights) -> Search:
        def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[Hypothesis], list[int]]:
            return one_best(log_probs, lengths, hlg, words, **weight._asdict())

        return search

    return {weight: weighted(weight) for weight in weights}


def load_lang_graph(lang_dir: Path, name: str, device: torch.device | str = "cpu") -> k2.Fsa:
    """`lang_dir/name`, a graph of words such as HLG.pt and G.pt, on `device`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was made with another words.txt or for other tokens than those of `lang_dir`. A graph that does
        not say (those made before graphs did) is taken as it is.
    """
    path, words, tokens = lang_dir / name, lang_dir / "words.txt", lang_dir / "tokens.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: prepare.sh's graphs stage makes it; or leave the methods that need it out of --methods"
        )
    graph = load_graph(path)
    checksum = words_checksum(words)
    if getattr(graph, "words_txt", checksum) != checksum:
        raise ValueError(
            f"{path} was made with another words.txt than {words}, and would give other words; remove it and let "
            "prepare.sh's graphs stage make it again"
        )
    vocab_size = len(read_symbols(tokens))
    if getattr(graph, "vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"{path} was made for {graph.vocab_size} tokens, {tokens} has {vocab_size}; remove the graph and let "
            "prepare.sh's graphs stage make it again"
        )
    return graph.to(device)
