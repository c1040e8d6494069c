"""From cuts on disk to batches of features and labels, with Lhotse's samplers and datasets."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset, SimpleCutSampler, SpecAugment
from lhotse.dataset.input_strategies import PrecomputedFeatures
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from splitformer.config import AugmentConfig, DataConfig
from splitformer.data.features import STORED_FRAMES
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.subsampling import MIN_FRAMES, subsampled_lengths


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

    @property
    def seconds(self) -> float:
        """Of all together."""
        return math.fsum(self.durations)

    def to(self, device: torch.device) -> Batch:
        return self._replace(**{name: getattr(self, name).to(device) for name in ("x", "x_lens", "y", "y_lens")})


def load_cuts(paths: Iterable[str | Path]) -> CutSet:
    """The cuts of all files, read lazily.

    Raises:
      FileNotFoundError: a file is missing; the message says which stage makes it.
    """
    sets = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no cuts {path}: run prepare.sh, whose fbank stage writes them")
        sets.append(CutSet.from_jsonl_lazy(path))
    cuts = sets[0]
    for more in sets[1:]:
        cuts = cuts + more
    return cuts


@dataclass
class ScanReport:
    """What a pass over the training manifests found."""

    kept: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """one cut id per reason"""

    def __str__(self) -> str:
        lines = [f"{self.kept} utterances, {self.seconds / 3600:.2f} hours"]
        lines += [f"dropped {n}: {why} (such as {self.examples[why]})" for why, n in sorted(self.dropped.items())]
        return "\n  ".join(lines)


class TrainingFilter:
    """Says why a cut must not be trained on; picklable, so that samplers may carry it."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def reason(self, cut: Cut) -> str | None:
        """Why `cut` is dropped; None where it is kept."""
        if len(cut.supervisions) != 1:
            return f"{len(cut.supervisions)} supervisions instead of one"
        text = (cut.supervisions[0].text or "").strip()
        if not text:
            return "empty transcript"
        if cut.duration < self.config.min_utterance_seconds:
            return f"shorter than data.min_utterance_seconds = {self.config.min_utterance_seconds}"
        if cut.duration > self.config.max_utterance_seconds:
            return f"longer than data.max_utterance_seconds = {self.config.max_utterance_seconds}"
        if unknown := self.tokenizer.unknown_characters(text):
            return f"transcript has characters that the tokens lack: {' '.join(sorted(unknown))}"
        labels = self.tokenizer.encode(text)
        frames = int(subsampled_lengths(torch.tensor([cut.num_frames])))
        if frames < ctc_min_frames(labels):
            return "more labels than output frames"
        return None

    def __call__(self, cut: Cut) -> bool:
        return self.reason(cut) is None


def ctc_min_frames(labels: Sequence[int]) -> int:
    """Fewest frames of a CTC alignment: one a label, and a blank between two equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def scan_cuts(cuts: CutSet, keep: TrainingFilter, progress: bool = False) -> ScanReport:
    """One streaming pass over `cuts`: what is kept, and what is dropped for which reason."""
    report = ScanReport()
    for cut in tqdm(cuts, desc="scanning cuts", unit="cut", disable=None if progress else True, leave=False):
        reason = keep.reason(cut)
        if reason is None:
            report.kept += 1
            report.seconds += cut.duration
        else:
            report.dropped[reason] += 1
            report.examples.setdefault(reason, cut.id)
    return report


def feature_deviation(cuts: CutSet, max_cuts: int = 1000) -> Tensor:
    """(C,) deviation of the features around their utterance's mean, over the first `max_cuts` cuts."""
    total, frames = torch.zeros(()), 0
    for cut in cuts.subset(first=max_cuts):
        features = torch.from_numpy(cut.load_features()).double()
        total = total + (features - features.mean(dim=0)).square().sum(dim=0)
        frames += features.size(0)
    return (total / frames).sqrt().clamp(min=1e-3).float()


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


class TrainingData:
    """Batches of one rank's share of the training cuts, in an order that depends on the seed and the epoch alone."""

    def __init__(
        self,
        cuts: CutSet,
        tokenizer: Tokenizer,
        data: DataConfig,
        augment: AugmentConfig,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = False,
    ) -> None:
        keep = TrainingFilter(tokenizer, data)
        self.tokenizer, self.augment, self.num_workers = tokenizer, augment, num_workers
        self.report = scan_cuts(cuts, keep, progress)
        if self.report.kept < 2:
            raise ValueError(f"{self.report.kept} utterances are left to train on:\n  {self.report}")
        self.cuts = cuts.filter(keep)
        self.sampler_options: dict[str, Any] = {
            "max_duration": data.max_duration / world_size,
            "num_buckets": max(2, min(data.num_buckets, self.report.kept // 20)),
            "shuffle": True,
            "drop_last": False,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
        }
        self.steps_per_epoch = sum(1 for _ in self._sampler(epoch=1))
        """counted for the first epoch; later ones may differ by a few"""

    def _sampler(self, epoch: int) -> DynamicBucketingSampler:
        sampler = DynamicBucketingSampler(self.cuts, **self.sampler_options)
        sampler.set_epoch(epoch)
        return sampler

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of `epoch`, counted from 1; seed torch before the call for repeatable masks."""
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
        transforms = [spec_augment] if a.p else []
        dataset = K2SpeechRecognitionDataset(
            return_cuts=True, input_transforms=transforms, input_strategy=WholeFeatures()
        )
        return _batches(dataset, self._sampler(epoch), self.tokenizer, self.num_workers)


def evaluation_batches(
    cuts: CutSet, tokenizer: Tokenizer, max_duration: float | None, num_workers: int = 0, max_cuts: int | None = None
) -> Iterator[Batch]:
    """All cuts, in their order, unaugmented; none is dropped.

    A batch has up to `max_duration` seconds of audio, padding included, and up to `max_cuts` cuts.
    """
    sampler = SimpleCutSampler(cuts, max_duration=max_duration, max_cuts=max_cuts, shuffle=False, drop_last=False)
    dataset = K2SpeechRecognitionDataset(return_cuts=True, input_strategy=WholeFeatures())
    return _batches(dataset, sampler, tokenizer, num_workers)


def _batches(dataset: Any, sampler: Any, tokenizer: Tokenizer, num_workers: int) -> Iterator[Batch]:
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=num_workers)
    for raw in loader:
        supervisions = raw["supervisions"]
        order = supervisions["sequence_idx"].argsort()  # rows of `inputs`, one supervision each
        texts = [supervisions["text"][i] for i in order.tolist()]
        cuts = [supervisions["cut"][i] for i in order.tolist()]
        labels = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in texts]
        yield Batch(
            x=_at_least_one_output_frame(raw["inputs"]),
            x_lens=supervisions["num_frames"][order].long(),
            y=torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
            y_lens=torch.tensor([len(label) for label in labels]),
            texts=texts,
            cut_ids=[cut.id for cut in cuts],
            durations=[cut.duration for cut in cuts],
        )


def _at_least_one_output_frame(x: Tensor) -> Tensor:
    """Pad a batch of very short recordings, so that the front end's convolutions fit; their lengths stay."""
    return torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
