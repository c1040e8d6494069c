"""Logs of a run: training.jsonl, TensorBoard, the log, and batches without finite gradients."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from splitformer.checkpoint import save_checkpoint
from splitformer.data.batch import TENSORS, Batch
from splitformer.model.subsampling import FRAME_SHIFT
from splitformer.report.records import EpochRecord, append_epoch
from splitformer.training.evaluate import DevResult
from splitformer.training.memory import GIB, peak_memory
from splitformer.training.progress import EpochTotals, StepResult

log = logging.getLogger(__name__)

LONG_WAIT = 0.1
"""Share of the time spent waiting for data above which the log advises what to do."""
MAX_SAVED = 20
"""Bad batches to save."""
MAX_NAMED = 10
"""Unreadable cuts to name in the log; more are only counted."""


class RunLog:
    """Writes training.jsonl, TensorBoard and the log; for the main rank."""

    def __init__(self, exp_dir: Path, step: int, lines: StepLines) -> None:
        """`step` is the last step so far; later entries in TensorBoard are replaced."""
        self.lines = lines
        self.path = exp_dir / "training.jsonl"
        self.writer = SummaryWriter(str(exp_dir / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        self.writer.close()

    def add_step(self, number: int, step: StepResult, learning_rate: float) -> None:
        self.writer.add_scalar("train/loss_step", step.loss, number)
        self.writer.add_scalar("train/gradient_norm", step.norm, number)
        self.writer.add_scalar("train/learning_rate", learning_rate, number)

    def add_epoch(self, record: EpochRecord, num_epochs: int, num_workers: int) -> None:
        append_epoch(self.path, record)
        for name in EpochRecord.SCALARS:
            self.writer.add_scalar(f"epoch/{name}", getattr(record, name), record.epoch)
        for name in EpochRecord.PER_EXIT:
            for layer, value in getattr(record, name).items():
                self.writer.add_scalar(f"{name}/{layer:02d}", value, record.epoch)
        self.writer.flush()
        log.info("%s", _summary(record, num_epochs))
        if record.data_wait_share > LONG_WAIT:
            log.warning(
                "%.0f%% of the time was spent waiting for data: raise --num-workers (now %d per rank), or move the "
                "features to a faster disk",
                100 * record.data_wait_share,
                num_workers,
            )


class StepLines:
    """Logs a line about the last steps every `minutes`; it takes the place of a progress bar."""

    def __init__(self, exits: tuple[int, ...], total_steps: int, minutes: float, device: torch.device) -> None:
        self.exits, self.total_steps, self.seconds, self.device = exits, total_steps, 60 * minutes, device
        self.totals = EpochTotals()
        self.since = time.monotonic()

    def add(self, step: StepResult, number: int, place: str, learning_rate: float) -> None:
        """Add the result of step `number`; `place` says where in the epoch it is."""
        self.totals.add(step, math.inf)
        seconds = time.monotonic() - self.since
        if seconds < self.seconds:
            return
        totals = self.totals
        per_exit = zip(self.exits, totals.loss_per_exit)
        left = (self.total_steps - number) * seconds / totals.steps
        parts = [
            f"{place}  step {number}  loss {totals.per_token(totals.loss):.3f}",
            "by exit " + " ".join(f"{layer}:{totals.per_token(loss):.3f}" for layer, loss in per_exit),
            f"lr {learning_rate:.1e}",
            f"{totals.frames * FRAME_SHIFT / max(seconds, 1e-9):.0f} s of audio per second",
            f"waited for data {100 * totals.waited / max(totals.seconds, 1e-9):.0f}%",
            f"peak memory {peak_memory(self.device) / GIB:.1f} GiB",
            f"{duration(left)} left",
        ]
        if totals.skipped:
            parts.append(f"{totals.skipped} steps skipped")
        log.info("%s", "  ".join(parts))
        self.totals, self.since = EpochTotals(), time.monotonic()


def duration(seconds: float) -> str:
    """Return a duration as hours and minutes, after a number of days from one day on."""
    minutes = round(max(0.0, seconds) / 60)
    days, minutes = divmod(minutes, 24 * 60)
    return f"{f'{days} d ' if days else ''}{minutes // 60}:{minutes % 60:02d} h"


def epoch_record(
    epoch: int, exits: tuple[int, ...], totals: EpochTotals, dev: DevResult, seconds: float, learning_rate: float
) -> EpochRecord:
    per_exit = totals.loss_per_exit or [0.0] * len(exits)
    return EpochRecord(
        epoch=epoch,
        seconds=seconds,
        frames_per_second=totals.frames / max(totals.seconds, 1e-9),
        data_wait_share=totals.waited / max(totals.seconds, 1e-9),
        learning_rate=learning_rate,
        train_loss=totals.per_token(totals.loss),
        train_loss_per_exit={layer: totals.per_token(loss) for layer, loss in zip(exits, per_exit, strict=True)},
        dev_loss_per_exit=dev.loss_per_exit,
        dev_wer_per_exit=dev.wer_per_exit.get("ctc", {}),
        dev_transducer_wer_per_exit=dev.wer_per_exit.get("transducer", {}),
        gradient_norm=totals.per_good_step(totals.norm),
        clipped_share=totals.per_good_step(totals.clipped),
        skipped_steps=totals.skipped,
        unreadable_cuts=totals.unreadable,
    )


def _summary(record: EpochRecord, num_epochs: int) -> str:
    parts = [f"epoch {record.epoch}/{num_epochs}", f"loss {record.train_loss:.3f}"]
    if record.dev_loss_per_exit:
        parts.append(f"dev loss {list(record.dev_loss_per_exit.values())[-1]:.3f}")
    for head, by_layer in (("", record.dev_wer_per_exit), (" (transducer)", record.dev_transducer_wer_per_exit)):
        if by_layer:
            wers = " ".join(f"{layer}:{wer:.1f}" for layer, wer in by_layer.items())
            parts.append(f"dev WER% by exit{head} {wers}")
    if record.skipped_steps:
        parts.append(f"{record.skipped_steps} steps skipped")
    if record.unreadable_cuts:
        parts.append(f"{record.unreadable_cuts} cuts unreadable")
    parts.append(f"lr {record.learning_rate:.1e}")
    parts.append(f"|g| {record.gradient_norm:.2f} ({100 * record.clipped_share:.0f}% clipped)")
    parts.append(f"{record.seconds:.0f} s  {record.frames_per_second:.0f} frames/s")
    parts.append(f"waited for data {100 * record.data_wait_share:.0f}%")
    return "  ".join(parts)


class BadData:
    """Keeps one rank's batches without finite gradients, and names its unreadable cuts."""

    def __init__(self, folder: Path, rank: int) -> None:
        """`folder` keeps the batches; `checkpoint.load_contents` reads them."""
        self.folder, self.rank = folder, rank
        self.named = 0

    def save(self, step: int, batches: Iterable[Batch]) -> None:
        """Name and save micro-batches of a step whose gradients were not finite."""
        batches = list(batches)
        if not batches:
            return
        cut_ids = [batch.cut_ids for batch in batches]
        names = " ".join(itertools.chain(*cut_ids))
        log.warning("step %d is skipped: its gradients are not finite; cuts: %s", step, names)
        if self.folder.is_dir() and len(list(self.folder.iterdir())) >= MAX_SAVED:
            return
        path = self.folder / f"step-{step}-rank-{self.rank}.pt"
        tensors = {f"{name}_{i}": getattr(batch, name) for i, batch in enumerate(batches) for name in TENSORS}
        try:
            save_checkpoint(path, {"cut_ids": cut_ids, "step": step, "batch": tensors})
        except OSError as error:
            log.warning("cannot save %s (%s)", path, error)

    def name(self, errors: dict[str, str]) -> None:
        """Log cuts that were left out of a batch, as {cut id: reason}."""
        for cut_id, reason in errors.items():
            self.named += 1
            if self.named <= MAX_NAMED:
                more = "; more of them are only counted" if self.named == MAX_NAMED else ""
                log.warning("cut %s is left out: %s%s", cut_id, reason, more)
