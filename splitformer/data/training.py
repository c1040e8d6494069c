"""Training data: planned, augmented batches that can be resumed at any place and survive unreadable files."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.dataset import SpecAugment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from splitformer.config import AugmentConfig, Config, ConfigError
from splitformer.data.batches import Batch, SpeechDataset, cut_files, ignore_stop_signals, load_cuts, quiet_iterator
from splitformer.data.cut_index import CutIndex, DataError, TrainingFilter, index_cuts
from splitformer.data.features import fbank_options
from splitformer.data.noise import NoiseFilter, NoiseMixer
from splitformer.data.plan import EpochPlan, plan_epoch
from splitformer.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)
DEAD_WORKER = r"DataLoader worker .*(killed|exited)"
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


class TrainingData:
    """The training batches, in an order that depends on the seed and the epoch alone.

    A global batch has a number of micro-batches: one for each rank and for each of the batches whose gradients a rank
    accumulates. What augmentation draws depends on the micro-batch, not on the process that loads it.
    """

    def __init__(
        self,
        options: DataOptions,
        config: Config,
        tokenizer: Tokenizer,
        index_dir: Path,
        seed: int,
        progress: bool = False,
    ) -> None:
        """
        Args:
          index_dir: keeps the index of the cuts; that of the noise is beside it.
          progress: show a progress bar while the cuts are indexed.
        Raises:
          ConfigError: augment.noise_p without noise cuts, or noise cuts without it.
          DataError: too few utterances, or no noise, can be used.
        """
        if bool(config.augment.noise_p) != bool(options.noise_cuts):
            given = "--noise-cuts" if options.noise_cuts else "no --noise-cuts"
            raise ConfigError(
                f"augment.noise_p = {config.augment.noise_p} with {given} mixes nothing in: set augment.noise_p, such "
                "as 0.5, and give --noise-cuts FILE, which ./prepare.sh --musan-dir DIR makes; or neither"
            )
        self.options, self.config, self.tokenizer, self.seed = options, config, tokenizer, seed
        self.fbank_options = fbank_options(config) if options.on_the_fly else None
        self.index, self.report = index_cuts(
            load_cuts(options.train_cuts),
            cut_files(options.train_cuts),
            TrainingFilter(tokenizer, config.data, options.on_the_fly),
            index_dir,
            progress,
        )
        if self.report.kept < 2:
            raise DataError(f"{self.report.kept} utterances are left to train on:\n  {self.report}")
        self.num_buckets = max(1, min(config.data.num_buckets, self.report.kept // 20))
        self.steps_per_epoch = len(self.plan(epoch=1))
        """of the first epoch; later ones may differ by a few"""
        self.noise = self._noise_mixer(index_dir.with_name(f"{index_dir.name}-noise")) if options.noise_cuts else None

    def _noise_mixer(self, index_dir: Path) -> NoiseMixer:
        files, first = self.options.noise_cuts, self.index[0]
        kind, bins = (None, 0) if self.options.on_the_fly else (first.features.type, first.num_features)
        index, report = index_cuts(load_cuts(files), cut_files(files), NoiseFilter(kind, bins), index_dir)
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
        dataset = SpeechDataset(self.tokenizer, on_the_fly=self.fbank_options)
        problem = ""
        for number in np.linspace(0, len(self.index) - 1, min(max_cuts, len(self.index))).astype(int):
            cut = self.index[number]
            features, error = dataset.load(cut)
            if error:
                problem = f"{cut.id}: {error}"
                continue
            features = features.double()
            total = total + (features - features.mean(dim=0)).square().sum(dim=0)
            frames += features.size(0)
        if not frames:
            raise DataError(f"none of the features can be read; {problem}. {dataset.remedy}")
        return (total / frames).sqrt().clamp(min=1e-3).float()

    def plan(self, epoch: int) -> EpochPlan:
        """Return the global batches of `epoch`, counted from 1."""
        max_duration = self.config.data.max_duration
        return plan_epoch(self.index.durations, max_duration, self.num_buckets, self.seed, epoch)

    def batches(self, plan: EpochPlan, epoch: int, first: int, micro_batches: int, mine: range) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the global batches of `plan`, the plan of `epoch`.

        Args:
          first: number of the first global batch.
          micro_batches: how many micro-batches each global batch is divided into.
          mine: those of them that this rank takes.
        Raises:
          DataError: nothing can be read any more, or loading processes die again and again.
        """
        augment = self.config.augment
        transforms = [_spec_augment(augment, epoch)] if augment.p else []
        dataset = TrainingDataset(self.index, SpeechDataset(self.tokenizer, transforms, self.fbank_options, self.noise))
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
                num_workers=self.options.num_workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_stop_signals,
            )
            try:
                for batch in quiet_iterator(loader):
                    done += 1
                    yield batch
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                # a process that dies while it hands a batch over gives one of the latter two
                if isinstance(error, RuntimeError) and not re.search(DEAD_WORKER, str(error)):
                    raise
                restarts += 1
                if restarts > MAX_RESTARTS:
                    raise DataError(
                        f"loading processes died {restarts} times in this epoch, lastly: {error}. If memory ran out, "
                        "lower --num-workers or data.max_duration"
                    ) from error
                log.warning("%s; loading is started again where it stopped", error)


def _spec_augment(augment: AugmentConfig, epoch: int) -> SpecAugment:
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

    def __init__(self, index: CutIndex, speech: SpeechDataset) -> None:
        self.index, self.speech = index, speech

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        with seeded(*micro_batch.seed):
            cuts = [self.index[number] for number in micro_batch.cuts]
            try:
                batch = self.speech[cuts]
            except DataError:
                raise
            except Exception:  # readers of damaged files raise anything; which file it was is found below
                batch = None
        if batch is not None and bool(torch.isfinite(batch.x).all()):
            return batch
        errors = {cut.id: error for cut in cuts if (error := self.speech.load(cut)[1])}
        if not errors and batch is not None:
            errors = {cut.id: "augmentation made its features infinite" for cut in cuts}
        good = [cut for cut in cuts if cut.id not in errors] or [self._substitute(micro_batch.cuts[-1], errors)]
        with seeded(*micro_batch.seed):
            batch = self.speech[good]
            return batch._replace(errors={**errors, **batch.errors})

    def _substitute(self, number: int, errors: dict[str, str]) -> Cut:
        for step in range(1, self.MAX_SUBSTITUTES + 1):
            cut = self.index[(int(number) + step) % len(self.index)]
            if not self.speech.load(cut)[1]:
                return cut
        cut_id, reason = next(iter(errors.items()))
        raise DataError(
            f"{cut_id}: {reason}; nor can the {self.MAX_SUBSTITUTES} cuts after it be read. {self.speech.remedy}"
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
