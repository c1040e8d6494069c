"""Lattices of one exit's CTC log-probabilities, by k2: `ctc_lattice` with tokens, `hlg_lattice` with words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import k2
import torch
from torch import Tensor

from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.hypothesis import Hypothesis, check_log_probs, check_no_nan
from splitformer.decoding.lattice import Lattice, check_graph, number_arcs
from splitformer.errors import UserError
from splitformer.model.conformer import valid_frames


@dataclass(frozen=True)
class Beam:
    """The beam of intersect_dense_pruned; see k2's documentation.

    search_beam: in each frame, keep states whose score (nats) is within this of the best one.
    output_beam: keep arcs of the lattice whose best path is within this of the best path. Where only one path is read,
      a small value saves memory and changes nothing.
    min_active_states, max_active_states: per frame and utterance; the search beam widens and narrows to stay between.
    """

    search_beam: float
    output_beam: float
    min_active_states: int
    max_active_states: int


# Each state of the standard topology leads to all others. Few are kept, to bound time and memory with an untrained
# model. Measured once, at commit 6143de2 (256 tokens, 800 frames, one core): 1 s; with search_beam 8 and 1000 states,
# 13 s and 4.6 GB where all log-probabilities are equal.
CTC_BEAM = Beam(search_beam=4.0, output_beam=0.5, min_active_states=1, max_active_states=50)
# Measured once, at commit 3b2c95d (100 words, 3-gram, half-trained exits): the words of search_beam 30 and 20000 states
# in a sixth to a third of the time, at hlg_scale 0.2 to 1. Words begin to change at search_beam 8.
HLG_BEAM = Beam(search_beam=15.0, output_beam=1.0, min_active_states=30, max_active_states=3000)
# For n-best lists and rescoring: competitors of the best path remain in the lattice.
NBEST_BEAM = replace(HLG_BEAM, output_beam=8.0)


def ctc_lattice(log_probs: Tensor, lengths: Tensor, graph: k2.Fsa, beam: Beam = CTC_BEAM) -> Lattice:
    """Return the lattices of a batch and a CTC topology, or any graph that reads frames and writes tokens.

    `ctc_topology(vocab_size)` accepts every sequence with score 0, so its best path is the greedy one, whatever the
    beam. A graph that constrains the path may need a wider beam.

    Args:
      log_probs, lengths: as for ctc_greedy_search, on the graph's device; symbol 0 is the blank.
      graph: its labels are symbols of V, one per frame; aux_labels (a tensor) the token or 0.
    Raises:
      ValueError: shapes, lengths, device or the vocabulary of the graph do not fit, or there are NaN.
    """
    if not isinstance(getattr(graph, "aux_labels", None), Tensor):
        raise ValueError("the graph must write at most one token per arc; for HLG use hlg_lattice")
    return replace(_intersect(log_probs, lengths, graph, beam), tokens="aux_labels")


def hlg_lattice(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = HLG_BEAM,
) -> Lattice:
    """Return the lattices of a batch and HLG; the attribute `lm_scores` of their arcs has HLG's scores.

    Args:
      log_probs, lengths: as for ctc_lattice.
      hlg: of compile_hlg, on the device of log_probs. It is not modified.
      words: the symbols of words.txt (read_symbols).
      hlg_scale: weight of the graph's scores, which are the language model's, relative to log_probs.
      blank_penalty: subtracted from the log-probability of the blank in every frame (nats); above 0, fewer deletions.
      beam: in nats.
    Raises:
      ValueError: as ctc_lattice.
    """
    if not isinstance(getattr(hlg, "aux_labels", None), k2.RaggedTensor):
        raise ValueError("the graph has no words, as an HLG has; for a CTC topology use ctc_lattice")
    if not hlg_scale > 0:
        raise UserError(f"hlg_scale {hlg_scale}: the weight of the language model must be above 0")
    # shares the memory of HLG, which must not be modified
    graph = k2.Fsa(hlg.arcs, aux_labels=hlg.aux_labels, properties=hlg.properties)
    for name in ("vocab_size", "tokens"):
        if hasattr(hlg, name):
            setattr(graph, name, getattr(hlg, name))
    graph.lm_scores = hlg.scores
    # Dividing everything else by the scale has the same best path, and does not copy a graph of millions of arcs.
    scaled_beam = replace(beam, search_beam=beam.search_beam / hlg_scale, output_beam=beam.output_beam / hlg_scale)
    scaled_log_probs = log_probs / hlg_scale
    scaled_log_probs[..., 0] -= blank_penalty / hlg_scale
    lattice = _intersect(scaled_log_probs, lengths, graph, scaled_beam)
    tokens = "tokens" if hasattr(hlg, "tokens") else None  # only HLG of the modified topology has them
    return replace(lattice, words=words, tokens=tokens, scale=hlg_scale, greedy=_greedy(log_probs, lengths))


def _intersect(log_probs: Tensor, lengths: Tensor, graph: k2.Fsa, beam: Beam) -> Lattice:
    check_log_probs(log_probs, lengths)
    check_graph(graph, log_probs, log_probs.shape[2])
    check_no_nan(log_probs, valid_frames(lengths.to(log_probs.device), log_probs.shape[1]), "log_probs")
    # k2 requires segments (utterance, first frame, number of frames) on the CPU, the longest first
    cpu_lengths = lengths.cpu()
    order = torch.sort(cpu_lengths, descending=True, stable=True).indices
    order = order[cpu_lengths[order] > 0]
    greedy = _greedy(log_probs, lengths)
    if len(order) == 0:
        return Lattice(None, [], lengths, greedy)
    segments = torch.stack([order, torch.zeros_like(order), cpu_lengths[order]], dim=1).to(torch.int32)
    fsas = k2.intersect_dense_pruned(
        graph,
        k2.DenseFsaVec(log_probs.detach().float(), segments),
        search_beam=beam.search_beam,
        output_beam=beam.output_beam,
        min_active_states=beam.min_active_states,
        max_active_states=beam.max_active_states,
    )
    return Lattice(number_arcs(fsas), order.tolist(), lengths, greedy)


def _greedy(log_probs: Tensor, lengths: Tensor) -> Callable[[Tensor], list[Hypothesis]]:
    """Return greedy search of the utterances with given indices."""
    return lambda utterances: ctc_greedy_search(
        log_probs[utterances.to(log_probs.device)], lengths[utterances.to(lengths.device)]
    )
