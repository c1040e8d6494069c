"""The features of cuts: all stored frames of them, or features computed while a batch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lhotse import CutSet, Features
from lhotse.cut import Cut
from lhotse.dataset.input_strategies import PrecomputedFeatures
from lhotse.utils import LOG_EPSILON, compute_num_frames, fastcopy, supervision_to_frames
from torch import Tensor

from splitformer.data.features import FbankOptions, extract, load_samples, make_extractor
from splitformer.data.manifests import ManifestError, use_soundfile
from splitformer.model.subsampling import SAMPLING_RATE

if TYPE_CHECKING:
    from splitformer.data.noise import NoiseMixer

STORED_FRAMES = "stored_frames"
"""Custom field of cuts whose features have more frames than Lhotse counts from the duration."""


def with_features(cut: Cut, feats: np.ndarray, kind: str, frame_shift: float, storage: dict[str, Any]) -> Cut:
    """Return `cut` with a manifest of its features (T, C), which cover the whole cut.

    Args:
      kind: the extractor's name.
      frame_shift: seconds.
      storage: storage_type, storage_path and storage_key of `lhotse.Features`.
    """
    num_frames = compute_num_frames(cut.duration, frame_shift, SAMPLING_RATE)
    custom = {key: value for key, value in (cut.custom or {}).items() if key != STORED_FRAMES}
    if num_frames < feats.shape[0] <= num_frames + 1:
        custom[STORED_FRAMES] = feats.shape[0]
    else:
        num_frames = feats.shape[0]
    features = Features(
        recording_id=cut.recording.id if cut.has_recording else cut.features.recording_id,
        channels=cut.channel,
        start=cut.start,
        duration=cut.duration,
        type=kind,
        num_frames=num_frames,  # Lhotse rejects a manifest whose number differs from its own
        num_features=feats.shape[1],
        frame_shift=frame_shift,
        sampling_rate=SAMPLING_RATE,
        **storage,
    )
    return fastcopy(cut, features=features, custom=custom or None)


def extra_frames(cut: Cut) -> int:
    """Return how many stored frames Lhotse would not load, if the features are those of the whole cut; else 0."""
    stored = (getattr(cut, "custom", None) or {}).get(STORED_FRAMES)
    if stored is None or abs(cut.start - cut.features.start) > 1e-3:
        return 0
    return stored - cut.num_frames if abs(cut.duration - cut.features.duration) < 1e-3 else 0


def load_all_frames(cut: Cut) -> np.ndarray:
    """Return the stored features (T, C) of `cut`, with all frames that the front end computed."""
    return cut.features.load() if extra_frames(cut) else cut.load_features()


class AllFrames(PrecomputedFeatures):
    """Lhotse's input strategy for stored features, without its trimming to the number of frames that it counts.

    A front end that centres its windows often computes one frame more than Lhotse counts from a cut's duration.
    """

    def __call__(self, cuts: CutSet) -> tuple[Tensor, Tensor]:
        """Return features (N, T, C), padded with 0 if a cut has extra frames, and the number of frames (N,)."""
        if not any(map(extra_frames, cuts)):
            return super().__call__(cuts)[:2]
        feats = [torch.from_numpy(load_all_frames(cut)) for cut in cuts]
        return torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), torch.tensor([len(x) for x in feats])

    def supervision_intervals(self, cuts: CutSet) -> dict[str, Tensor]:
        intervals = super().supervision_intervals(cuts)
        cuts = list(cuts)
        for i, index in enumerate(intervals["sequence_idx"].tolist()):
            start, frames = intervals["start_frame"][i], intervals["num_frames"][i]
            if start + frames == cuts[index].num_frames:  # the transcript lasts to the end of the cut
                frames += extra_frames(cuts[index])
        return intervals


def supervised_frames(cut: Cut, counted: int, frames: int, frame_shift: float, rate: int) -> tuple[int, int]:
    """Return the first frame of the transcript and its number of frames.

    Args:
      counted: frames of the cut, as Lhotse counts them from the duration.
      frames: frames of its features.
      frame_shift: seconds.
      rate: samples per second.
    """
    start, num_frames = supervision_to_frames(cut.supervisions[0], frame_shift, rate, max_frames=counted)
    return start, num_frames + (frames - counted if start + num_frames == counted else 0)


def fitted(feats: np.ndarray, frames: int) -> np.ndarray:
    """Return the first `frames` frames of features (T, C). As in Lhotse, one that is missing repeats the last.

    Raises:
      ManifestError: more are missing.
    """
    if len(feats) == frames - 1:
        feats = np.concatenate((feats, feats[-1:]))
    if len(feats) < frames:
        raise ManifestError(f"there are {len(feats)} frames of features instead of {frames}")
    return feats[:frames]


class Utterance(NamedTuple):
    """The features of a cut, and the place of its transcript in them."""

    feats: np.ndarray
    """(T, C)"""
    start: int
    """first frame of the transcript"""
    frames: int
    """frames of the transcript"""
    extra: bool
    """one frame more than Lhotse counts from the duration"""


class FeatureLoader:
    """Computes the features of cuts, or loads them, and mixes noise in."""

    def __init__(self, options: FbankOptions | None = None, noise: NoiseMixer | None = None) -> None:
        """
        Args:
          options: compute features from audio with these options; None takes the stored features.
          noise: mixed into the audio, or into stored features.
        """
        self.options, self.noise = options, noise
        self.extractor = make_extractor(options) if options else None

    def load(self, cut: Cut, noise: NoiseMixer | None = None) -> np.ndarray:
        """Return the features (T, C) of `cut`, computed or stored."""
        if self.options and self.extractor:
            use_soundfile()  # here: every loading process has a backend of its own
            samples = load_samples(cut.resample(SAMPLING_RATE), self.options)
            return extract(self.extractor, [noise.into_audio(samples) if noise else samples])[0]
        feats = load_all_frames(cut)
        return noise.into_features(feats, cut.features.type, cut.frame_shift) if noise else feats

    def utterance(self, cut: Cut) -> Utterance:
        """Return the features of `cut`, with noise."""
        feats = self.load(cut, self.noise)
        if self.extractor:
            frame_shift, rate = self.extractor.frame_shift, SAMPLING_RATE
        else:
            frame_shift, rate = cut.frame_shift, cut.sampling_rate
        counted = compute_num_frames(cut.duration, frame_shift, rate)
        frames = counted + (len(feats) == counted + 1)
        start, num_frames = supervised_frames(cut, counted, frames, frame_shift, rate)
        return Utterance(fitted(feats, frames), start, num_frames, frames > counted)


def padded(utterances: Sequence[Utterance]) -> Tensor:
    """Return features (N, T, C), padded as `AllFrames` and Lhotse pad them."""
    frames = max(len(each.feats) for each in utterances)
    value = 0.0 if any(each.extra for each in utterances) else LOG_EPSILON
    x = torch.full((len(utterances), frames, utterances[0].feats.shape[1]), value)
    for row, each in zip(x, utterances, strict=True):
        row[: len(each.feats)] = torch.from_numpy(each.feats)
    return x
