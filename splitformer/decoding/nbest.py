"""Searches that look at more of a lattice than its best path: n-best, rescoring by another n-gram model, the oracle.

A lattice of HLG holds alignments, each with an acoustic score and HLG's language model score (the lexicon's are 0).
`nbest` and `nbest_rescoring` draw paths from it, keep the different word sequences among them, and compare these by
their best alignments; `whole_lattice_rescoring` intersects the lattice itself with the other model's graph G
(compile_g), so that no candidate is lost. `nbest_oracle` needs the references: it tells what any rescoring of the
drawn sequences could reach at best.

Of words that are spelled alike and leave HLG's language model in the same state (a unigram model has one state), the
removal of epsilons in compile_hlg keeps the likeliest only, so that rescoring cannot choose another.

Drawing (k2.random_paths) is like arithmetic coding with evenly spaced numbers: no random numbers are involved, so
that the same lattice gives the same paths, whatever else is in the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import k2
import torch
from torch import Tensor

from splitformer.decoding.ctc import Beam, Lattice, LatticePath, best_paths, make_hlg_lattice
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.scoring import word_errors

# HLG_BEAM, but for an output beam that leaves competitors of the best path in the lattice.
LATTICE_BEAM = Beam(search_beam=15.0, output_beam=8.0, min_active_states=30, max_active_states=3000)

NO_PATH_UNCERTAINTY = 100.0
"""nats, of an utterance without a path: as good as no chance"""

SearchResult = tuple[list[Hypothesis], list[int]]
"""N hypotheses in the order of the batch; the indices of those that no path was left for and that are greedy
search's (without words)."""


def nbest(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    num_paths: int = 100,
    nbest_scale: float = 0.5,
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = LATTICE_BEAM,
) -> SearchResult:
    """Of the word sequences drawn from the lattice the one with the best alignment.

    That is the one of `one_best` wherever it is drawn: a check of the drawing, and a base for rescoring.

    Args:
      log_probs, lengths, hlg, words, hlg_scale, blank_penalty: as for one_best.
      num_paths: paths to draw from each lattice, many of them with the same words.
      nbest_scale: weight of the lattice's scores while drawing; below 1, the sequences differ more.
    Returns:
      Found; `score` as one_best's.
    Raises:
      ValueError: as one_best, and for num_paths or nbest_scale that are not above 0.
    """
    lattice = _lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    if lattice.fsas is None:
        return lattice.hypotheses([], words)
    candidates = Nbest.draw(lattice.fsas, num_paths, nbest_scale)
    aligned = candidates.align(lattice.fsas)
    return lattice.hypotheses(candidates.best(aligned, _total_scores(aligned)), words)


def one_best_with_uncertainty(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    num_paths: int = 200,
    nbest_scale: float = 1.0,
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = LATTICE_BEAM,
) -> tuple[list[Hypothesis], list[int], Tensor]:
    """one_best, and how doubtful its words are beside the others of the lattice's n-best list.

    The n-best posterior (arXiv 2309.09546, section 3): the share of the best word sequence in the probability of all
    that were drawn, each by the best of its drawn paths. (To align each anew, as `nbest` does, took ten times as long
    where lattices are broad. Drawn with their own probabilities, paths of likely words are many, and the best of them
    is a good one.)

    Args:
      as nbest.
    Returns:
      one_best's two, and (N,) minus the log of the posterior: 0 where nothing competes, `NO_PATH_UNCERTAINTY` where the
      lattice was empty.
    """
    lattice = make_hlg_lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    best = lattice.best_paths()
    hypotheses, fallbacks = lattice.hypotheses(best, words)
    doubts = torch.zeros(len(log_probs), dtype=torch.float64)
    if lattice.fsas is not None:
        paths = _draw(lattice.fsas, num_paths, nbest_scale * lattice.scale)  # [lattice][path][arc]
        scores = lattice.scale * lattice.fsas.scores[paths.values.long()].double().cumsum(0).cpu()
        ends = paths.shape.row_splits(2).long().cpu()
        totals = torch.nn.functional.pad(scores, (1, 0))[ends].diff().tolist()
        sequences = lattice.fsas.aux_labels.index(paths).remove_axis(2).remove_values_leq(0).tolist()
        for utterance, path, drawn in zip(lattice.utterances, best, sequences, strict=True):
            of_words: dict[tuple[str, ...], float] = {}
            for sequence, total in zip(drawn, totals):
                said = tuple(words[word] for word in sequence)
                of_words[said] = max(total, of_words.get(said, -math.inf))
            totals = totals[len(drawn) :]
            if path is None:
                doubts[utterance] = NO_PATH_UNCERTAINTY
                continue
            of_words[tuple(hypotheses[utterance].words)] = path.score  # the best path need not be among those drawn
            every = torch.tensor(list(of_words.values()), dtype=torch.float64)
            doubts[utterance] = every.logsumexp(dim=0) - path.score
    return hypotheses, fallbacks, doubts


def nbest_rescoring(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    g: k2.Fsa,
    lm_scales: Iterable[float],
    num_paths: int = 100,
    nbest_scale: float = 0.5,
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = LATTICE_BEAM,
) -> dict[float, SearchResult]:
    """The drawn word sequences with G's score in the place of HLG's; see nbest.

    Args:
      g: of compile_g, from the same words.txt as hlg, on the same device.
      lm_scales: weights of G's score against the acoustic one; hlg_scale makes the lattice only.
    Returns:
      for each of lm_scales what it finds. `score` is the acoustic one plus lm_scale times G's. Sequences with words
      that G lacks are no candidates.
    Raises:
      ValueError: as nbest, and where hlg and g were made from different words.txt.
    """
    _check_same_words(hlg, g)
    lattice = _lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    if lattice.fsas is None:
        return {lm_scale: lattice.hypotheses([], words) for lm_scale in lm_scales}
    candidates = Nbest.draw(lattice.fsas, num_paths, nbest_scale)
    _take_out_language_model(lattice.fsas, hlg_scale)
    aligned = candidates.align(lattice.fsas)
    acoustic, language = _total_scores(aligned), candidates.language_scores(g)
    found = {}
    for lm_scale in lm_scales:
        # -inf stays, also where it is multiplied with 0
        scores = torch.where(language.isinf(), language, acoustic + lm_scale * language)
        found[lm_scale] = lattice.hypotheses(candidates.best(aligned, scores), words)
    return found


def whole_lattice_rescoring(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    g: k2.Fsa,
    lm_scales: Iterable[float],
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = LATTICE_BEAM,
) -> dict[float, SearchResult]:
    """The best path of the lattice when G's scores stand in the place of HLG's.

    Args, returns, raises: as nbest_rescoring; every word sequence of the lattice is a candidate.
    """
    _check_same_words(hlg, g)
    lattice = _lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    if lattice.fsas is None:
        return {lm_scale: lattice.hypotheses([], words) for lm_scale in lm_scales}
    _take_out_language_model(lattice.fsas, hlg_scale)
    acoustic = _let_back_off(_words_first(lattice.fsas), g.backoff)
    rescored = _intersect(g, acoustic, torch.zeros(len(lattice.utterances), dtype=torch.int32, device=g.device))
    acoustic_scores, language_scores = rescored.scores - rescored.lm_scores, rescored.lm_scores
    found = {}
    for lm_scale in lm_scales:
        rescored.scores = acoustic_scores + lm_scale * language_scores
        found[lm_scale] = lattice.hypotheses(best_paths(rescored), words)
    return found


def nbest_oracle(
    log_probs: Tensor,
    lengths: Tensor,
    hlg: k2.Fsa,
    words: Sequence[str],
    references: Sequence[Sequence[str]],
    num_paths: int = 100,
    nbest_scale: float = 0.5,
    hlg_scale: float = 1.0,
    blank_penalty: float = 0.0,
    beam: Beam = LATTICE_BEAM,
) -> SearchResult:
    """Of the drawn word sequences the one with the fewest errors; of equals the one with the best alignment.

    Not a search, because it is told the answer: a lower bound for every choice among the same sequences.

    Args:
      references: the words of each utterance, in the order of the batch.
    Returns, raises: as nbest.
    """
    if len(references) != len(log_probs):
        raise ValueError(f"{len(references)} references for {len(log_probs)} utterances; give one for each")
    lattice = _lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    if lattice.fsas is None:
        return lattice.hypotheses([], words)
    candidates = Nbest.draw(lattice.fsas, num_paths, nbest_scale)
    aligned = candidates.align(lattice.fsas)
    scores = _total_scores(aligned)
    errors = [
        [word_errors(references[utterance], [words[i] for i in sequence]) for sequence in sequences]
        for utterance, sequences in zip(lattice.utterances, candidates.words.tolist(), strict=True)
    ]
    fewest = torch.tensor([count == min(counts) for counts in errors for count in counts], dtype=torch.bool)
    scores = scores.masked_fill(~fewest.to(scores.device), -math.inf)
    return lattice.hypotheses(candidates.best(aligned, scores), words)


@dataclass(frozen=True)
class Nbest:
    """Different word sequences of each lattice of an FsaVec: `words` is ragged, [lattice][sequence][word id].

    What is said of a sequence is kept in tensors with one entry for each, in the order of `words`.
    """

    words: k2.RaggedTensor

    @classmethod
    def draw(cls, fsas: k2.Fsa, num_paths: int, nbest_scale: float) -> Nbest:
        """The sequences of paths that are drawn (`_draw`). Empty lattices have none."""
        paths = _draw(fsas, num_paths, nbest_scale)
        word_ids = fsas.aux_labels.index(paths)  # [lattice][path][arc][word]
        return cls(word_ids.remove_axis(2).remove_values_leq(0).unique()[0])

    def align(self, fsas: k2.Fsa) -> k2.Fsa:
        """For each sequence the part of its lattice that has these words: an FsaVec with the scores of `fsas`."""
        acceptors = k2.add_epsilon_self_loops(k2.linear_fsa(self.words.remove_axis(0)))
        lattice_of_sequence = self.words.shape.row_ids(1)
        return _intersect(k2.arc_sort(_words_first(fsas)), acceptors, lattice_of_sequence)

    def language_scores(self, g: k2.Fsa) -> Tensor:
        """log P of each sequence by G (its best path there, should there be several), -inf where G lacks a word."""
        acceptors = k2.add_epsilon_self_loops(k2.linear_fsa(self.words.remove_axis(0)))
        acceptors.labels = torch.where(acceptors.labels == 0, g.backoff, acceptors.labels)
        return _total_scores(_intersect(g, acceptors, torch.zeros_like(self.words.shape.row_ids(1))))

    def best(self, aligned: k2.Fsa, scores: Tensor) -> list[LatticePath | None]:
        """For each lattice the sequence of the largest score (the first of equals), by its best path in `aligned`.

        LatticePath.score is what `scores` says. None for lattices without a sequence, and where all scores are -inf.
        """
        listed, splits = scores.tolist(), self.words.shape.row_splits(1).tolist()
        chosen = [
            max(range(start, end), key=listed.__getitem__, default=None) for start, end in itertools.pairwise(splits)
        ]
        chosen = [None if i is None or listed[i] == -math.inf else i for i in chosen]
        kept = [i for i in chosen if i is not None]
        if not kept:
            return [None] * len(chosen)
        paths = best_paths(k2.index_fsa(aligned, torch.tensor(kept, dtype=torch.int32, device=aligned.device)))
        path_of = dict(zip(kept, paths, strict=True))
        return [None if i is None else path_of[i]._replace(score=listed[i]) for i in chosen]


def _draw(fsas: k2.Fsa, num_paths: int, scale: float) -> k2.RaggedTensor:
    """[lattice][path][arc], drawn with probabilities that go with exp(scale * score); none of an empty lattice."""
    if not (num_paths > 0 and scale > 0):
        raise ValueError(f"num_paths {num_paths}, nbest_scale {scale}: both are above 0")
    scaled = k2.Fsa(fsas.arcs.clone())
    scaled.scores = scale * fsas.scores
    return k2.random_paths(scaled, num_paths=num_paths, use_double_scores=True)


def _lattice(
    log_probs: Tensor, lengths: Tensor, hlg: k2.Fsa, hlg_scale: float, blank_penalty: float, beam: Beam
) -> Lattice:
    """make_hlg_lattice with scores in nats (acoustic + hlg_scale * graph) and the graph's as `lm_scores`."""
    if isinstance(getattr(hlg, "aux_labels", None), k2.RaggedTensor):
        # shares the memory of HLG, which is not ours to add to
        shared = k2.Fsa(hlg.arcs, aux_labels=hlg.aux_labels, properties=hlg.properties)
        for name in ("vocab_size", "tokens"):
            if hasattr(hlg, name):
                setattr(shared, name, getattr(hlg, name))
        shared.lm_scores = hlg.scores
        hlg = shared
    lattice = make_hlg_lattice(log_probs, lengths, hlg, hlg_scale, blank_penalty, beam)
    if lattice.fsas is not None:
        lattice.fsas.scores = hlg_scale * lattice.fsas.scores
    return replace(lattice, scale=1.0)


def _take_out_language_model(fsas: k2.Fsa, hlg_scale: float) -> None:
    fsas.scores = fsas.scores - hlg_scale * fsas.lm_scores
    del fsas.lm_scores


def _words_first(fsas: k2.Fsa) -> k2.Fsa:
    """The lattices with words as labels: an arc that writes k > 1 words becomes k arcs, one that writes none has 0."""
    return k2.invert(fsas)


def _intersect(a: k2.Fsa, b: k2.Fsa, b_to_a: Tensor) -> k2.Fsa:
    """For each FSA of `b` what it and its `a` (b_to_a) share; `a` is arc-sorted, 0 a label like others."""
    return k2.top_sort(k2.connect(k2.intersect_device(a, b, b_to_a, sorted_match_a=True)))


def _total_scores(fsas: k2.Fsa) -> Tensor:
    """The score of the best path of each FSA, -inf without one."""
    return fsas.get_tot_scores(use_double_scores=True, log_semiring=False)


def _let_back_off(fsas: k2.Fsa, backoff: int) -> k2.Fsa:
    """Add a loop with label `backoff` to the states that a word or the final arc leaves.

    G may then back off just before it needs to. With loops everywhere it would do so at every frame in between:
    the same paths, many times over.
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


def _check_same_words(hlg: k2.Fsa, g: k2.Fsa) -> None:
    if not hasattr(g, "backoff"):
        raise ValueError("the graph to rescore with is no G of compile_g; prepare.sh's graphs stage makes G.pt")
    if getattr(hlg, "words_txt", g.words_txt) != g.words_txt:
        raise ValueError(
            f"HLG and G were made with different words.txt (checksums {hlg.words_txt} and {g.words_txt}); make both "
            "again from one lang_dir"
        )
