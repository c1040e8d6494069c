"""Features that are made where the batches are: from audio, with noise mixed in, or both.

A transform of cuts puts their features into memory, so that whoever reads features sees no difference to stored ones.
"""

from __future__ import annotations

import io

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut

from splitformer.config import Config
from splitformer.data.features import (
    SAMPLING_RATE,
    FbankOptions,
    audio_of,
    extract,
    make_extractor,
    whole_features,
    with_features,
)
from splitformer.data.manifests import use_soundfile
from splitformer.data.noise import NoiseMixer


def options_on_the_fly(config: Config) -> FbankOptions:
    """What a configuration says of features; fbank is computed by Lhotse's program, as on any processor."""
    return FbankOptions("linear-mel" if config.data.features == "linear-mel" else "lhotse", config.model.num_mel_bins)


class FeaturesInMemory:
    """A transform of cuts for Lhotse's datasets: computes their features, or loads and changes them."""

    def __init__(self, options: FbankOptions | None, noise: NoiseMixer | None = None) -> None:
        """`options` say how features are computed from audio, None takes the stored ones; `noise` is mixed in: into
        audio where there is some, else into features."""
        self.options, self.noise = options, noise
        self.extractor = make_extractor(options) if options else None

    def __call__(self, cuts: CutSet) -> CutSet:
        return CutSet.from_cuts([self._one(cut) for cut in cuts])

    def _one(self, cut: Cut) -> Cut:
        if self.options and self.extractor:
            use_soundfile()  # here: each process of a loader has its own choice
            if cut.sampling_rate != SAMPLING_RATE:
                cut = cut.resample(SAMPLING_RATE)
            samples = audio_of(cut, self.options)
            if self.noise:
                samples = self.noise.into_audio(samples)
            feats = extract(self.extractor, [samples])[0]
            return with_features(cut, feats, self.extractor.name, self.extractor.frame_shift, _in_memory(feats))
        feats = whole_features(cut)
        kind, frame_shift = cut.features.type, cut.frame_shift
        if self.noise:
            feats = self.noise.into_features(feats, kind, frame_shift)
        return with_features(cut, feats, kind, frame_shift, _in_memory(feats))


def _in_memory(feats: np.ndarray) -> dict[str, str | bytes]:
    """Where Lhotse's reader of that name finds them."""
    stream = io.BytesIO()
    np.save(stream, feats, allow_pickle=False)
    return {"storage_type": "memory_npy", "storage_path": "", "storage_key": stream.getvalue()}
