"""Training data: planned, augmented batches that can be resumed at any place and survive unreadable files."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse.dataset import SpecAugment
from lhotse.workarounds import Hdf5MemoryIssueFix
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from splitformer.config import AugmentConfig, Config, ConfigError
from splitformer.data.batches import (
    Batch,
    cut_files,
    ignore_stop_signals,
    load_cuts,
    long_enough,
    padded_labels,
    quiet_iterator,
)
from splitformer.data.cut_features import FeatureLoader, Utterance, padded
from splitformer.data.cut_index import (
    INDEX_FOLDER,
    CutIndex,
    DataError,
    Filter,
    ScanReport,
    TrainingFilter,
    index_cuts,
)
from splitformer.data.features import fbank_options
from splitformer.data.noise import NoiseFilter, NoiseMixer
from splitformer.data.plan import EpochPlan, plan_epoch
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.subsampling import FRAME_SHIFT

log = logging.getLogger(__name__)
DEAD_WORKER = r"DataLoader worker .*(killed|exited)|Pin memory thread exited"
"""What torch says of a loading process that died, alone or while it handed a batch to the thread that pins memory."""
PREFETCH = 2
"""Batches that each loading process keeps ready: torch's default."""
MAX_WORKERS = 16
SHARED_MEMORY = Path("/dev/shm")
"""Where loading processes put their batches."""
MAX_RESTARTS = 3
"""Restarts of data loading in an epoch, after a loading process died."""


@dataclass(frozen=True)
class DataOptions:
    """Where training data come from, and how they are loaded."""

    train_cuts: Sequence[Path]
    """manifests, or folders in Lhotse's Shar format"""
    noise_cuts: Sequence[Path] = ()
    """mixed into `augment.noise_p` of the utterances"""
    on_the_fly: bool = False
    """compute features from audio; otherwise the cuts have stored features"""
    num_workers: int = 0
    """loading processes"""
    index_dir: Path | None = None
    """folder for indexes of the cuts; None: a hidden folder beside the first of the cuts, and of the noise"""


class TrainingData:
    """The training batches, in an order that depends on the seed and the epoch alone.

    A global batch has a number of micro-batches: one for each rank and for each of the batches whose gradients a rank
    accumulates. What augmentation draws depends on the micro-batch, not on the process that loads it.
    """

    def __init__(
        self, options: DataOptions, config: Config, tokenizer: Tokenizer, seed: int, progress: bool = False
    ) -> None:
        """
        Args:
          progress: show a progress bar while the cuts are indexed.
        Raises:
          ConfigError: augment.noise_p without noise cuts, or noise cuts without it.
          DataError: too few utterances, or no noise, can be used, or the features of all of them are gone.
        """
        if bool(config.augment.noise_p) != bool(options.noise_cuts):
            given = "--noise-cuts" if options.noise_cuts else "no --noise-cuts"
            raise ConfigError(
                f"augment.noise_p = {config.augment.noise_p} with {given} mixes nothing in: set augment.noise_p, such "
                "as 0.5, and give --noise-cuts FILE, which ./prepare.sh --musan-dir DIR makes; or neither"
            )
        self.options, self.config, self.seed = options, config, seed
        self.fbank_options = fbank_options(config) if options.on_the_fly else None
        self.index, self.report = self._index(
            options.train_cuts, TrainingFilter(tokenizer, config, options.on_the_fly), progress
        )
        if self.report.kept < 2:
            raise DataError(f"{self.report.kept} utterances are left to train on:\n  {self.report}")
        if missing := self.index.missing_storage():
            raise DataError(f"the features of the training cuts are gone: there is no {missing}. {self.remedy}")
        self.num_buckets = max(1, min(config.data.num_buckets, self.report.kept // 20))
        self.noise = self._noise_mixer() if options.noise_cuts else None

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of global batches of the first epoch; later ones may differ by a few."""
        return len(self.plan(epoch=1))

    @property
    def remedy(self) -> str:
        """What to do if nothing can be read."""
        if self.options.on_the_fly:
            return "Was the audio moved or removed? ./prepare.sh --stage manifests looks for it again"
        return "Were the features moved or removed? ./prepare.sh --stage fbank makes them again"

    def _index(self, cuts: Sequence[Path], keep: Filter, progress: bool = False) -> tuple[CutIndex, ScanReport]:
        root = self.options.index_dir or cuts[0].absolute().parent / INDEX_FOLDER
        return index_cuts(load_cuts(cuts), cut_files(cuts), keep, root, progress)

    def _noise_mixer(self) -> NoiseMixer:
        files = self.options.noise_cuts
        kind, bins = (None, 0) if self.options.on_the_fly else (self.index.kind, self.index.num_features)
        index, report = self._index(files, NoiseFilter(kind, bins))
        if not report.kept:
            raise DataError(
                f"no noise in {', '.join(map(str, files))} can be mixed in ({report}): ./prepare.sh --musan-dir makes "
                "some, with the --fbank, --num-mel-bins and --on-the-fly of the training data"
            )
        low, high = self.config.augment.noise_snr
        return NoiseMixer(index, self.config.augment.noise_p, (low, high))

    def feature_deviation(self, max_cuts: int = 1000) -> Tensor:
        """Return the standard deviation (C,) of the features around their utterance's mean.

        It is estimated on at most `max_cuts` cuts, evenly over the index.

        Raises:
          DataError: none of them can be read.
        """
        total, frames = torch.zeros(()), 0
        dataset = TrainingDataset(self.index, FeatureLoader(self.fbank_options), None, self.remedy)
        problem = ""
        for number in np.linspace(0, len(self.index) - 1, min(max_cuts, len(self.index))).astype(int):
            features, error = dataset.load(number)
            if error:
                problem = f"{self.index.cut_id(number)}: {error}"
                continue
            features = features.double()
            total = total + (features - features.mean(dim=0)).square().sum(dim=0)
            frames += features.size(0)
        if not frames:
            raise DataError(f"none of the features can be read; {problem}. {self.remedy}")
        return (total / frames).sqrt().clamp(min=1e-3).float()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the global batches of `epoch`, counted from 1."""
        max_duration = self.config.data.max_duration
        return plan_epoch(self.index.durations, max_duration, self.num_buckets, self.seed, epoch)

    def batches(
        self, plan: EpochPlan, epoch: int, first: int, micro_batches: int, mine: range
    ) -> Generator[Batch, None, None]:
        """Yield this rank's micro-batches of the global batches of `plan`, the plan of `epoch`.

        Args:
          first: number of the first global batch.
          micro_batches: how many micro-batches each global batch is divided into.
          mine: those of them that this rank takes.
        Raises:
          DataError: nothing can be read any more, loading processes die again and again, or they have too little
            memory to share.
        """
        augment = self.config.augment
        workers = self.options.num_workers
        check_shared_memory(workers, self.config, micro_batches)
        dataset = TrainingDataset(
            self.index,
            FeatureLoader(self.fbank_options, self.noise),
            make_spec_augment(augment, epoch) if augment.p else None,
            self.remedy,
        )
        todo = [(number, index) for number in range(first, len(plan)) for index in mine]
        done = restarts = 0
        while True:
            loader = DataLoader(
                dataset,
                sampler=(
                    MicroBatch(plan.micro_batch(number, index, micro_batches), (self.seed, epoch, number, index))
                    for number, index in todo[done:]
                ),
                batch_size=None,
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_stop_signals,
            )
            try:
                for batch in quiet_iterator(loader):
                    done += 1
                    yield batch
                return
            except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
                # a process that dies while it hands a batch over gives one of the latter three
                if isinstance(error, RuntimeError) and not re.search(DEAD_WORKER, str(error)):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise DataError(
                        f"loading processes died {restarts} times in this epoch, lastly: {error}. If memory ran out, "
                        f"lower --num-workers or data.max_duration; if {SHARED_MEMORY} is full, make it larger (docker "
                        "run --shm-size)"
                    ) from error
                log.warning("%s; loading is started again where it stopped", error)


def default_workers(device: torch.device, config: Config, micro_batches: int) -> int:
    """Return how many loading processes a rank starts by default.

    Beside a GPU: this machine's cores, divided among its ranks, less one for the rank itself, up to MAX_WORKERS. On a
    CPU the ranks need the cores themselves: one. Fewer, if their batches would not fit into SHARED_MEMORY.
    """
    wanted = 1
    if device.type != "cpu":
        wanted = max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // _local_ranks() - 1))
    workers = min(wanted, _fitting_workers(config, micro_batches))
    if workers < wanted:
        log.warning(
            "%s is too small for the batches of %d loading processes: a rank starts %d. Make it larger (docker run "
            "--shm-size)", SHARED_MEMORY, wanted, workers,
        )  # fmt: skip
    return workers


def check_shared_memory(workers: int, config: Config, micro_batches: int) -> None:
    """Raise DataError if the batches that `workers` loading processes of each rank keep ready do not fit."""
    if workers <= (most := _fitting_workers(config, micro_batches)):
        return
    needed = workers * _local_ranks() * PREFETCH * _batch_bytes(config, micro_batches)
    raise DataError(
        f"{SHARED_MEMORY} has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:.0f} MB free; {_local_ranks()} x {workers} "
        f"loading processes with {PREFETCH} batches each need up to {needed / 1e6:.0f} MB there: make it larger "
        f"(docker run --shm-size={math.ceil(2 * needed / 1e9)}g), or give --num-workers {most}"
    )


def _fitting_workers(config: Config, micro_batches: int) -> int:
    """Return for how many loading processes of each rank SHARED_MEMORY has space."""
    if not SHARED_MEMORY.is_dir():
        return sys.maxsize
    each = _local_ranks() * PREFETCH * _batch_bytes(config, micro_batches)
    return int(shutil.disk_usage(SHARED_MEMORY).free / each)


def _batch_bytes(config: Config, micro_batches: int) -> float:
    return 4 * config.model.num_mel_bins * config.data.max_duration / FRAME_SHIFT / micro_batches


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def make_spec_augment(augment: AugmentConfig, epoch: int) -> SpecAugment:
    """Return SpecAugment for `epoch`, counted from 1."""
    warmup = min(1.0, epoch / augment.specaug_warmup_epochs) if augment.specaug_warmup_epochs else 1.0
    return SpecAugment(
        time_warp_factor=augment.time_warp_factor,
        num_feature_masks=augment.num_feature_masks,
        features_mask_size=augment.features_mask_size,
        num_frame_masks=augment.num_frame_masks,
        frames_mask_size=augment.frames_mask_size,
        max_frames_mask_fraction=augment.max_frames_mask_fraction,
        p=augment.p * warmup,
    )


class MicroBatch(NamedTuple):
    """The part of a global batch that one rank processes at a time."""

    cuts: np.ndarray
    """numbers of the cuts"""
    seed: tuple[int, ...]
    """of its augmentation: seed, epoch, batch, micro-batch"""


class TrainingDataset(Dataset[Batch]):
    """Loads micro-batches. Cuts that cannot be read, or whose features are not finite, are left out and named.

    If no cut of a micro-batch can be used, a later cut of the index replaces them: every rank takes part in every step.
    """

    MAX_SUBSTITUTES = 20
    """Cuts to try instead of an unreadable micro-batch, before the data are considered gone."""

    def __init__(self, index: CutIndex, features: FeatureLoader, spec_augment: SpecAugment | None, remedy: str) -> None:
        """`remedy`: what to do if nothing can be read."""
        self.index, self.features, self.spec_augment, self.remedy = index, features, spec_augment, remedy
        self.hdf5_fix = Hdf5MemoryIssueFix(reset_interval=100)

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        numbers = micro_batch.cuts.tolist()
        self.hdf5_fix.update()
        with seeded(*micro_batch.seed):
            try:
                batch = self._batch(numbers)
            except DataError:
                raise
            except Exception:  # readers of damaged files raise anything; which file it was is found below
                batch = None
        if batch is not None and bool(torch.isfinite(batch.x.sum())):  # takes less time than all of torch.isfinite
            return batch
        errors = {number: error for number in numbers if (error := self.load(number)[1])}
        if not errors and batch is not None:
            if torch.isfinite(batch.x).all():
                return batch
            errors = dict.fromkeys(numbers, "augmentation made its features infinite")
        good = [number for number in numbers if number not in errors] or [self._substitute(numbers[-1], errors)]
        with seeded(*micro_batch.seed):
            batch = self._batch(good)
            named = {self.index.cut_id(number): error for number, error in errors.items()}
            return batch._replace(errors={**named, **batch.errors})

    def load(self, number: int) -> tuple[Tensor, str]:
        """Return the features (T, C) of a cut without noise, and why they cannot be used ("" if they can)."""
        try:
            stored = self.index.stored(number)
            features = torch.from_numpy(stored.load() if stored else self.features.load(self.index.cut(number)))
        except Exception as error:  # readers of damaged files raise anything
            return torch.empty(0, 0), f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        return features, "" if torch.isfinite(features).all() else "its features are not finite"

    def _batch(self, numbers: Sequence[int]) -> Batch:
        index, noise = self.index, self.features.noise
        if noise:
            noise.errors.clear()
        numbers = sorted(numbers, key=index.seconds, reverse=True)
        utterances = [self._utterance(number) for number in numbers]
        x = padded(utterances)
        x_lens = [each.frames for each in utterances]
        if self.spec_augment is not None:
            segments = [(row, each.start, each.frames) for row, each in enumerate(utterances)]
            x = self.spec_augment(x, supervision_segments=torch.tensor(segments, dtype=torch.int32))
        y, y_lens = padded_labels([index.labels(number) for number in numbers])
        return Batch(
            x=long_enough(x),
            x_lens=torch.tensor(x_lens),
            y=y,
            y_lens=y_lens,
            texts=[],
            cut_ids=[index.cut_id(number) for number in numbers],
            durations=[index.seconds(number) for number in numbers],
            errors=dict(noise.errors) if noise else {},
        )

    def _utterance(self, number: int) -> Utterance:
        stored, noise = self.index.stored(number), self.features.noise
        if stored is None:
            return self.features.utterance(self.index.cut(number))
        feats = stored.load()
        if noise and self.index.kind:
            feats = noise.into_features(feats, self.index.kind, self.index.frame_shift)
        return Utterance(feats, 0, len(feats), stored.extra)

    def _substitute(self, number: int, errors: dict[int, str]) -> int:
        for step in range(1, self.MAX_SUBSTITUTES + 1):
            other = (number + step) % len(self.index)
            if not self.load(other)[1]:
                return other
        first, reason = next(iter(errors.items()))
        raise DataError(
            f"{self.index.cut_id(first)}: {reason}; nor can the {self.MAX_SUBSTITUTES} cuts after it be read. "
            f"{self.remedy}"
        )


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make all random numbers inside depend on `key` alone; the generators' states are restored afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
