"""The best CTC alignment of known tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import check_log_probs


def ctc_alignment(log_probs: Tensor, lengths: Tensor, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the frames in which tokens start in their most probable alignment (Viterbi; Graves et al., ICML 2006).

    Args:
      log_probs, lengths: as for ctc_greedy_search; symbol 0 is the blank.
      tokens: the token ids of each utterance.
    Raises:
      ValueError: shapes or lengths do not fit together, a token is outside 1..V-1, or tokens have no alignment of a
        probability above 0: each takes a frame, and equal neighbours a blank between them.
    """
    check_log_probs(log_probs, lengths)
    batch, _, vocab_size = log_probs.shape
    if len(tokens) != batch:
        raise ValueError(f"tokens of {len(tokens)} utterances for log_probs of {batch}: give one sequence for each")
    for utterance, sequence in enumerate(tokens):
        if not all(0 < token < vocab_size for token in sequence):
            raise ValueError(f"tokens {list(sequence)} of utterance {utterance} are outside 1..{vocab_size - 1}")
    if batch == 0:
        return []

    # states of an utterance: blank, token, blank, ..., token, blank
    device = log_probs.device
    num_tokens = torch.tensor([len(sequence) for sequence in tokens], device=device)
    labels = torch.zeros(batch, 2 * int(num_tokens.max()) + 1, dtype=torch.int64)
    for utterance, sequence in enumerate(tokens):
        labels[utterance, 1 : 2 * len(sequence) : 2] = torch.tensor(sequence, dtype=torch.int64)
    labels = labels.to(device)
    may_skip = torch.zeros_like(labels, dtype=torch.bool)  # the blank between two different tokens
    may_skip[:, 2:] = (labels[:, 2:] != 0) & (labels[:, 2:] != labels[:, :-2])

    lengths = lengths.to(device)
    frames = int(lengths.max())
    score = torch.full(labels.shape, -math.inf, dtype=torch.float64, device=device)
    score[:, 0] = 0.0  # as after a blank before the first frame
    steps = []
    for frame in range(frames):
        one = torch.nn.functional.pad(score, (1, 0), value=-math.inf)[:, :-1]
        two = torch.nn.functional.pad(score, (2, 0), value=-math.inf)[:, : labels.shape[1]]
        best, step = torch.stack([score, one, two.masked_fill(~may_skip, -math.inf)]).max(dim=0)
        inside = (frame < lengths).unsqueeze(1)
        score = torch.where(inside, best + log_probs[:, frame].double().gather(1, labels), score)
        steps.append(step.masked_fill(~inside, 0))

    # the end is the last token or the blank behind it
    end = (2 * num_tokens).unsqueeze(1)
    before = (end - 1).clamp(min=0)
    state = torch.where(score.gather(1, before) > score.gather(1, end), before, end)
    impossible = score.gather(1, state).squeeze(1) == -math.inf
    if impossible.any():
        utterance = int(impossible.nonzero()[0])
        raise ValueError(
            f"the {len(tokens[utterance])} tokens of utterance {utterance} have no alignment with its "
            f"{int(lengths[utterance])} output frames: are they another utterance's?"
        )

    # back from the end; the frame that is written last into a state is the one that entered it
    state = state.cpu()
    entered = torch.full(labels.shape, frames)
    for frame, step in reversed(list(enumerate(torch.stack(steps).cpu() if steps else []))):
        entered.scatter_(1, state, frame)
        state = state - step.gather(1, state)
    return [entered[utterance, 1 : 2 * len(sequence) : 2].tolist() for utterance, sequence in enumerate(tokens)]
