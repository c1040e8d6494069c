"""Searches over one exit's CTC log-probabilities with k2: `ctc_decoding` (tokens), `one_best` (words by HLG).

Both run `intersect_dense_pruned`, then take the shortest path. A lattice comes out empty where no path
through the graph survives the beam to the last frame, or none of that length exists; k2 says nothing then. Such an
utterance gets its greedy result, and its index is returned beside the results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import k2
import torch
from torch import Tensor

from splitformer.greedy import Hypothesis, check_log_probs, ctc_greedy_search


@dataclass(frozen=True)
class Beam:
    """How much intersect_dense_pruned keeps; see k2's documentation of it.

    search_beam: in each frame, states whose score (nats) is within this of the best one's.
    output_beam: arcs of the lattice whose best path is within this of the best path. One path is all that is
      taken from the lattice, so this may be small; it changes memory, not the result.
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
      lengths: (N,), output frames of each utterance, in any order.
      graph: labels are symbols of V, one a frame; aux_labels (a tensor) the token or 0.
    Returns:
      N hypotheses in the order of the batch; the indices of those whose lattice was empty.
    Raises:
      ValueError: where shapes, lengths, device or the graph's vocabulary do not fit, and for NaN.
    """
    if not isinstance(getattr(graph, "aux_labels", None), Tensor):
        raise ValueError("the graph of ctc_decoding writes one token or none an arc; for HLG use one_best")
    result: list[Hypothesis | None] = [None] * len(log_probs)
    for utterance, written, score in _best_paths(log_probs, lengths, graph, beam):
        frames = [frame for frame, token in enumerate(written) if token > 0]
        result[utterance] = Hypothesis([written[frame] for frame in frames], frames, score)
    return _fill_in(result, log_probs, lengths)


def one_best(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    greedy_words: Callable[[list[int]], list[str]],
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = HLG_BEAM,
) -> tuple[list[list[str]], list[int]]:
    """The words of the best path through HLG (`1best`).

    Args:
      log_probs, lengths: as for ctc_decoding.
      hlg: of compile_hlg, aux_labels are words (ragged), on the device of log_probs. It is left as it is.
      words: the symbols of words.txt (read_symbols).
      greedy_words: makes words of token ids, for utterances whose lattice is empty, such as
        `lambda ids: tokenizer.decode(ids).split()`.
      hlg_scale: weight of the graph's scores, which are the language model's, against log_probs.
      blank_penalty: subtracted from the blank's log-probability in every frame (nats); above 0, fewer
        deletions.
    Returns:
      the words of N utterances in the order of the batch; the indices of those whose lattice was empty.
    Raises:
      ValueError: as ctc_decoding.
    """
    if not isinstance(getattr(hlg, "aux_labels", None), k2.RaggedTensor):
        raise ValueError("one_best wants an HLG, whose arcs write words; for a CTC topology use ctc_decoding")
    if not hlg_scale > 0:
        raise ValueError(f"hlg_scale {hlg_scale}: the weight of the graph's scores is above 0")
    # Dividing all else by the scale has the same best path, and leaves a graph of millions of arcs alone.
    scaled_beam = replace(beam, search_beam=beam.search_beam / hlg_scale, output_beam=beam.output_beam / hlg_scale)
    scaled_log_probs = log_probs / hlg_scale
    scaled_log_probs[..., 0] -= blank_penalty / hlg_scale
    result: list[list[str] | None] = [None] * len(log_probs)
    for utterance, written, _ in _best_paths(scaled_log_probs, lengths, hlg, scaled_beam):
        result[utterance] = [words[word] for frame in written for word in frame if word > 0]
    return _fill_in(result, log_probs, lengths, lambda hypothesis: greedy_words(hypothesis.tokens))


def _best_paths(log_probs: Tensor, lengths: Tensor, graph: k2.Fsa, beam: Beam) -> list[tuple[int, list, float]]:
    """(utterance, what each arc of its best path writes, score of the path).

    A path has an arc a frame, then the final one, which writes -1. Utterances without frames and those whose
    lattice is empty are left out.
    """
    check_log_probs(log_probs, lengths)
    if graph.device != log_probs.device:
        raise ValueError(f"the graph is on {graph.device}, log_probs on {log_probs.device}; move the graph once")
    # k2 checks neither: it reads beyond the scores, or loses the utterance
    if int(graph.labels.max()) >= log_probs.shape[2]:
        raise ValueError(
            f"the graph reads symbol {int(graph.labels.max())}, log_probs end at {log_probs.shape[2] - 1}: "
            "was it made for another vocabulary?"
        )
    if torch.isnan(log_probs).any():
        raise ValueError("log_probs hold NaN: has the training diverged?")

    # k2 wants segments (utterance, first frame, number of frames) on the CPU, the longest first
    lengths = lengths.cpu()
    order = torch.sort(lengths, descending=True, stable=True).indices
    order = order[lengths[order] > 0]
    if len(order) == 0:
        return []
    segments = torch.stack([order, torch.zeros_like(order), lengths[order]], dim=1).to(torch.int32)
    lattices = k2.intersect_dense_pruned(
        graph,
        k2.DenseFsaVec(log_probs.detach().float(), segments),
        search_beam=beam.search_beam,
        output_beam=beam.output_beam,
        min_active_states=beam.min_active_states,
        max_active_states=beam.max_active_states,
    )
    paths = k2.shortest_path(lattices, use_double_scores=True)
    # an empty lattice may still have states, but its best path has no arcs
    shape = paths.arcs.shape()
    ends = shape.row_splits(2)[shape.row_splits(1).long()].tolist()
    written, scores = paths.aux_labels.tolist(), paths.scores.double().cpu()
    return [
        (utterance, written[first:end], scores[first:end].sum().item())
        for utterance, first, end in zip(order.tolist(), ends, ends[1:])
        if end > first
    ]


def _fill_in(
    result: list,
    log_probs: Tensor,
    lengths: Tensor,
    convert: Callable[[Hypothesis], object] = lambda hypothesis: hypothesis,
) -> tuple[list, list[int]]:
    """Put the greedy result where there is none, and name the utterances whose lattice was empty."""
    missing = [i for i, found in enumerate(result) if found is None]
    if missing:
        index = torch.tensor(missing)
        greedy = ctc_greedy_search(log_probs[index.to(log_probs.device)], lengths[index.to(lengths.device)])
        for utterance, hypothesis in zip(missing, greedy):
            result[utterance] = convert(hypothesis)
    # an utterance without output frames has no lattice to lose
    return result, [i for i in missing if lengths[i] > 0]
