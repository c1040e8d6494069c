"""Searches over one exit's CTC log-probabilities with k2: `ctc_decoding` (tokens), `one_best` (words by HLG).

Both make a `Lattice` (`intersect_dense_pruned`) and take its best path; `nbest` does more with it. A lattice comes
out empty where no path through the graph survives the beam to the last frame, or none of that length exists; k2 says
nothing then. Such an utterance gets its greedy hypothesis, and its index is returned beside the hypotheses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import k2
import torch
from torch import Tensor

from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.hypothesis import Hypothesis, check_log_probs
from splitformer.decoding.prefixes import check_no_nan
from splitformer.model.conformer import valid_frames


@dataclass(frozen=True)
class Beam:
    """How much intersect_dense_pruned keeps; see k2's documentation of it.

    search_beam: in each frame, states whose score (nats) is within this of the best one's.
    output_beam: arcs of the lattice whose best path is within this of the best path. Where one path is all that is
      taken from the lattice, this may be small; it changes memory, not the result.
    min_active_states, max_active_states: per frame and utterance; the search beam widens and narrows to stay
      between them.
    """

    search_beam: float
    output_beam: float
    min_active_states: int
    max_active_states: int

    def __post_init__(self) -> None:
        if not (self.search_beam > 0 and self.output_beam > 0):
            raise ValueError(f"{self}: beams are above 0")
        if not 0 <= self.min_active_states < self.max_active_states:
            raise ValueError(f"{self}: min_active_states is at least 0 and below max_active_states")


# Each state of the standard topology leads to all others: few of them are kept, so that a model before training,
# which finds all tokens alike, costs seconds and not gigabytes (256 tokens, 800 frames, one core: 1 s; with
# search_beam 8 and 1000 states 2.3 s, and 13 s and 4.6 GB where all log-probabilities are equal).
CTC_BEAM = Beam(search_beam=4.0, output_beam=0.5, min_active_states=1, max_active_states=50)
# The words of search_beam 30 and 20000 states in a sixth to a third of the time, at hlg_scale 0.2 to 1: 100 words,
# 3-gram, half-trained exits (WER 33 to 48 %), 98 utterances, 6000 frames in 0.4 to 2.5 s on one core. From
# search_beam 8 downwards the words begin to change.
HLG_BEAM = Beam(search_beam=15.0, output_beam=1.0, min_active_states=30, max_active_states=3000)


def ctc_decoding(
    log_probs: Tensor, lengths: Tensor, graph: k2.Fsa, beam: Beam = CTC_BEAM
) -> tuple[list[Hypothesis], list[int]]:
    """The best path through a CTC topology, or through any graph that reads frames and writes tokens.

    With `ctc_topology(vocab_size)`, which accepts every sequence and scores none, this path is the greedy
    one, whatever the beam; another graph constrains it and may want a wider beam.

    Args:
      log_probs: (N, T', V), log-probabilities, on the graph's device; symbol 0 is the blank.
      lengths: (N,), output frames of each utterance, in any order; what lies behind them is ignored.
      graph: labels are symbols of V, one a frame; aux_labels (a tensor) the token or 0.
    Returns:
      N hypotheses in the order of the batch, without words; the indices of those whose lattice was empty.
    Raises:
      ValueError: where shapes, lengths, device or the graph's vocabulary do not fit, and for NaN.
    """
    if not isinstance(getattr(graph, "aux_labels", None), Tensor):
        raise ValueError("the graph of ctc_decoding writes one token or none an arc; for HLG use one_best")
    lattice = make_lattice(log_probs, lengths, graph, beam)
    return lattice.hypotheses(lattice.best_paths())


def one_best(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = HLG_BEAM,
) -> tuple[list[Hypothesis], list[int]]:
    """The best path through HLG (`1best`).

    Args:
      log_probs, lengths: as for ctc_decoding.
      hlg: of compile_hlg, aux_labels are words (ragged), on the device of log_probs. It is left as it is.
      words: the symbols of words.txt (read_symbols).
      hlg_scale: weight of the graph's scores, which are the language model's, against log_probs.
      blank_penalty: subtracted from the blank's log-probability in every frame (nats); above 0, fewer
        deletions.
    Returns:
      N hypotheses in the order of the batch; the indices of those whose lattice was empty. `score` is that of
      log_probs, less the penalties, plus hlg_scale times that of the graph. `words` is None where the lattice was
      empty or there is no frame: the tokens, greedy search's, are then to be spelled.
    Raises:
      ValueError: as ctc_decoding.
    """
    lattice = make_hlg_lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    return lattice.hypotheses(lattice.best_paths(), words)


class LatticePath(NamedTuple):
    """A path through a lattice: its arcs (numbers in Lattice.fsas), one a frame and the final one; its score (nats)."""

    arcs: list[int]
    score: float


@dataclass(frozen=True)
class Lattice:
    """What a graph and a beam leave of a batch's alignments.

    fsas: an FsaVec, one for each of `utterances`, with an arc for each frame of a path and a final one. Its labels
      and aux_labels are the graph's; `arc` numbers its arcs from 1, so that results of k2's operations on it, in
      which 0 stands for no arc, tell what they come from. None where no utterance has a frame.
    utterances: indices in the batch.
    scale: what the scores are to be multiplied with, to be nats.
    log_probs, lengths: the batch, for utterances without a path.
    """

    fsas: k2.Fsa | None
    utterances: list[int]
    scale: float
    log_probs: Tensor
    lengths: Tensor

    def best_paths(self) -> list[LatticePath | None]:
        """The best path of each of `utterances`; None where the lattice is empty."""
        if self.fsas is None:
            return []
        paths = best_paths(self.fsas)
        return [path and path._replace(score=path.score * self.scale) for path in paths]

    def hypotheses(
        self, paths: Sequence[LatticePath | None], words: Sequence[str] | None = None
    ) -> tuple[list[Hypothesis], list[int]]:
        """The whole batch's hypotheses from one path, or none, for each of `utterances`.

        Where there is none, greedy search stands in; the indices of these utterances come second.

        Args:
          words: the symbols that aux_labels number; None where these are tokens.
        """
        result: list[Hypothesis | None] = [None] * len(self.log_probs)
        for utterance, path, tokens, word_ids in self._read(paths):
            frames = [frame for frame, token in enumerate(tokens) if token > 0]
            spoken = None if words is None else [words[word] for word in word_ids if word > 0]
            result[utterance] = Hypothesis([tokens[frame] for frame in frames], frames, path.score, spoken)

        missing = [i for i, hypothesis in enumerate(result) if hypothesis is None]
        if missing:
            index = torch.tensor(missing)
            log_probs, lengths = self.log_probs, self.lengths
            greedy = ctc_greedy_search(log_probs[index.to(log_probs.device)], lengths[index.to(lengths.device)])
            for utterance, hypothesis in zip(missing, greedy):
                result[utterance] = hypothesis
        # an utterance without output frames has no lattice to lose
        return result, [i for i in missing if self.lengths[i] > 0]

    def _read(self, paths: Sequence[LatticePath | None]) -> Iterator[tuple[int, LatticePath, list[int], list[int]]]:
        """(utterance, path, for each arc the token that starts there or <= 0, word ids) of every path there is."""
        found = [(utterance, path) for utterance, path in zip(self.utterances, paths, strict=True) if path]
        if not found:
            return
        # the arcs of all paths at once: on a GPU, a transfer each would cost more than the search
        arcs = torch.tensor([arc for _, path in found for arc in path.arcs], dtype=torch.int32, device=self.fsas.device)
        labels = self.fsas.labels[arcs.long()].tolist()
        starting, word_ids = None, [[]] * len(labels)
        if isinstance(self.fsas.aux_labels, Tensor):
            starting = self.fsas.aux_labels[arcs.long()].tolist()
        else:
            word_ids = self.fsas.aux_labels.index(arcs, axis=0)[0].tolist()
            if hasattr(self.fsas, "tokens"):  # of the modified topology
                starting = self.fsas.tokens[arcs.long()].tolist()
        end = 0
        for utterance, path in found:
            start, end = end, end + len(path.arcs)
            if starting is not None:
                tokens = starting[start:end]
            else:  # in the standard topology an equal label in the next frame is the same token
                tokens = [
                    label if label != before else 0
                    for before, label in zip([0, *labels[start : end - 1]], labels[start:end])
                ]
            yield utterance, path, tokens, list(itertools.chain(*word_ids[start:end]))


def best_paths(fsas: k2.Fsa) -> list[LatticePath | None]:
    """The best path of each FSA of an FsaVec that has the attribute `arc` of a Lattice, top-sorted; None without one.

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


def make_lattice(log_probs: Tensor, lengths: Tensor, graph: k2.Fsa, beam: Beam, scale: float = 1.0) -> Lattice:
    """Intersect a batch's log-probabilities with a graph. `scale` is kept in the result.

    Raises:
      ValueError: where shapes, lengths, device or the graph's vocabulary do not fit, and for NaN.
    """
    check_log_probs(log_probs, lengths)
    if graph.device != log_probs.device:
        raise ValueError(f"the graph is on {graph.device}, log_probs on {log_probs.device}; move the graph once")
    # k2 checks neither: it reads beyond the scores, or loses the utterance
    vocab_size = getattr(graph, "vocab_size", int(graph.labels.max()) + 1)
    if vocab_size > log_probs.shape[2] or (hasattr(graph, "vocab_size") and vocab_size != log_probs.shape[2]):
        raise ValueError(
            f"the graph was made for another vocabulary: it has {vocab_size} tokens, log_probs have "
            f"{log_probs.shape[2]}; make it again from the lang_dir of the training"
        )
    check_no_nan(log_probs, valid_frames(lengths.to(log_probs.device), log_probs.shape[1]), "log_probs")

    # k2 wants segments (utterance, first frame, number of frames) on the CPU, the longest first
    cpu_lengths = lengths.cpu()
    order = torch.sort(cpu_lengths, descending=True, stable=True).indices
    order = order[cpu_lengths[order] > 0]
    if len(order) == 0:
        return Lattice(None, [], scale, log_probs, lengths)
    segments = torch.stack([order, torch.zeros_like(order), cpu_lengths[order]], dim=1).to(torch.int32)
    fsas = k2.intersect_dense_pruned(
        graph,
        k2.DenseFsaVec(log_probs.detach().float(), segments),
        search_beam=beam.search_beam,
        output_beam=beam.output_beam,
        min_active_states=beam.min_active_states,
        max_active_states=beam.max_active_states,
    )
    fsas.arc = torch.arange(1, fsas.num_arcs + 1, dtype=torch.int32, device=fsas.device)
    return Lattice(fsas, order.tolist(), scale, log_probs, lengths)


def make_hlg_lattice(
    log_probs: Tensor, lengths: Tensor, hlg: k2.Fsa, hlg_scale: float, blank_penalty: float, beam: Beam
) -> Lattice:
    """The lattice of a batch and HLG, with the weights of one_best; the beams are in nats.

    Raises ValueError as make_lattice, for a graph that is no HLG, and for a hlg_scale that is not above 0.
    """
    if not isinstance(getattr(hlg, "aux_labels", None), k2.RaggedTensor):
        raise ValueError("the graph has no words: this search wants an HLG; for a CTC topology use ctc_decoding")
    if not hlg_scale > 0:
        raise ValueError(f"hlg_scale {hlg_scale}: the weight of the graph's scores is above 0")
    # Dividing all else by the scale has the same best path, and leaves a graph of millions of arcs alone.
    scaled_beam = replace(beam, search_beam=beam.search_beam / hlg_scale, output_beam=beam.output_beam / hlg_scale)
    scaled_log_probs = log_probs / hlg_scale
    scaled_log_probs[..., 0] -= blank_penalty / hlg_scale
    lattice = make_lattice(scaled_log_probs, lengths, hlg, scaled_beam, hlg_scale)
    return replace(lattice, log_probs=log_probs)  # greedy search takes them as they are
