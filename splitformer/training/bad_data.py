"""What training leaves out: batches without finite gradients, kept for inspection, and cuts that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from splitformer.checkpoint import save_checkpoint
from splitformer.data.batches import TENSORS, Batch

log = logging.getLogger(__name__)

SAVED = 20
"""batches that are kept for inspection"""
NAMED = 10
"""unreadable cuts that are named in the log; the others are counted"""


class BadData:
    """One rank's account of them."""

    def __init__(self, folder: Path, rank: int) -> None:
        """`folder` keeps the batches, read by `checkpoint.load_contents`."""
        self.folder, self.rank = folder, rank
        self.named = 0

    def keep(self, step: int, parts: Iterable[Batch]) -> None:
        """Name and write the parts of a batch whose gradients were not finite."""
        parts = list(parts)
        if not parts:
            return
        cut_ids = [cut_id for part in parts for cut_id in part.cut_ids]
        log.warning("step %d is skipped: its gradients are not finite; cuts: %s", step, " ".join(cut_ids))
        if self.folder.is_dir() and len(list(self.folder.iterdir())) >= SAVED:
            return
        path = self.folder / f"step-{step}-rank-{self.rank}.pt"
        tensors = {f"{name}_{i}": getattr(part, name) for i, part in enumerate(parts) for name in TENSORS}
        try:
            save_checkpoint(path, {"cut_ids": [part.cut_ids for part in parts], "step": step, "batch": tensors})
        except OSError as error:
            log.warning("cannot save %s (%s)", path, error)

    def name_faults(self, batch: Batch) -> None:
        """Say which cuts were left out of a batch, and why."""
        for cut_id, reason in batch.errors.items():
            self.named += 1
            if self.named <= NAMED:
                more = "; further ones are counted only" if self.named == NAMED else ""
                log.warning("cut %s is left out: %s%s", cut_id, reason, more)
