"""Lattices: the paths of each utterance of a batch that a search kept, and hypotheses read from them.

A path has an arc for each frame, then a final one. Arcs are numbered from 1 in the attribute `arc`. k2's operations
carry attributes along and give 0 to arcs that they add, so a path through any result can be traced to the lattice.

A lattice is empty if no path survives the beam to the last frame, or the graph has none of that length; k2 does not
report it. Such an utterance gets the hypothesis of greedy search.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import k2
import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis, SearchResult


class LatticePath(NamedTuple):
    """A path through a lattice: the indices of its arcs and its score (nats)."""

    arcs: list[int]
    score: float


@dataclass(frozen=True)
class Lattice:
    """The lattices of a batch.

    fsas: an FsaVec with one FSA for each of `utterances`, arcs numbered; None without utterances.
    utterances: indices in the batch.
    lengths: (N,), output frames of each utterance of the batch.
    greedy: returns the greedy hypotheses of the utterances with these indices.
    words: symbols of the word ids in aux_labels; None if the lattices have no words.
    tokens: name of the attribute with the token that starts on each arc, or a number <= 0. None: labels are symbols of
      the standard CTC topology, in which a token starts where the label changes.
    scale: factor from the scores of `fsas` to nats.
    """

    fsas: k2.Fsa
    utterances: list[int]
    lengths: Tensor
    greedy: Callable[[Tensor], list[Hypothesis]]
    words: Sequence[str] | None = None
    tokens: str | None = None
    scale: float = 1.0

    def one_best(self) -> SearchResult:
        """Return the hypotheses of the best paths. Their score is that of the path."""
        return self.hypotheses(self.best_paths())

    def best_paths(self) -> list[LatticePath | None]:
        """Return the best path of each of `utterances`; None for an empty lattice."""
        if not self.utterances:
            return []
        return [path and path._replace(score=path.score * self.scale) for path in best_paths(self.fsas)]

    def hypotheses(self, paths: Sequence[LatticePath | None]) -> SearchResult:
        """Return the hypotheses of the batch from one path, or None, for each of `utterances`.

        Utterances without a path get the greedy hypothesis, without words. They are the fallbacks, except for those
        without frames.
        """
        found = self._read([(i, path) for i, path in zip(self.utterances, paths, strict=True) if path])
        lengths = self.lengths.tolist()
        missing = [i for i in range(len(lengths)) if i not in found]
        if missing:
            found |= zip(missing, self.greedy(torch.tensor(missing)))
        return SearchResult([found[i] for i in range(len(lengths))], [i for i in missing if lengths[i] > 0])

    def _read(self, paths: Sequence[tuple[int, LatticePath]]) -> dict[int, Hypothesis]:
        """Return {utterance: hypothesis} for (utterance, path)."""
        if not paths:
            return {}
        # the arcs of all paths at once: on a GPU, a transfer for each would cost more than the search
        arcs = torch.tensor([arc for _, path in paths for arc in path.arcs], dtype=torch.int32, device=self.fsas.device)
        symbols = getattr(self.fsas, self.tokens or "labels")[arcs.long()].tolist()
        word_ids = [] if self.words is None else self.fsas.aux_labels.index(arcs, axis=0)[0].tolist()
        found = {}
        end = 0
        for utterance, path in paths:
            start, end = end, end + len(path.arcs)
            tokens = symbols[start:end]
            if self.tokens is None:
                tokens = [token if token != before else 0 for before, token in zip([0, *tokens], tokens)]
            timestamps = [frame for frame, token in enumerate(tokens) if token > 0]
            words = None
            if self.words is not None:
                words = [self.words[i] for arc in word_ids[start:end] for i in arc if i > 0]
            found[utterance] = Hypothesis([tokens[frame] for frame in timestamps], timestamps, path.score, words)
        return found

    def rescored(self, scores: Tensor) -> Lattice:
        """Return the same lattices with other scores (arcs,), in nats."""
        fsas = k2.index_fsa(self.fsas, torch.arange(len(self.utterances), dtype=torch.int32, device=self.fsas.device))
        fsas.scores = scores
        return replace(self, fsas=fsas, scale=1.0)


def check_graph(graph: k2.Fsa, scores: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `graph` is on the device of `scores` and was made for this vocabulary."""
    if graph.device != scores.device:
        raise ValueError(f"the graph is on {graph.device}, the model's output on {scores.device}; move the graph once")
    # k2 does not check: it reads beyond the scores, mixes up contexts, or loses the utterance
    made_for = getattr(graph, "vocab_size", None)
    largest = int(graph.labels[graph.labels != getattr(graph, "end_symbol", -1)].max())
    if made_for not in (None, vocab_size) or largest >= vocab_size:
        raise ValueError(
            f"the graph was made for {made_for or largest + 1} tokens, the model has {vocab_size}: make the graph "
            "again from the lang_dir of the training"
        )


def number_arcs(fsas: k2.Fsa) -> k2.Fsa:
    """Number the arcs of an FsaVec from 1 in its attribute `arc`, and return it."""
    fsas.arc = torch.arange(1, fsas.num_arcs + 1, dtype=torch.int32, device=fsas.device)
    return fsas


def best_paths(fsas: k2.Fsa) -> list[LatticePath | None]:
    """Return the best path of each FSA of an FsaVec that has the attribute `arc`; None for an FSA without a path.

    `score` is the sum of the FSA's scores.
    """
    paths = k2.shortest_path(fsas, use_double_scores=True)
    # an empty lattice may still have states, but its best path has no arcs
    shape = paths.arcs.shape()
    ends = shape.row_splits(2)[shape.row_splits(1).long()].tolist()
    arcs, scores = paths.arc.tolist(), paths.scores.double().cpu()
    return [
        LatticePath([arcs[i] - 1 for i in range(first, end) if arcs[i] > 0], scores[first:end].sum().item())
        if end > first
        else None
        for first, end in itertools.pairwise(ends)
    ]
