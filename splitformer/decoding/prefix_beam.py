"""`prefix_beam_search`: CTC without a graph, summed over alignments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splitformer.decoding.alignment import ctc_alignment
from splitformer.decoding.context import ContextGraph
from splitformer.decoding.hypothesis import Hypothesis, check_log_probs, check_no_nan
from splitformer.decoding.prefixes import Prefixes, certain_blank
from splitformer.model.conformer import valid_frames


@torch.no_grad()
def prefix_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    beam_size: int = 8,
    blank_penalty: float = 0.0,
    context: ContextGraph | None = None,
) -> list[Hypothesis]:
    """Return the most probable token sequences; greedy search returns those of the most probable alignments.

    This is the prefix search of Graves et al., ICML 2006, section 3.2, with a beam and frame by frame (Hannun et al.,
    "First-pass large vocabulary continuous speech recognition using bi-directional recurrent DNNs", 2014). The B
    prefixes of all utterances are tensors; the only loop is over frames.

    Args:
      log_probs: (N, T', V), log-probabilities; symbol 0 is the blank.
      lengths: (N,), output frames of each utterance, in any order; frames behind them are ignored.
      beam_size: B, prefixes kept for each utterance.
      blank_penalty: subtracted from the log-probability of the blank in every frame (nats); above 0, fewer deletions.
      context: phrases to favour, built for V tokens.
    Returns:
      N hypotheses in the order of the batch. `score` is the log of the summed probability of the alignments that
      survived the beam, less blank_penalty for each blank, plus the score of the context graph. `timestamps` are those
      of the best alignment of the tokens (ctc_alignment), which blank_penalty does not change.
    Raises:
      ValueError: arguments do not fit together, there are NaN, or beam_size is below 1.
    """
    prefixes, scores = _search(log_probs, lengths, beam_size, blank_penalty, context)
    if len(scores) == 0:
        return []
    score, slot = scores.max(dim=1)
    tokens = [found for found, _ in prefixes.trace(slot)]
    timestamps = ctc_alignment(log_probs, lengths.to(log_probs.device), tokens)
    return [Hypothesis(*found) for found in zip(tokens, timestamps, score.tolist())]


@torch.no_grad()
def prefix_beam_uncertainty(log_probs: Tensor, lengths: Tensor, beam_size: int = 8) -> Tensor:
    """Return how uncertain the most probable token sequences are, given the others of the beam.

    The n-best posterior (arXiv 2309.09546, section 3) is the share of the best prefix in the probability of all
    prefixes that are in the beam after the last frame.

    Args, Raises: as prefix_beam_search.
    Returns:
      (N,), minus the log of the n-best posterior: 0 where nothing competes.
    """
    _, scores = _search(log_probs, lengths, beam_size)
    return scores.logsumexp(dim=1) - scores.max(dim=1).values


def _search(
    log_probs: Tensor,
    lengths: Tensor,
    beam_size: int,
    blank_penalty: float = 0.0,
    context: ContextGraph | None = None,
) -> tuple[Prefixes, Tensor]:
    """Return the beam after the last frame, and the scores (N, B) of its prefixes."""
    check_log_probs(log_probs, lengths)
    batch, _, vocab_size = log_probs.shape
    prefixes = Prefixes(batch, beam_size, vocab_size, context, log_probs.device)
    lengths = lengths.to(log_probs.device)
    frames = int(lengths.max()) if batch else 0
    inside = valid_frames(lengths, frames)
    check_no_nan(log_probs[:, :frames], inside, "log_probs")
    outside_log_prob = certain_blank(vocab_size, log_probs.device)
    penalty = torch.zeros_like(outside_log_prob)
    penalty[0] = blank_penalty

    # log-probabilities (N, B) of a prefix by alignments that end in a blank, and in its last token
    ends_in_blank = prefixes.only_first()
    ends_in_token = torch.full_like(ends_in_blank, -math.inf)
    for frame in range(frames):
        symbol_log_prob = log_probs[:, frame].double() - penalty  # (N, V)
        symbol_log_prob = torch.where(inside[:, frame : frame + 1], symbol_log_prob, outside_log_prob)
        last = prefixes.last
        last_log_prob = symbol_log_prob.gather(1, last)
        total = torch.logaddexp(ends_in_blank, ends_in_token)

        # extend each prefix by each token; by its last one only after a blank
        candidates = total.unsqueeze(2) + symbol_log_prob.unsqueeze(1)
        candidates.scatter_(2, last.unsqueeze(2), (ends_in_blank + last_log_prob).unsqueeze(2))
        # keep each prefix: by a blank, by its last token once more, or by that token from its parent
        from_parent = prefixes.through_parents(candidates).logsumexp(dim=1)
        prefixes.drop_merged(candidates)
        ends_in_blank = total + symbol_log_prob[:, :1]
        ends_in_token = torch.logaddexp(ends_in_token + last_log_prob, from_parent)
        candidates[:, :, 0] = torch.logaddexp(ends_in_blank, ends_in_token)

        choice = prefixes.advance(candidates)
        prefixes.record(choice.source, choice.symbol)
        kept = choice.symbol == 0
        extended = candidates.flatten(1).gather(1, choice.index)
        ends_in_blank = ends_in_blank.gather(1, choice.source).masked_fill(~kept, -math.inf)
        ends_in_token = torch.where(kept, ends_in_token.gather(1, choice.source), extended)

    return prefixes, torch.logaddexp(ends_in_blank, ends_in_token) + prefixes.context_total()
