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

from splitformer.config import AugmentConfig, DataConfig
from splitformer.data.cut_index import CutIndex, ScanReport, TrainingFilter, index_cuts
from splitformer.data.features import STORED_FRAMES
from splitformer.data.manifests import read_cuts
from splitformer.data.plan import EpochPlan, plan_epoch
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.subsampling import MIN_FRAMES

log = logging.getLogger(__name__)

DEAD_WORKER = r"DataLoader worker .*(killed|exited)"
MAX_RESTARTS = 3
"""Times in an epoch that loading is started again after one of its processes died."""


class DataError(RuntimeError):
    """Training data cannot be read; the message says what to do."""


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


def load_cuts(paths: Iterable[str | Path]) -> CutSet:
    """The cuts of all files, read lazily.

    Raises:
      FileNotFoundError: a file is missing; the message says which stage makes it.
      UnsafeManifest: while it is read: a cut would run or fetch something.
    """
    sets = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no cuts {path}: run prepare.sh, whose fbank stage writes them")
        sets.append(read_cuts(path))
    cuts = sets[0]
    for more in sets[1:]:
        cuts = cuts + more
    return cuts


class WholeFeatures(PrecomputedFeatures):
    """Lhotse's reading of stored features, less its trimming.

    Lhotse counts the frames of a cut from its duration. A front end that centres its windows often makes one more, and
    Lhotse would cut that off; the encoder is to see what the front end computed.
    """

    def __call__(self, cuts: CutSet) -> tuple[Tensor, Tensor]:
        """(N, T, C) features, padded with 0 where one has more frames than Lhotse counts, and (N,) their frames."""
        if not any(map(_more_frames, cuts)):
            return super().__call__(cuts)[:2]
        each = [torch.from_numpy(cut.features.load() if _more_frames(cut) else cut.load_features()) for cut in cuts]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True), torch.tensor([len(x) for x in each])

    def supervision_intervals(self, cuts: CutSet) -> dict[str, Tensor]:
        intervals = super().supervision_intervals(cuts)
        cuts = list(cuts)
        for i, index in enumerate(intervals["sequence_idx"].tolist()):
            start, frames = intervals["start_frame"][i], intervals["num_frames"][i]
            if start + frames == cuts[index].num_frames:  # where the cut ends, the transcript does
                frames += _more_frames(cuts[index])
        return intervals


def _more_frames(cut: Cut) -> int:
    """How many more frames are stored than Lhotse would load, where the features are those of the whole cut."""
    stored = (getattr(cut, "custom", None) or {}).get(STORED_FRAMES)
    if stored is None or abs(cut.start - cut.features.start) > 1e-3:
        return 0
    return stored - cut.num_frames if abs(cut.duration - cut.features.duration) < 1e-3 else 0


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
    ) -> None:
        """`folder` keeps the index of the cuts; `num_workers` processes load."""
        train_cuts = list(train_cuts)
        self.tokenizer, self.data, self.augment = tokenizer, data, augment
        self.seed, self.num_workers = seed, num_workers
        self.index: CutIndex
        self.report: ScanReport
        self.index, self.report = index_cuts(
            load_cuts(train_cuts), train_cuts, TrainingFilter(tokenizer, data), folder, progress
        )
        if self.report.kept < 2:
            raise ValueError(f"{self.report.kept} utterances are left to train on:\n  {self.report}")
        self.num_buckets = max(1, min(data.num_buckets, self.report.kept // 20))
        self.steps_per_epoch = len(self.plan(epoch=1))
        """of the first epoch; later ones may differ by a few"""

    def feature_deviation(self, max_cuts: int = 1000) -> Tensor:
        """(C,) deviation of the features around their utterance's mean, over so many cuts from all over the index."""
        total, frames, make = torch.zeros(()), 0, BatchMaker(self.tokenizer, [])
        for number in np.linspace(0, len(self.index) - 1, min(max_cuts, len(self.index))).astype(int):
            cut = self.index[number]
            if make.fault(cut):
                continue
            features = make.features(CutSet.from_cuts([cut]))[0][0].double()
            total = total + (features - features.mean(dim=0)).square().sum(dim=0)
            frames += features.size(0)
        if not frames:
            raise DataError(f"none of the features can be read; of {cut.id}: {make.fault(cut)}")
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
        dataset = TrainingShares(self.index, BatchMaker(self.tokenizer, [spec_augment] if a.p else []))
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
            except Exception:  # whatever a reader of damaged files raises; found out below which file
                batch = None
        if batch is not None and bool(torch.isfinite(batch.x).all()):
            return batch
        faults = {cut.id: fault for cut in cuts if (fault := self.make.fault(cut))}
        if not faults and batch is not None:
            faults = {cut.id: "augmentation made its features infinite" for cut in cuts}
        good = [cut for cut in cuts if cut.id not in faults] or [self._substitute(share.cuts[-1], faults)]
        with seeded(*share.seed):
            return self.make(good)._replace(faults=faults)

    def _substitute(self, number: int, faults: dict[str, str]) -> Cut:
        for step in range(1, self.SUBSTITUTES + 1):
            cut = self.index[(int(number) + step) % len(self.index)]
            if not self.make.fault(cut):
                return cut
        cut_id, reason = next(iter(faults.items()))
        raise DataError(
            f"{cut_id}: {reason}; nor can the {self.SUBSTITUTES} cuts after it be read. Were the features moved or "
            "removed? ./prepare.sh --stage fbank makes them"
        )


class BatchMaker:
    """A batch of cuts of one supervision each; runs where the data are loaded."""

    def __init__(self, tokenizer: Tokenizer, transforms: list[Any]) -> None:
        self.tokenizer = tokenizer
        self.features = WholeFeatures()
        self.dataset = K2SpeechRecognitionDataset(
            return_cuts=True, input_transforms=transforms, input_strategy=self.features
        )

    def fault(self, cut: Cut) -> str | None:
        """Why the features of `cut` cannot be used, if they cannot."""
        try:
            features, _ = self.features(CutSet.from_cuts([cut]))
        except Exception as error:  # whatever a reader of damaged files raises
            return f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        return None if bool(torch.isfinite(features).all()) else "its features are not finite"

    def __call__(self, cuts: Iterable[Cut]) -> Batch:
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
            faults={},
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
