"""From cuts on disk to batches of features and labels, with Lhotse's datasets."""

from __future__ import annotations

import logging
import math
import random
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler, SpecAugment
from lhotse.dataset.input_strategies import PrecomputedFeatures
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from splitformer.config import AugmentConfig, ConfigError, DataConfig
from splitformer.data.cut_index import CutIndex, DataError, ScanReport, TrainingFilter, index_cuts
from splitformer.data.features import FbankOptions, more_frames, whole_features
from splitformer.data.manifests import read_cuts
from splitformer.data.noise import NoiseFilter, NoiseMixer, noise_mixer
from splitformer.data.on_the_fly import FeaturesInMemory
from splitformer.data.plan import EpochPlan, plan_epoch
from splitformer.data.shar import SharCuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.subsampling import MIN_FRAMES

log = logging.getLogger(__name__)

DEAD_WORKER = r"DataLoader worker .*(killed|exited)"
MAX_RESTARTS = 3
"""Times in an epoch that loading is started again after one of its processes died."""


TENSORS = ("x", "x_lens", "y", "y_lens")


class Batch(NamedTuple):
    x: Tensor
    """(N, T, C) features"""
    x_lens: Tensor
    """(N,) valid frames"""
    y: Tensor
    """(N, S) labels, padded with 0"""
    y_lens: Tensor
    """(N,) valid labels"""
    texts: list[str]
    cut_ids: list[str]
    durations: list[float]
    """seconds of audio of each, without padding"""
    faults: dict[str, str]
    """{cut id: reason} of those left out because they cannot be read"""

    @property
    def seconds(self) -> float:
        """Of all together."""
        return math.fsum(self.durations)

    def to(self, device: torch.device) -> Batch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS}
        return self._replace(**moved)


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


def load_cuts(paths: Iterable[str | Path]) -> CutSet:
    """The cuts of all files, read lazily; a folder is one in Lhotse's Shar format.

    Raises:
      ManifestError: a folder is in no such format.
      FileNotFoundError: a file is missing; the message says which stage makes it.
      UnsafeManifest: while it is read: a cut would run or fetch something.
    """
    sets = []
    for path in map(Path, paths):
        if path.is_dir():
            sets.append(CutSet(SharCuts(path)))
            continue
        if not path.is_file():
            raise FileNotFoundError(f"no cuts {path}: run prepare.sh, whose fbank stage writes them")
        sets.append(read_cuts(path))
    cuts = sets[0]
    for more in sets[1:]:
        cuts = cuts + more
    return cuts


def cut_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files that `load_cuts` reads."""
    return [file for path in map(Path, paths) for file in (SharCuts(path).files if path.is_dir() else [path])]


class WholeFeatures(PrecomputedFeatures):
    """Lhotse's reading of stored features, less its trimming.

    Lhotse counts the frames of a cut from its duration. A front end that centres its windows often makes one more, and
    Lhotse would cut that off; the encoder is to see what the front end computed.
    """

    def __call__(self, cuts: CutSet) -> tuple[Tensor, Tensor]:
        """(N, T, C) features, padded with 0 where one has more frames than Lhotse counts, and (N,) their frames."""
        if not any(map(more_frames, cuts)):
            return super().__call__(cuts)[:2]
        each = [torch.from_numpy(whole_features(cut)) for cut in cuts]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True), torch.tensor([len(x) for x in each])

    def supervision_intervals(self, cuts: CutSet) -> dict[str, Tensor]:
        intervals = super().supervision_intervals(cuts)
        cuts = list(cuts)
        for i, index in enumerate(intervals["sequence_idx"].tolist()):
            start, frames = intervals["start_frame"][i], intervals["num_frames"][i]
            if start + frames == cuts[index].num_frames:  # where the cut ends, the transcript does
                frames += more_frames(cuts[index])
        return intervals


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
        ramp = min(1.0, epoch / a.ramp_epochs) if a.ramp_epochs else 1.0
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


class UnusableError(ValueError):
    """A cut whose features cannot be used, and why."""


class BatchMaker:
    """A batch of cuts of one supervision each; runs where the data are loaded."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        transforms: list[Any],
        on_the_fly: FbankOptions | None = None,
        noise: NoiseMixer | None = None,
    ) -> None:
        """`transforms` are of features; `on_the_fly` and `noise` as in TrainingData."""
        self.tokenizer, self.noise = tokenizer, noise
        self.clean = FeaturesInMemory(on_the_fly) if on_the_fly else None
        self.features = WholeFeatures()
        self.dataset = K2SpeechRecognitionDataset(
            return_cuts=True,
            cut_transforms=[FeaturesInMemory(on_the_fly, noise)] if on_the_fly or noise else [],
            input_transforms=transforms,
            input_strategy=self.features,
        )

    @property
    def remedy(self) -> str:
        """What to do where nothing can be read."""
        if self.clean:
            return "Was the audio moved or removed? ./prepare.sh --stage manifests looks for it again"
        return "Were the features moved or removed? ./prepare.sh --stage fbank makes them"

    def load(self, cut: Cut) -> Tensor:
        """(T, C) features, without noise. Raises UnusableError."""
        try:
            cuts = CutSet.from_cuts([cut])
            features, _ = self.features(self.clean(cuts) if self.clean else cuts)
        except Exception as error:  # whatever a reader of damaged files raises
            reason = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            raise UnusableError(reason) from error
        if not bool(torch.isfinite(features).all()):
            raise UnusableError("its features are not finite")
        return features[0]

    def fault(self, cut: Cut) -> str | None:
        """Why the features of `cut` cannot be used, if they cannot."""
        try:
            self.load(cut)
        except UnusableError as error:
            return str(error)
        return None

    def __call__(self, cuts: Iterable[Cut]) -> Batch:
        if self.noise:
            self.noise.faults.clear()
        raw = self.dataset[cuts if isinstance(cuts, CutSet) else CutSet.from_cuts(cuts)]
        supervisions = raw["supervisions"]
        order = supervisions["sequence_idx"].argsort()  # rows of `inputs`, one supervision each
        texts = [supervisions["text"][i] for i in order.tolist()]
        cuts = [supervisions["cut"][i] for i in order.tolist()]
        labels = [torch.tensor(self.tokenizer.encode(text), dtype=torch.long) for text in texts]
        return Batch(
            x=_at_least_one_output_frame(raw["inputs"]),
            x_lens=supervisions["num_frames"][order].long(),
            y=torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
            y_lens=torch.tensor([len(label) for label in labels]),
            texts=texts,
            cut_ids=[cut.id for cut in cuts],
            durations=[cut.duration for cut in cuts],
            faults=dict(self.noise.faults) if self.noise else {},
        )


def evaluation_batches(
    cuts: CutSet,
    tokenizer: Tokenizer,
    max_duration: float | None,
    num_workers: int = 0,
    max_cuts: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """All cuts, in their order, unaugmented; none is dropped. Of several ranks each takes every so-manieth batch.

    A batch has up to `max_duration` seconds of audio, padding included, and up to `max_cuts` cuts.
    """
    sampler = SimpleCutSampler(cuts, max_duration=max_duration, max_cuts=max_cuts, shuffle=False, drop_last=False,
                               rank=0, world_size=1)  # fmt: skip
    every = EveryNth(sampler, rank, world_size)
    dataset = EvaluationBatches(BatchMaker(tokenizer, []))
    yield from DataLoader(dataset, sampler=every, batch_size=None, num_workers=num_workers)


class EveryNth(Sampler[CutSet]):
    """Of the batches of `sampler` those whose number is `rank` modulo `world_size`."""

    def __init__(self, sampler: SimpleCutSampler, rank: int, world_size: int) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size

    def __iter__(self) -> Iterator[CutSet]:
        for number, cuts in enumerate(self.sampler):
            if number % self.world_size == self.rank:
                yield cuts


class EvaluationBatches(Dataset[Batch]):
    def __init__(self, make: BatchMaker) -> None:
        self.make = make

    def __getitem__(self, cuts: CutSet) -> Batch:
        return self.make(cuts)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """All random numbers inside depend on `key` alone; those outside go on as if nothing had happened."""
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


def _at_least_one_output_frame(x: Tensor) -> Tensor:
    """Pad a batch of very short recordings, so that the front end's convolutions fit; their lengths stay."""
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
