"""Uncertainty statistics of exits, which exit policies read; lower means more certain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.early_exit.names import WITHOUT_CTC
from splitformer.errors import UserError
from splitformer.model.conformer import valid_frames
from splitformer.model.encoder import ExitOutput

BLANK_ID = 0

# ---- of n utterances at one exit, from its log-probabilities (n, T', V) and lengths (n,)


def mean_entropy(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return (n,) the entropy of a frame's distribution in nats, averaged over the frames; 0 without frames.

    The criterion of HuBERT-EE (arXiv 2204.06328), which follows BranchyNet for images (arXiv 1709.01686).
    """
    return _mean(_entropy(log_probs), valid_frames(lengths, log_probs.size(1)))


def mean_entropy_non_blank(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return (n,) the same over the frames whose best symbol is not the blank, or over all if there are none.

    CTC is certain of a blank in most frames. They hide the uncertainty of the few frames in which it emits tokens.
    """
    valid = valid_frames(lengths, log_probs.size(1))
    non_blank = valid & (log_probs.argmax(dim=2) != BLANK_ID)
    return _mean(_entropy(log_probs), torch.where(non_blank.any(dim=1, keepdim=True), non_blank, valid))


def mean_posterior_uncertainty(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return (n,) one minus the posterior of a frame's best symbol, averaged (arXiv 2309.09546, section 3)."""
    return _mean(1.0 - log_probs.max(dim=2).values.exp(), valid_frames(lengths, log_probs.size(1)))


def disagreement(previous: Sequence[int], current: Sequence[int]) -> float:
    """Return the edit distance of two exits' hypotheses over the length of the longer one: 0 (equal) to 1.

    Token sequences take the place of the classes that PABEE compares (arXiv 2006.04152, arXiv 2211.08989).
    """
    return Levenshtein.distance(previous, current) / max(len(previous), len(current), 1)


def _entropy(log_probs: Tensor) -> Tensor:
    # the clamp keeps 0 * -inf of an impossible symbol from being NaN
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=2)


def _mean(values: Tensor, frames: Tensor) -> Tensor:
    return values.masked_fill(~frames, 0.0).sum(dim=1) / frames.sum(dim=1).clamp(min=1)


OF_CTC = ("entropy", "entropy_non_blank", "posterior", "nbest_posterior", "disagreement")
"""Statistics that need a CTC head. `nbest_posterior`: minus the log of the best hypothesis' share of the probability of
an n-best list (arXiv 2309.09546). `disagreement`: of this exit's greedy hypothesis and the previous one's; NaN at the
first exit."""

STATISTICS = (*OF_CTC, "frames", "batch_frames", "elapsed")
"""All statistics. `frames`: of the encoder's output; `batch_frames`: of the whole batch, padding included; `elapsed`:
seconds since the batch started."""

Statistics = Mapping[str, Tensor]
"""{name: (n, e)}: values of n utterances at the e exits up to the present one; NaN where nothing was measured."""


def _no_nbest(rows: Tensor, exit_output: ExitOutput, log_probs: Tensor) -> Tensor:
    raise ValueError("nbest_posterior needs a search that returns n-best lists")


class Meter:
    """Measures the statistics of one batch at exit after exit.

    Args:
      batch_size: number of utterances in the batch.
      exit_layers: exits of the model.
      needs: names of the statistics to measure.
      nbest: returns the `nbest_posterior` (n,) of rows (n,), their exit output and CTC log-probabilities.
      clock: returns seconds; `elapsed` is counted from the construction.
    """

    def __init__(
        self,
        batch_size: int,
        exit_layers: Sequence[int],
        needs: Collection[str],
        nbest: Callable[[Tensor, ExitOutput, Tensor], Tensor] = _no_nbest,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if unknown := sorted(set(needs) - set(STATISTICS)):
            raise ValueError(f"unknown statistics {unknown}; choose among {', '.join(STATISTICS)}")
        self.exit_layers, self.nbest, self.clock = exit_layers, nbest, clock
        self.started = clock()
        shape = (batch_size, len(exit_layers))
        self._history = {name: torch.full(shape, math.nan, dtype=torch.float64) for name in needs}
        self._tokens: dict[int, list[int]] = {}

    def measure(self, rows: Tensor, exit_output: ExitOutput, log_probs: Tensor | None) -> Statistics:
        """Return the statistics of utterances `rows` (n,) at the exits up to this one, whose output is given.

        Raises:
          UserError: a statistic needs log-probabilities of a CTC head, and there are none.
        """
        lengths = exit_output.lengths
        measures: dict[str, Callable[[], Tensor]] = {
            "frames": lambda: lengths,
            "batch_frames": lambda: torch.full_like(lengths, len(lengths) * max(1, int(lengths.max()))),
            "elapsed": lambda: torch.full_like(lengths, self.clock() - self.started, dtype=torch.float64),
        }
        if log_probs is not None:
            measures |= {
                "entropy": lambda: mean_entropy(log_probs, lengths),
                "entropy_non_blank": lambda: mean_entropy_non_blank(log_probs, lengths),
                "posterior": lambda: mean_posterior_uncertainty(log_probs, lengths),
                "nbest_posterior": lambda: self.nbest(rows, exit_output, log_probs),
                "disagreement": lambda: self._disagreement(rows, log_probs, lengths),
            }
        elif missing := self._history.keys() - measures.keys():
            raise UserError(
                f"the policy reads {', '.join(sorted(missing))} from CTC log-probabilities, and the model has no CTC "
                f"head; use {' or '.join(WITHOUT_CTC)}"
            )
        place, places = self.exit_layers.index(exit_output.layer), rows.cpu()
        for name, history in self._history.items():
            history[places, place] = measures[name]().double().cpu()
        return {name: history[places, : place + 1] for name, history in self._history.items()}

    def _disagreement(self, rows: Tensor, log_probs: Tensor, lengths: Tensor) -> Tensor:
        values = []
        for row, hypothesis in zip(rows.tolist(), ctc_greedy_search(log_probs, lengths)):
            previous = self._tokens.get(row)
            values.append(math.nan if previous is None else disagreement(previous, hypothesis.tokens))
            self._tokens[row] = hypothesis.tokens
        return torch.tensor(values)
