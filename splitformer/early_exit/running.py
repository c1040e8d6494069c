"""Running a batch through the encoder while its utterances exit one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.model.asr import AsrModel
from splitformer.model.conformer import valid_frames
from splitformer.model.encoder import ExitOutput

Stops = Callable[[Tensor, ExitOutput, "Tensor | None"], Tensor]
"""(rows (n,), their exit output, CTC log-probabilities or None) to (n,), true where an utterance exits."""


class Exited(NamedTuple):
    """Utterances that exit together, at one exit."""

    rows: Tensor
    """(n,) their places in the batch that went in"""
    exit_output: ExitOutput
    """of these n utterances"""
    log_probs: Tensor | None
    """(n, T', V) of the CTC head, None for a model without one"""
    nan_exits: Tensor
    """(n,) number of exits of each that were skipped because their output contained NaN"""


def exit_early(model: AsrModel, x: Tensor, x_lens: Tensor, stops: Stops) -> Iterator[Exited]:
    """Run each utterance up to the exit at which `stops` is true; the batch shrinks as utterances exit.

    An utterance without an output frame exits at the first exit, and all remaining ones at the last. Where an exit's
    output contains NaN, the utterance continues to the next exit. If all deeper exits contain NaN too, its result is
    that of its last exit without NaN, or of the last exit if there is none.

    Args:
      x, x_lens: features (N, T, C) and their lengths (N,).
      stops: decides which utterances exit. It is not called at the last exit, nor for utterances that are empty or
        whose output contains NaN.
    Yields:
      the utterances that exit, exit by exit; each utterance once.
    """
    rows = torch.arange(x.size(0), device=x.device)
    nan_exits = torch.zeros_like(rows)
    last_good: dict[int, Exited] = {}  # {row: its last exit without NaN}, for rows with only NaN since
    exits = model.encoder(x, x_lens)
    before: Exited | None = None
    active: Tensor | None = None
    was_broken = torch.ones_like(rows, dtype=torch.bool)  # the first exit has no earlier result
    while len(rows):
        exit_output = exits.send(active)
        log_probs = model.ctc_log_probs(exit_output) if "ctc" in model.heads else None
        broken = has_nan(exit_output.encoder_out if log_probs is None else log_probs, exit_output.lengths)
        now = Exited(rows, exit_output, log_probs, nan_exits + broken)
        still_broken = rows[broken & was_broken].tolist()
        last_good = {row: exited for row, exited in last_good.items() if row in still_broken}
        for row in rows[broken & ~was_broken].tolist():
            assert before is not None
            last_good[row] = _select(before, before.rows == row)
        if exit_output.layer == model.encoder.exit_layers[-1]:
            for place, row in enumerate(rows.tolist()):
                if row in last_good:
                    yield last_good[row]._replace(nan_exits=now.nan_exits[place : place + 1])
            yield from _some(now, torch.tensor([row not in last_good for row in rows.tolist()], device=x.device))
            return

        exiting = exit_output.lengths == 0
        for usable in _some(now, ~broken & ~exiting):
            stop = stops(usable.rows, usable.exit_output, usable.log_probs)
            exiting |= torch.isin(rows, usable.rows[stop])
        yield from _some(now, exiting)
        if exiting.any():
            active = (~exiting).nonzero().flatten()
            before, was_broken = _select(now, ~exiting), broken[~exiting]
        else:
            before, active, was_broken = now, None, broken
        rows, nan_exits = before.rows, before.nan_exits


def _some(exited: Exited, mask: Tensor) -> Iterator[Exited]:
    """Yield the utterances of `mask` (n,), if there is any."""
    if mask.all():
        yield exited
    elif mask.any():
        yield _select(exited, mask)


def _select(exited: Exited, mask: Tensor) -> Exited:
    """The utterances of `mask` (n,), without the padding that only the others needed."""
    lengths = exited.exit_output.lengths[mask]
    frames = max(1, int(lengths.max())) if len(lengths) else 0
    encoder_out = exited.exit_output.encoder_out[mask, :frames]
    return Exited(
        exited.rows[mask],
        ExitOutput(exited.exit_output.layer, encoder_out, lengths),
        None if exited.log_probs is None else exited.log_probs[mask, :frames],
        exited.nan_exits[mask],
    )


def has_nan(x: Tensor, lengths: Tensor) -> Tensor:
    """(N,), true where a valid frame of x (N, T', D) contains NaN."""
    return (x.isnan().any(dim=2) & valid_frames(lengths, x.size(1))).any(dim=1)
