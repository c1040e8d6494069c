"""Searches of more than the best path of a lattice: n-best lists, and rescoring with another n-gram model.

A lattice of HLG holds alignments, each with an acoustic score and HLG's language model score (the lexicon's are 0).
`nbest` and `nbest_rescoring` draw paths from it, keep the different word sequences, and compare them by their best
alignments. `whole_lattice_rescoring` intersects the lattice with the graph G of another model (compile_g), so that no
candidate is lost. Make lattices for them with NBEST_BEAM.

Of words that are spelled alike and leave HLG's language model in the same state (a unigram model has one state),
compile_hlg's removal of epsilons keeps only the likeliest, so that rescoring cannot choose another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import k2
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from splitformer.decoding.hypothesis import SearchResult, UncertainResult
from splitformer.decoding.lattice import Lattice, LatticePath, best_paths, number_arcs

NO_PATH_UNCERTAINTY = 100.0
"""nats, of an utterance without a path: its posterior is practically 0"""
# `most_probable` removes arcs with a smaller posterior from the lattices. Measured once, at commit a41636b: 2 to 4
# times as fast with LG on 16 utterances; sums change by at most 0.00006 nats at the last of six exits and
# 0.35 at the first.
MIN_POSTERIOR = 1e-6


def nbest(
    lattice: Lattice,
    num_paths: int = 100,
    nbest_scale: float = 0.5,
    references: Sequence[Sequence[str]] | None = None,
) -> SearchResult:
    """Return the drawn word sequence with the best alignment, or the oracle.

    The former is that of `Lattice.one_best` whenever that one is drawn, which is useful as a sanity check and baseline.
    The oracle is a lower bound for every choice among the drawn sequences, and no search.

    Args:
      lattice: of HLG.
      num_paths: paths to draw from each lattice; many have the same words.
      nbest_scale: weight of the lattice's scores while drawing; below 1, the sequences differ more.
      references: the words of each utterance of the batch, for the oracle: of the sequences with the fewest errors, it
        is the one with the best alignment.
    Raises:
      ValueError: num_paths or nbest_scale are not above 0, or there are not as many references as utterances.
    """
    if references is not None and len(references) != len(lattice.lengths):
        raise ValueError(f"{len(references)} references for {len(lattice.lengths)} utterances; give one for each")
    if not lattice.utterances:
        return lattice.one_best()
    lattice = _in_nats(lattice)
    candidates = _Nbest.of_paths(lattice, _draw(lattice, num_paths, nbest_scale))
    aligned = candidates.align(lattice)
    scores = _total_scores(aligned)
    if references is not None:
        errors = [
            [Levenshtein.distance(references[utterance], words) for words in sequences]
            for utterance, sequences in zip(lattice.utterances, _words(lattice, candidates.sequences), strict=True)
        ]
        fewest = torch.tensor([count == min(counts) for counts in errors for count in counts], dtype=torch.bool)
        scores = scores.masked_fill(~fewest.to(scores.device), -math.inf)
    return lattice.hypotheses(candidates.best(aligned, scores))


def nbest_rescoring(
    lattice: Lattice, g: k2.Fsa, lm_scale: float, num_paths: int = 100, nbest_scale: float = 0.5
) -> SearchResult:
    """Return the drawn word sequence with the highest acoustic score plus lm_scale times G's score.

    Sequences with words that G lacks are no candidates.

    Args:
      g: of compile_g, from the words.txt of HLG, on the same device.
      lattice, num_paths, nbest_scale: as for nbest.
    """
    if not lattice.utterances:
        return lattice.one_best()
    candidates = _Nbest.of_paths(lattice, _draw(_in_nats(lattice), num_paths, nbest_scale))
    lattice = _acoustic(lattice)
    aligned = candidates.align(lattice)
    acceptors = candidates.acceptors()
    acceptors.labels = torch.where(acceptors.labels == 0, g.backoff, acceptors.labels)
    language = _total_scores(_intersect(g, acceptors, torch.zeros_like(candidates.sequences.shape.row_ids(1))))
    # -inf, where G lacks a word, remains even if it is multiplied by 0
    scores = torch.where(language.isinf(), language, _total_scores(aligned) + lm_scale * language)
    return lattice.hypotheses(candidates.best(aligned, scores))


def whole_lattice_rescoring(lattice: Lattice, g: k2.Fsa, lm_scale: float) -> SearchResult:
    """As nbest_rescoring, but all word sequences of the lattice are candidates."""
    if not lattice.utterances:
        return lattice.one_best()
    acoustic = _let_back_off(k2.invert(_acoustic(lattice).fsas), g.backoff)
    rescored = _intersect(g, acoustic, torch.zeros(len(lattice.utterances), dtype=torch.int32, device=g.device))
    rescored.scores = rescored.scores - rescored.lm_scores + lm_scale * rescored.lm_scores
    return lattice.hypotheses(best_paths(rescored))


def most_probable(lattice: Lattice, num_paths: int = 200, nbest_scale: float = 0.5) -> SearchResult:
    """Return, of the sequences of words or tokens that are drawn, the one with the highest log-sum over its paths.

    The best path is one of those that are drawn. `score` is the log-sum, `timestamps` are those of the sequence's best
    path in the lattice.

    Args:
      lattice: of a transducer. Where a grammar backs off although it has the n-gram, that is a path of its own.
      num_paths, nbest_scale: as for nbest.
    """
    if not lattice.utterances:
        return lattice.one_best()
    likely = k2.connect(k2.prune_on_arc_post(lattice.fsas, MIN_POSTERIOR, use_double_scores=True))
    lattice = replace(lattice, fsas=number_arcs(likely))
    drawn = _draw(lattice, num_paths, nbest_scale)
    # In a lattice of many paths the best one may not be drawn. With it, no answer has a lower sum than that path.
    best = k2.RaggedTensor([[path.arcs] for path in lattice.best_paths() if path], dtype=torch.int32)
    candidates = _Nbest.of_paths(lattice, k2.ragged.cat([drawn, best.to(drawn.device)], axis=1))
    aligned = candidates.align(lattice)
    return lattice.hypotheses(candidates.best(aligned, _total_scores(aligned, log_semiring=True)))


def one_best_with_uncertainty(lattice: Lattice, num_paths: int = 200, nbest_scale: float = 1.0) -> UncertainResult:
    """Return the result of `Lattice.one_best`, and how uncertain it is, given the n-best list of the lattice.

    The n-best posterior (arXiv 2309.09546, section 3) is the share of the best word sequence in the probability of all
    drawn sequences, each with the probability of its best drawn path. Aligning each sequence again, as `nbest` does,
    took ten times as long on broad lattices. Since paths are drawn with their own probabilities, likely words have many
    paths, and the best of them is a good one.

    Args: as for nbest.
    """
    best = lattice.best_paths()
    hypotheses, fallbacks = lattice.hypotheses(best)
    uncertainty = torch.zeros(len(lattice.lengths), dtype=torch.float64)
    if not lattice.utterances:
        return UncertainResult(hypotheses, fallbacks, uncertainty)
    paths = _draw(lattice, num_paths, nbest_scale * lattice.scale)
    sums = lattice.scale * lattice.fsas.scores[paths.values.long()].double().cumsum(0).cpu()
    ends = paths.shape.row_splits(2).long().cpu()
    scores = iter(torch.nn.functional.pad(sums, (1, 0))[ends].diff().tolist())
    drawn = _words(lattice, lattice.fsas.aux_labels.index(paths).remove_axis(2).remove_values_leq(0))
    for utterance, path, sequences in zip(lattice.utterances, best, drawn, strict=True):
        score_of: dict[tuple[str, ...], float] = {}
        for words, score in zip(map(tuple, sequences), scores):
            score_of[words] = max(score, score_of.get(words, -math.inf))
        if path is None:
            uncertainty[utterance] = NO_PATH_UNCERTAINTY
            continue
        # the words of the best path may not be among those that were drawn
        score_of[tuple(hypotheses[utterance].words or ())] = path.score
        of_sequences = torch.tensor(list(score_of.values()), dtype=torch.float64)
        uncertainty[utterance] = of_sequences.logsumexp(dim=0) - path.score
    return UncertainResult(hypotheses, fallbacks, uncertainty)


def _words(lattice: Lattice, sequences: k2.RaggedTensor) -> list[list[list[str]]]:
    """Return the words of [lattice][sequence][word id]."""
    symbols = lattice.words or []
    return [[[symbols[word] for word in ids] for ids in each] for each in sequences.tolist()]


def _in_nats(lattice: Lattice) -> Lattice:
    return lattice.rescored(lattice.scale * lattice.fsas.scores)


def _acoustic(lattice: Lattice) -> Lattice:
    """Return the lattices of HLG with their acoustic scores alone."""
    return lattice.rescored(lattice.scale * lattice.fsas.scores - lattice.scale * lattice.fsas.lm_scores)


def _draw(lattice: Lattice, num_paths: int, scale: float) -> k2.RaggedTensor:
    """Return [lattice][path][arc], drawn with probabilities proportional to exp(scale * score).

    Drawing (k2.random_paths) is like arithmetic coding with evenly spaced numbers: no random numbers are involved, so
    that a lattice always gives the same paths, whatever else is in the batch. An empty lattice gives none.
    """
    if not (num_paths > 0 and scale > 0):
        raise ValueError(f"num_paths {num_paths}, nbest_scale {scale}: both must be above 0")
    scaled = k2.Fsa(lattice.fsas.arcs.clone())
    scaled.scores = scale * lattice.fsas.scores
    return k2.random_paths(scaled, num_paths=num_paths, use_double_scores=True)


@dataclass(frozen=True)
class _Nbest:
    """Different sequences of words, or of tokens if the lattices have no words: ragged, [lattice][sequence][id].

    Scores of sequences are tensors with an entry for each, in this order.
    """

    sequences: k2.RaggedTensor

    @classmethod
    def of_paths(cls, lattice: Lattice, paths: k2.RaggedTensor) -> _Nbest:
        """Return the sequences along paths [lattice][path][arc]."""
        if lattice.words is None:
            ids = k2.ragged.index(lattice.fsas.labels.contiguous(), paths)
        else:
            ids = lattice.fsas.aux_labels.index(paths).remove_axis(2)
        return cls(ids.remove_values_leq(0).unique()[0])

    def acceptors(self) -> k2.Fsa:
        """Return an FsaVec of linear FSAs, one for each sequence, with a loop of label 0 at every state."""
        return k2.add_epsilon_self_loops(k2.linear_fsa(self.sequences.remove_axis(0)))

    def align(self, lattice: Lattice) -> k2.Fsa:
        """Return for each sequence the part of its lattice that has these ids: an FsaVec with the lattice's scores."""
        # inverted, an arc with k > 1 words becomes k arcs, one without words has label 0
        readers = lattice.fsas if lattice.words is None else k2.invert(lattice.fsas)
        return _intersect(k2.arc_sort(readers), self.acceptors(), self.sequences.shape.row_ids(1))

    def best(self, aligned: k2.Fsa, scores: Tensor) -> list[LatticePath | None]:
        """Return for each lattice the best path in `aligned` of the sequence with the highest score, or first.

        LatticePath.score is that of `scores`. None for a lattice without a sequence, or with scores of -inf only.
        """
        listed, splits = scores.tolist(), self.sequences.shape.row_splits(1).tolist()
        chosen = [max(range(*ends), key=listed.__getitem__, default=None) for ends in itertools.pairwise(splits)]
        kept = [i for i in chosen if i is not None and listed[i] > -math.inf]
        path_of: dict[int | None, LatticePath] = {}
        if kept:
            winners = k2.index_fsa(aligned, torch.tensor(kept, dtype=torch.int32, device=aligned.device))
            path_of = {i: path._replace(score=listed[i]) for i, path in zip(kept, best_paths(winners)) if path}
        return [path_of.get(i) for i in chosen]


def _intersect(a: k2.Fsa, b: k2.Fsa, b_to_a: Tensor) -> k2.Fsa:
    """Return for each FSA of `b` its intersection with its FSA of `a`, top-sorted; 0 is a label like others.

    Args:
      a: arc-sorted.
      b_to_a: for each FSA of `b` the index of its FSA in `a`.
    """
    return k2.top_sort(k2.connect(k2.intersect_device(a, b, b_to_a, sorted_match_a=True)))


def _total_scores(fsas: k2.Fsa, log_semiring: bool = False) -> Tensor:
    """Return the score of the best path of each FSA, or the log-sum over its paths; -inf for an FSA without one."""
    return fsas.get_tot_scores(use_double_scores=True, log_semiring=log_semiring)


def _let_back_off(fsas: k2.Fsa, backoff: int) -> k2.Fsa:
    """Return lattices of words with a loop of label `backoff` at each state that a word or the final arc leaves.

    G may then back off just before it needs to. With loops everywhere it could do so at each frame in between: the same
    paths, many times over.
    """
    shape = fsas.arcs.shape()  # [fsa][state][arc]
    arcs, state_of_arc = fsas.arcs.values(), shape.row_ids(2).long()  # states are numbered through all FSAs
    states = state_of_arc[fsas.labels != 0].unique()
    inside = (states - shape.row_splits(1).long()[shape.row_ids(1).long()[states]]).to(torch.int32)
    zeros = torch.zeros_like(inside)
    loops = torch.stack([inside, inside, zeros + backoff, zeros], dim=1)

    state_of_arc, order = torch.cat([state_of_arc, states]).sort(stable=True)
    counts = torch.bincount(state_of_arc, minlength=shape.tot_size(1))
    splits = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    states_of_fsas = k2.ragged.create_ragged_shape2(shape.row_splits(1), None, -1)
    arcs_of_states = k2.ragged.create_ragged_shape2(splits, None, -1)
    looped = k2.Fsa(k2.fsa.RaggedArc(states_of_fsas.compose(arcs_of_states), torch.cat([arcs, loops])[order]))
    looped.arc = torch.cat([fsas.arc, zeros])[order]
    return looped
