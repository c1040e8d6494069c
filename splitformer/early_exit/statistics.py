"""Exit policies: when an utterance has been heard well enough to leave the encoder.

A policy reads statistics of the exits that an utterance has passed and answers stop or go on. Statistics are numbers
of doubt: the lower, the surer. `Meter` computes them as a batch goes through the exits; a table of them, made once from
all exits of a set, answers what any policy would have done (`splitformer.calibration`). Both ask the same `stops`.

An exit is named by the encoder layer that it follows. The last exit is never asked: whatever gets there leaves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.model.conformer import valid_frames
from splitformer.model.encoder import ExitOutput

# ---- statistics: of n utterances at one exit, from its log-probabilities (n, T', V) and lengths (n,)

BLANK_ID = 0


def mean_entropy(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """(n,) mean over frames of the entropy of the frame's distribution, in nats; 0 without a frame.

    The criterion of HuBERT-EE (arXiv 2204.06328), as BranchyNet (arXiv 1709.01686) has it for images.
    """
    return _mean(_entropy(log_probs), valid_frames(lengths, log_probs.size(1)))


def mean_entropy_non_blank(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """The same over the frames whose best symbol is not the blank; where all are blank, over all.

    CTC says blank, and is sure of it, in most frames: they hide the doubt of the few in which tokens are decided.
    """
    inside = valid_frames(lengths, log_probs.size(1))
    spoken = inside & (log_probs.argmax(dim=2) != BLANK_ID)
    frames = torch.where(spoken.any(dim=1, keepdim=True), spoken, inside)
    return _mean(_entropy(log_probs), frames)


def mean_posterior_uncertainty(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """(n,) one less the mean over frames of the best symbol's posterior (arXiv 2309.09546, section 3)."""
    return _mean(1.0 - log_probs.max(dim=2).values.exp(), valid_frames(lengths, log_probs.size(1)))


def disagreement(before: Sequence[int], now: Sequence[int]) -> float:
    """Edit distance between two token sequences over the length of the longer one: 0 (the same) to 1.

    Of the hypotheses of consecutive exits: PABEE (arXiv 2006.04152) has it for classes; for speech recognition the
    hypotheses are sequences, and are close or far (arXiv 2211.08989).
    """
    return edit_distance(before, now) / max(len(before), len(now), 1)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from a to b.

    A column of the dynamic programme is kept as the differences of neighbouring cells, +1, -1 or 0, in the bits of two
    integers, so that a column costs a few operations on integers whatever the length of a (Myers, J. ACM 46(3), 1999;
    this form: Hyyrö, 2003).
    """
    if not a or not b:
        return len(a) + len(b)
    where: dict[int, int] = {}
    for place, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << place
    mask, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = mask, 0, len(a)  # cells that are one more, and one less, than the cell above them
    for token in b:
        match = where.get(token, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        right = (down | ~(diagonal | up)) & mask  # cells that are one more than the cell to their left
        left = up & diagonal
        distance += bool(right & last) - bool(left & last)
        right = (right << 1 | 1) & mask  # the row above the first grows by one with every column
        left = left << 1 & mask
        up = (left | ~(diagonal | right)) & mask
        down = right & diagonal
    return distance


def _entropy(log_probs: Tensor) -> Tensor:
    # what is impossible adds nothing, and 0 * -inf would be NaN
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=2)


def _mean(values: Tensor, frames: Tensor) -> Tensor:
    return values.masked_fill(~frames, 0.0).sum(dim=1) / frames.sum(dim=1).clamp(min=1)


STATISTICS = (
    "entropy",
    "entropy_non_blank",
    "posterior",
    "nbest_posterior",
    "disagreement",
    "frames",
    "batch_frames",
    "elapsed",
)
"""What policies may read. `nbest_posterior`: minus the log of the best hypothesis' share of the probability of an
n-best list (arXiv 2309.09546). `disagreement`: of greedy hypotheses, with the exit before; NaN at the first. `frames`:
of the encoder; `batch_frames`: of the whole batch, padding included; `elapsed`: seconds since the batch set out."""

Statistics = Mapping[str, Tensor]
"""{name: (n, e)}: for each of n utterances the values at the e exits it has passed, this one last; NaN where it was
not measured."""


class Meter:
    """The statistics of one batch on its way through the exits.

    Args:
      batch_size: utterances that set out.
      needs: the statistics wanted.
      nbest: gives (n,) minus log-posteriors, of rows (n,), their exit output and log-probabilities; where
        `nbest_posterior` is needed.
      clock: seconds; starts now.
      exit_layers: of the model. An exit at which nothing was measured, for NaN in all of the batch, is then in the
        history as it is where others of the batch were sound; without them it is left out.
    """

    def __init__(
        self,
        batch_size: int,
        needs: Collection[str],
        nbest: Callable[[Tensor, ExitOutput, Tensor], Tensor] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        exit_layers: Sequence[int] = (),
    ) -> None:
        strangers = sorted(set(needs) - set(STATISTICS))
        if strangers:
            raise ValueError(f"unknown statistics {strangers}; there are {', '.join(STATISTICS)}")
        if "nbest_posterior" in needs and nbest is None:
            raise ValueError("nbest_posterior is needed, and there is no search that gives n-best lists")
        self.needs, self.nbest, self.clock, self.exit_layers = needs, nbest, clock, exit_layers
        self.started = clock()
        self._passed: dict[str, list[Tensor]] = {name: [] for name in needs}
        self._batch_size, self._last_layer = batch_size, 0
        self._tokens: dict[int, list[int]] = {}

    def measure(self, rows: Tensor, exit_output: ExitOutput, log_probs: Tensor | None) -> Statistics:
        """The statistics of the utterances `rows` (n,), whose output at this exit is given, (n, e) each."""
        if log_probs is None and {"entropy", "entropy_non_blank", "posterior", "disagreement"} & set(self.needs):
            raise ValueError(
                f"this policy reads {', '.join(self.needs)} from CTC's log-probabilities, and the model has no CTC "
                "head; use fixed or deadline"
            )
        lengths, layer = exit_output.lengths, exit_output.layer
        unasked = sum(self._last_layer < each < layer for each in self.exit_layers)
        self._last_layer = layer
        measured = {}
        for name in self.needs:
            if name == "entropy":
                now = mean_entropy(log_probs, lengths)
            elif name == "entropy_non_blank":
                now = mean_entropy_non_blank(log_probs, lengths)
            elif name == "posterior":
                now = mean_posterior_uncertainty(log_probs, lengths)
            elif name == "nbest_posterior":
                now = self.nbest(rows, exit_output, log_probs)
            elif name == "disagreement":
                now = self._disagreement(rows, log_probs, lengths)
            elif name == "frames":
                now = lengths
            elif name == "batch_frames":
                now = torch.full_like(lengths, len(lengths) * max(1, int(lengths.max())))
            else:
                now = torch.full_like(lengths, self.clock() - self.started, dtype=torch.float64)
            nothing = torch.full((self._batch_size,), math.nan, dtype=torch.float64)
            column = nothing.clone()
            column[rows.cpu()] = now.double().cpu()
            self._passed[name] += [*[nothing] * unasked, column]
            measured[name] = torch.stack([each[rows.cpu()] for each in self._passed[name]], dim=1)
        return measured

    def _disagreement(self, rows: Tensor, log_probs: Tensor, lengths: Tensor) -> Tensor:
        found = []
        for row, hypothesis in zip(rows.tolist(), ctc_greedy_search(log_probs, lengths)):
            before = self._tokens.get(row)
            found.append(math.nan if before is None else disagreement(before, hypothesis.tokens))
            self._tokens[row] = hypothesis.tokens
        return torch.tensor(found)
