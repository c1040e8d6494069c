"""From cuts on disk to batches of features and labels, with Lhotse's datasets."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from lhotse.dataset.input_strategies import PrecomputedFeatures
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from splitformer.data.features import FbankOptions, more_frames, whole_features
from splitformer.data.manifests import read_cuts
from splitformer.data.noise import NoiseMixer
from splitformer.data.on_the_fly import FeaturesInMemory
from splitformer.data.shar import SharCuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.subsampling import MIN_FRAMES

DEAD_WORKER = r"DataLoader worker .*(killed|exited)"


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
