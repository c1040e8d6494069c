"""The encoder with its heads: what a checkpoint holds and a device runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from splitformer.model.conformer import valid_frames
from splitformer.model.encoder import ExitOutput


class Leaving(NamedTuple):
    """Utterances that leave the encoder together, at one exit."""

    rows: Tensor
    """(n,) their places in the batch that went in"""
    exit_output: ExitOutput
    """of these n utterances"""
    log_probs: Tensor | None
    """(n, T', V) of the CTC head, where there is one"""
    nan_exits: Tensor
    """(n,) exits that each passed or left behind because their output held a NaN"""


def _some(leaving: Leaving, which: Tensor) -> Iterator[Leaving]:
    """Those of `which` (n,), a mask; nothing where there is none."""
    if which.all():
        yield leaving
    elif which.any():
        yield _select(leaving, which)


def _select(leaving: Leaving, which: Tensor) -> Leaving:
    """Those of `which` (n,), a mask, without the padding that only others needed."""
    lengths = leaving.exit_output.lengths[which]
    frames = max(1, int(lengths.max())) if len(lengths) else 0
    encoder_out = leaving.exit_output.encoder_out[which, :frames]
    return Leaving(
        leaving.rows[which],
        ExitOutput(leaving.exit_output.layer, encoder_out, lengths),
        None if leaving.log_probs is None else leaving.log_probs[which, :frames],
        leaving.nan_exits[which],
    )


def has_nan(x: Tensor, lengths: Tensor) -> Tensor:
    """(N,), true where a valid frame of x (N, T', D) holds a NaN."""
    return (x.isnan().any(dim=2) & valid_frames(lengths, x.size(1))).any(dim=1)
