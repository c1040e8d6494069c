"""`fast_beam_search` and its n-best forms: a transducer's best path, or its most probable sequence, by k2.

After Kang et al., "Fast and parallel decoding for transducer" (arXiv 2211.00484). All of them read the lattices of
transducer_lattice.py. A sequence of tokens or words is said by all its alignments together; the n-best forms draw
paths from the lattice and add the best one, and among their sequences the one wins whose paths in the lattice have the
highest sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import k2
import torch
from torch import Tensor

from splitformer.decoding.greedy import transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.transducer_lattice import FastBeam, numbered, search_lattices
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner

# Measured on one core with 16 utterances of 60 to 113 frames, 30 tokens and joiners of dimension 512 that were made up,
# not trained. The number of contexts binds, not the beam: 10 and 30 nats find the same as 20. Without a lexicon, 8
# contexts take 2 to 4 times as long as a loop of one joiner call a frame and lose 0.03 to 0.6 nats an utterance
# on 64 contexts; 32 lose nothing and take 6 to 9 times as long.
FAST_BEAM = FastBeam(beam=20.0, max_contexts=8, max_states=64)
# With LG (1000 words, 3-gram, 73,000 arcs) the score of a word comes late, and until then its context must last: on
# noisy frames 8 contexts had a WER of 63 %, 32 of 9 %, 64 of 8 %, in 0.2, 0.4 and 1.0 s; on clearer ones 32 found all.
LG_BEAM = FastBeam(beam=20.0, max_contexts=32, max_states=256)
NUM_PATHS = 200
NBEST_SCALE = 0.5
# Arcs below this leave the lattices of the n-best forms. With LG on 16 spoken utterances that is 2 to 4 times as fast;
# sums change by at most 0.00006 nats at the last of six exits, where lattices are peaked, and by 0.35 at the first,
# where one utterance gets other words. At 1e-4 it would be 0.007 and 1.5 nats.
MIN_POSTERIOR = 1e-6


@torch.no_grad()
def fast_beam_search(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    beam: FastBeam = FAST_BEAM,
    blank_penalty: float = 0.0,
    words: Sequence[str] | None = None,
    ngram_lm_scale: float = 1.0,
) -> tuple[list[Hypothesis], list[int]]:
    """The best path of the lattice.

    Args:
      encoder_out: (N, T', D) of one exit, and `joiner` that exit's; on the graph's device.
      lengths: (N,), output frames of each utterance, in any order; what lies behind them is ignored.
      graph: over tokens, without blanks or epsilons: trivial_graph, context_graph_fsa, compile_lg (with LG_BEAM).
        It is left as it is.
      blank_penalty: subtracted from the blank's log-probability in every frame (nats); above 0, fewer deletions.
      words: the symbols of words.txt (read_symbols), for a graph that writes words.
      ngram_lm_scale: weight of the graph's scores against the joiner's log-probabilities.
    Returns:
      N hypotheses in the order of the batch, `words` filled in where `words` is given; the indices of those whose
      lattice was empty, because no path that survived the beam ends where the graph may end: they get the greedy
      result, without words.
    Raises:
      ValueError: where shapes, lengths, device or the graph's vocabulary do not fit, and for NaN.
    """
    result: list[Hypothesis | None] = [None] * len(encoder_out)
    lattices, utterances = search_lattices(
        decoder, joiner, encoder_out, lengths, graph, beam, blank_penalty, ngram_lm_scale, words
    )
    if utterances:
        for utterance, found in zip(utterances, _read_paths(lattices, _best_paths(lattices), words)):
            result[utterance] = found
    return _fill_in(result, decoder, joiner, encoder_out, lengths, blank_penalty, words)


@torch.no_grad()
def fast_beam_search_nbest(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    beam: FastBeam = FAST_BEAM,
    blank_penalty: float = 0.0,
    num_paths: int = NUM_PATHS,
    nbest_scale: float = NBEST_SCALE,
) -> tuple[list[Hypothesis], list[int]]:
    """The sequence of tokens with the highest log-sum over its paths in the lattice, among those drawn.

    Args:
      decoder to blank_penalty: as for fast_beam_search; the graph is trivial_graph or context_graph_fsa.
      num_paths: drawn from each lattice, always the same ones, beside the best path; many share their tokens.
      nbest_scale: of the lattice's scores while drawing; below 1, more different sequences are drawn.
    Returns:
      as fast_beam_search; `score` is the log-sum, `timestamps` are of the sequence's best path.
    Raises:
      ValueError: as fast_beam_search.
    """
    return _nbest(decoder, joiner, encoder_out, lengths, graph, beam, blank_penalty, num_paths, nbest_scale, 1.0, None)


@torch.no_grad()
def fast_beam_search_nbest_LG(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    words: Sequence[str],
    beam: FastBeam = LG_BEAM,
    blank_penalty: float = 0.0,
    num_paths: int = NUM_PATHS,
    nbest_scale: float = NBEST_SCALE,
    ngram_lm_scale: float = 1.0,
) -> tuple[list[Hypothesis], list[int]]:
    """The sequence of words with the highest log-sum over its paths in the lattice of LG, among those drawn.

    Args:
      graph: of compile_lg; it is left as it is.
      words: the symbols of words.txt (read_symbols).
      ngram_lm_scale: weight of the graph's scores against the joiner's log-probabilities.
        Where the grammar backs off although it has the n-gram, that is a path of its own, and counts in the sum.
      the others: as for fast_beam_search_nbest.
    Returns, Raises:
      as fast_beam_search_nbest; `words` are filled in, except where the lattice was empty.
    """
    return _nbest(
        decoder, joiner, encoder_out, lengths, graph, beam, blank_penalty, num_paths, nbest_scale, ngram_lm_scale, words
    )


def _nbest(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    beam: FastBeam,
    blank_penalty: float,
    num_paths: int,
    nbest_scale: float,
    graph_scale: float,
    words: Sequence[str] | None,
) -> tuple[list[Hypothesis], list[int]]:
    if num_paths < 1 or not nbest_scale > 0:
        raise ValueError(f"num_paths {num_paths} and nbest_scale {nbest_scale}: at least 1, and above 0")
    result: list[Hypothesis | None] = [None] * len(encoder_out)
    lattices, utterances = search_lattices(
        decoder, joiner, encoder_out, lengths, graph, beam, blank_penalty, graph_scale, words
    )
    if utterances:
        lattices = _likely(lattices)
        # sequences are compared by the labels: tokens, or words after turning the lattice round
        readers = lattices if words is None else k2.invert(lattices)
        sequences = _drawn_sequences(lattices, num_paths, nbest_scale, by_words=words is not None)
        winners, totals, owners = _most_probable(readers, sequences)
        for owner, total, found in zip(owners, totals, _read_paths(lattices, _best_paths(winners), words)):
            result[utterances[owner]] = replace(found, score=total)
    return _fill_in(result, decoder, joiner, encoder_out, lengths, blank_penalty, words)


def _likely(lattices: k2.Fsa) -> k2.Fsa:
    """Without the arcs of a posterior below MIN_POSTERIOR: two thirds of them, and of the time of what follows."""
    likely = k2.connect(k2.prune_on_arc_post(lattices, MIN_POSTERIOR, use_double_scores=True))
    return numbered(likely)


def _drawn_sequences(lattices: k2.Fsa, num_paths: int, nbest_scale: float, by_words: bool) -> k2.RaggedTensor:
    """The different sequences of tokens (or words) of drawn paths and the best: [lattice][sequence][token]."""
    flatter = k2.Fsa(lattices.arcs.clone(), properties=lattices.properties)
    flatter.scores = flatter.scores * nbest_scale
    drawn = k2.random_paths(flatter, use_double_scores=True, num_paths=num_paths)
    # in a lattice of many paths the best one may not be drawn; with it, no answer has a lower sum than that path's
    best = k2.RaggedTensor([[path] for path in _best_paths(lattices)], dtype=torch.int32)
    paths = k2.ragged.cat([drawn, best.to(drawn.device)], axis=1)
    if by_words:
        written = lattices.aux_labels.index(paths).remove_axis(2)
    else:
        written = k2.ragged.index(lattices.labels.contiguous(), paths)
    unique, _, _ = written.remove_values_leq(0).unique(need_num_repeats=False, need_new2old_indexes=False)
    return unique


def _most_probable(lattices: k2.Fsa, sequences: k2.RaggedTensor) -> tuple[k2.Fsa, list[float], list[int]]:
    """Of each lattice the paths of its most probable sequence, their log-sum, and which lattice it is of."""
    owner = sequences.shape.row_ids(1)
    spelled = k2.add_epsilon_self_loops(k2.linear_fsa(sequences.remove_axis(0)))
    paths = k2.intersect_device(k2.arc_sort(lattices), spelled, b_to_a_map=owner, sorted_match_a=True)
    paths = k2.connect(paths)
    totals = paths.get_tot_scores(use_double_scores=True, log_semiring=True).tolist()
    best: dict[int, int] = {}
    for sequence, lattice in enumerate(owner.tolist()):
        if lattice not in best or totals[sequence] > totals[best[lattice]]:
            best[lattice] = sequence
    chosen = torch.tensor(list(best.values()), dtype=torch.int32, device=lattices.device)
    return k2.index_fsa(paths, chosen), [totals[i] for i in best.values()], list(best)


def _best_paths(fsas: k2.Fsa) -> list[list[int]]:
    """The `arc_id`s along the best path of each FSA; arcs that came in later and have none are left out."""
    paths = k2.shortest_path(fsas, use_double_scores=True)
    shape = paths.arcs.shape()
    ends = shape.row_splits(2)[shape.row_splits(1).long()].tolist()
    arcs = paths.arc_id.tolist()
    return [[arc for arc in arcs[first:end] if arc >= 0] for first, end in itertools.pairwise(ends)]


def _read_paths(lattices: k2.Fsa, paths: list[list[int]], words: Sequence[str] | None) -> list[Hypothesis]:
    """What paths (`arc_id`s: an arc a frame, then the final one) through search_lattices say."""
    arcs = torch.tensor([arc for path in paths for arc in path], dtype=torch.int32, device=lattices.device)
    tokens, scores = lattices.labels[arcs.long()].tolist(), lattices.scores[arcs.long()].double().cpu()
    written = [] if words is None else lattices.aux_labels.index(arcs, axis=0)[0].tolist()
    result = []
    start = 0
    for path in paths:
        end = start + len(path)
        frames = [frame for frame, token in enumerate(tokens[start:end]) if token > 0]
        spoken = None if words is None else [words[i] for arc in written[start:end] for i in arc if i > 0]
        score = scores[start:end].sum().item()
        result.append(Hypothesis([tokens[start + frame] for frame in frames], frames, score, spoken))
        start = end
    return result


def _fill_in(
    result: list[Hypothesis | None],
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    blank_penalty: float,
    words: Sequence[str] | None,
) -> tuple[list[Hypothesis], list[int]]:
    """Put the greedy result where there is none, and name these utterances; one without frames has said nothing."""
    frames = lengths.tolist()
    missing = [i for i, found in enumerate(result) if found is None and frames[i] > 0]
    greedy: list[Hypothesis] = []
    if missing:
        index = torch.tensor(missing)
        greedy = transducer_greedy_search(
            decoder, joiner, encoder_out[index.to(encoder_out.device)], lengths[index.to(lengths.device)], blank_penalty
        )
    instead = dict(zip(missing, greedy))
    silence = Hypothesis([], [], 0.0, None if words is None else [])
    return [found or instead.get(i, silence) for i, found in enumerate(result)], missing
