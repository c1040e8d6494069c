"""From cuts on disk to batches of features and labels, with Lhotse's datasets."""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.dataset import SpecAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from splitformer.config import AugmentConfig, ConfigError, DataConfig
from splitformer.data.batches import DEAD_WORKER, Batch, BatchMaker, UnusableError, cut_files, load_cuts, seeded
from splitformer.data.cut_index import CutIndex, DataError, ScanReport, TrainingFilter, index_cuts
from splitformer.data.features import FbankOptions
from splitformer.data.noise import NoiseFilter, NoiseMixer, noise_mixer
from splitformer.data.plan import EpochPlan, plan_epoch
from splitformer.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MAX_RESTARTS = 3
"""Times in an epoch that loading is started again after one of its processes died."""


def check_noise(augment: AugmentConfig, noise_cuts: bool) -> None:
    """Raises ConfigError where the configuration asks for noise and there is none, or the other way round."""
    if augment.noise_p and not noise_cuts:
        raise ConfigError(
            f"augment.noise_p = {augment.noise_p} mixes noise in, and there is none: give --noise-cuts FILE, which "
            "./prepare.sh --musan-dir DIR makes, or set augment.noise_p=0"
        )
    if noise_cuts and not augment.noise_p:
        raise ConfigError(
            "--noise-cuts are given, and augment.noise_p = 0 mixes nothing in: set augment.noise_p, such as 0.5, or "
            "leave --noise-cuts out"
        )


class Share(NamedTuple):
    """What one rank takes of a global batch at a time."""

    cuts: np.ndarray
    """numbers of the cuts"""
    seed: tuple[int, ...]
    """of its augmentation: seed, epoch, batch, part"""


class TrainingData:
    """The training batches, in an order that depends on the seed and the epoch alone, from any batch on.

    A global batch has `parts` parts: one for each rank and each of the batches whose gradients a rank accumulates. What
    augmentation draws depends on the part, not on the process that loads it.
    """

    def __init__(
        self,
        train_cuts: Iterable[Path],
        tokenizer: Tokenizer,
        data: DataConfig,
        augment: AugmentConfig,
        folder: Path,
        seed: int,
        num_workers: int = 0,
        progress: bool = False,
        on_the_fly: FbankOptions | None = None,
        noise_cuts: Iterable[Path] = (),
    ) -> None:
        """
        Args:
          folder: keeps the index of the cuts, and beside it that of the noise.
          num_workers: processes that load.
          on_the_fly: compute features from audio, as these options say; None: the cuts have features.
          noise_cuts: what `augment.noise_p` of the utterances are mixed with.
        Raises:
          ValueError: too little is left to train on; a noise_p without noise, or noise without a noise_p.
        """
        train_cuts, noise_cuts = list(train_cuts), list(noise_cuts)
        check_noise(augment, bool(noise_cuts))
        self.tokenizer, self.data, self.augment = tokenizer, data, augment
        self.seed, self.num_workers = seed, num_workers
        self.index: CutIndex
        self.report: ScanReport
        self.index, self.report = index_cuts(
            load_cuts(train_cuts),
            cut_files(train_cuts),
            TrainingFilter(tokenizer, data, on_the_fly=on_the_fly is not None),
            folder,
            progress,
        )
        if self.report.kept < 2:
            raise ValueError(f"{self.report.kept} utterances are left to train on:\n  {self.report}")
        self.num_buckets = max(1, min(data.num_buckets, self.report.kept // 20))
        self.steps_per_epoch = len(self.plan(epoch=1))
        """of the first epoch; later ones may differ by a few"""
        self.on_the_fly = on_the_fly
        self.noise: NoiseMixer | None = None
        if noise_cuts:
            first = self.index[0]
            kind, bins = (None, 0) if on_the_fly else (first.features.type, first.num_features)
            noise_folder = folder.with_name(f"{folder.name}-noise")
            low, high = augment.noise_snr
            self.noise = noise_mixer(
                load_cuts(noise_cuts),
                cut_files(noise_cuts),
                NoiseFilter(kind, bins),
                noise_folder,
                augment.noise_p,
                (low, high),
            )

    def feature_deviation(self, max_cuts: int = 1000) -> Tensor:
        """(C,) deviation of the features around their utterance's mean, over so many cuts from all over the index."""
        total, frames, make = torch.zeros(()), 0, BatchMaker(self.tokenizer, [], self.on_the_fly)
        for number in np.linspace(0, len(self.index) - 1, min(max_cuts, len(self.index))).astype(int):
            cut = self.index[number]
            try:
                features = make.load(cut).double()
            except UnusableError as error:
                fault = error
                continue
            total = total + (features - features.mean(dim=0)).square().sum(dim=0)
            frames += features.size(0)
        if not frames:
            raise DataError(f"none of the features can be read; of {cut.id}: {fault}")
        return (total / frames).sqrt().clamp(min=1e-3).float()

    def plan(self, epoch: int) -> EpochPlan:
        """The global batches of `epoch`, counted from 1."""
        return plan_epoch(self.index.durations, self.data.max_duration, self.num_buckets, self.seed, epoch)

    def batches(self, plan: EpochPlan, epoch: int, first: int, parts: int, mine: range) -> Iterator[Batch]:
        """The parts `mine` of `parts` of the global batches of `plan`, the plan of `epoch`, from number `first` on.

        Raises:
          DataError: nothing can be read any more, or the processes that load die again and again.
        """
        a = self.augment
        ramp = min(1.0, epoch / a.specaug_warmup_epochs) if a.specaug_warmup_epochs else 1.0
        spec_augment = SpecAugment(
            time_warp_factor=a.time_warp_factor,
            num_feature_masks=a.num_feature_masks,
            features_mask_size=a.features_mask_size,
            num_frame_masks=a.num_frame_masks,
            frames_mask_size=a.frames_mask_size,
            max_frames_mask_fraction=a.max_frames_mask_fraction,
            p=a.p * ramp,
        )
        make = BatchMaker(self.tokenizer, [spec_augment] if a.p else [], self.on_the_fly, self.noise)
        dataset = TrainingShares(self.index, make)
        shares = Shares(plan, (self.seed, epoch), first, parts, mine)
        restarts = 0
        while True:
            loader = DataLoader(
                dataset,
                sampler=shares,
                batch_size=None,
                num_workers=self.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
            try:
                for batch in _quiet_iterator(loader):
                    shares.passed += 1
                    yield batch
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # the latter two: it died while it handed a batch over
                if isinstance(error, RuntimeError) and not re.search(DEAD_WORKER, str(error)):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise DataError(
                        f"processes that load data died {restarts} times in this epoch, lastly: {error}. If memory ran "
                        "out, lower --num-workers or data.max_duration"
                    ) from error
                log.warning("%s; loading is started again where it stopped", error)


def _quiet_iterator(loader: DataLoader) -> Iterator[Batch]:
    """`iter(loader)`, less its signal handler.

    With it, torch raises the death of a loading process in the midst of whatever runs, such as an optimiser's step.
    Without, it is raised where a batch is asked for, within seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return iterator


class Shares(Sampler[Share]):
    """The parts of an epoch's batches that one rank takes, in order, less those that have `passed`."""

    def __init__(self, plan: EpochPlan, seed: tuple[int, ...], first: int, parts: int, mine: range) -> None:
        self.plan, self.seed, self.first, self.parts, self.mine = plan, seed, first, parts, mine
        self.passed = 0

    def __iter__(self) -> Iterator[Share]:
        batches, within = divmod(self.passed, len(self.mine))
        for number in range(self.first + batches, len(self.plan)):
            for part in self.mine[within:]:
                yield Share(self.plan.share(number, part, self.parts), (*self.seed, number, part))
            within = 0

    def __len__(self) -> int:
        return (len(self.plan) - self.first) * len(self.mine) - self.passed


class TrainingShares(Dataset[Batch]):
    """Loads a share: cuts that cannot be read, or whose features are not finite, are left out and named.

    Where a whole share is lost, a cut that follows in the index takes its place: every rank takes part in every step.
    """

    SUBSTITUTES = 20
    """cuts to try in the place of a lost share, before the data are taken for gone"""

    def __init__(self, index: CutIndex, make: BatchMaker) -> None:
        self.index, self.make = index, make

    def __getitem__(self, share: Share) -> Batch:
        with seeded(*share.seed):
            cuts = [self.index[number] for number in share.cuts]
            try:
                batch = self.make(cuts)
            except DataError:
                raise
            except Exception:  # whatever a reader of damaged files raises; found out below which file
                batch = None
        if batch is not None and bool(torch.isfinite(batch.x).all()):
            return batch
        faults = {cut.id: fault for cut in cuts if (fault := self.make.fault(cut))}
        if not faults and batch is not None:
            faults = {cut.id: "augmentation made its features infinite" for cut in cuts}
        good = [cut for cut in cuts if cut.id not in faults] or [self._substitute(share.cuts[-1], faults)]
        with seeded(*share.seed):
            batch = self.make(good)
            return batch._replace(faults={**faults, **batch.faults})

    def _substitute(self, number: int, faults: dict[str, str]) -> Cut:
        for step in range(1, self.SUBSTITUTES + 1):
            cut = self.index[(int(number) + step) % len(self.index)]
            if not self.make.fault(cut):
                return cut
        cut_id, reason = next(iter(faults.items()))
        raise DataError(f"{cut_id}: {reason}; nor can the {self.SUBSTITUTES} cuts after it be read. {self.make.remedy}")
