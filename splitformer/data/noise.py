"""Mix noise, music and babble into the training speech, as icefall does with MUSAN (arXiv 1510.08484).

Noise is indexed like the training cuts, so a batch reads the windows of noise that it mixes in and no others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from lhotse.audio.mixer import AudioMixer
from lhotse.cut import Cut
from lhotse.features.base import get_extractor_type
from lhotse.features.mixer import FeatureMixer

from splitformer.data.cut_index import CutIndex, DataError
from splitformer.data.manifests import ManifestError
from splitformer.model.subsampling import SAMPLING_RATE

MAX_UNREADABLE = 20
"""Unreadable noise cuts in a row after which training ends."""


class NoiseFilter:
    """Keeps cuts that can be mixed into audio, or into features of one kind."""

    stored = False  # parts of them are cut out
    label_dtype = "u1"

    def __init__(self, kind: str | None, num_mel_bins: int) -> None:
        """`kind` is the type of the features; None: noise is mixed into audio."""
        self.kind, self.num_mel_bins = kind, num_mel_bins
        self.signature = ["noise", kind, num_mel_bins]

    def check(self, cut: Cut) -> tuple[str | None, Sequence[int]]:
        """Return the reason to drop `cut` (None: keep it), and no labels."""
        if self.kind is None:
            return (None if cut.has_recording else "no audio to mix into audio"), ()
        if not cut.has_features:
            return "no features to mix into stored features", ()
        given, wanted = (cut.features.type, cut.num_features), (self.kind, self.num_mel_bins)
        return (None if given == wanted else f"its features are {given}, those of the training cuts {wanted}"), ()


class NoiseMixer:
    """Mixes noise into some of the utterances. Draws from the module `random`, which the caller seeds.

    The noise covers the whole utterance: a stretch of one window, or several windows in a row. One gain for all of it
    makes the ratio of the energies over the utterance the one that was drawn, in audio and in features alike.
    """

    def __init__(self, index: CutIndex, p: float, snr: tuple[float, float]) -> None:
        """
        Args:
          index: the noise cuts.
          p: probability that an utterance is mixed with noise.
          snr: range of the signal-to-noise ratio in dB, drawn uniformly.
        """
        self.index, self.p, self.snr = index, p, snr
        self.errors: dict[str, str] = {}
        """{cut id: reason} of noise that could not be read"""

    def into_audio(self, samples: np.ndarray) -> np.ndarray:
        """Return samples (S,) at SAMPLING_RATE, with noise or unchanged."""
        snr = self._draw_snr()
        if snr is None:
            return samples
        noise = self._draw(len(samples), SAMPLING_RATE, lambda cut: cut.resample(SAMPLING_RATE).load_audio()[0])
        mixer = AudioMixer(samples[None], SAMPLING_RATE)
        mixer.add_to_mix(noise[None], snr=snr)
        return mixer.mixed_audio[0].astype(np.float32)

    def into_features(self, feats: np.ndarray, kind: str, frame_shift: float) -> np.ndarray:
        """Return features (T, C) of the extractor `kind`, with noise or unchanged.

        Energies are added. This leaves out the product of the two signals, whose mean is zero.
        """
        snr = self._draw_snr()
        if snr is None:
            return feats
        noise = self._draw(len(feats), 1 / frame_shift, lambda cut: cut.load_features())
        mixer = FeatureMixer(get_extractor_type(kind), feats, frame_shift)
        mixer.add_to_mix(noise, sampling_rate=SAMPLING_RATE, snr=snr)
        return mixer.mixed_feats.astype(np.float32)

    def _draw_snr(self) -> float | None:
        return random.uniform(*self.snr) if random.random() < self.p else None

    def _draw(self, length: int, rate: float, load: Callable[[Cut], np.ndarray]) -> np.ndarray:
        """Return `length` samples or frames of noise; `rate` is their number per second."""
        pieces: list[np.ndarray] = []
        drawn = unreadable = 0
        while drawn < length:
            cut = self.index.cut(random.randrange(len(self.index)))
            wanted = length / rate + 1.0  # a second to spare, for rounding
            if not pieces and cut.duration > wanted:
                cut = cut.truncate(offset=random.uniform(0.0, cut.duration - wanted), duration=wanted, preserve_id=True)
            try:
                piece = load(cut)
                if not len(piece) or not np.isfinite(piece).all():
                    raise ManifestError("it is empty, or not finite")
            except Exception as error:  # readers of damaged files raise anything
                self.errors[cut.id] = f"noise that cannot be read ({' '.join(str(error).split())[:300]})"
                unreadable += 1
                if unreadable == MAX_UNREADABLE:
                    raise DataError(
                        f"{unreadable} noise cuts in a row cannot be read, lastly {cut.id}: {error}. Were they moved "
                        "or removed? ./prepare.sh --musan-dir makes them"
                    ) from error
                continue
            unreadable = 0
            pieces.append(piece)
            drawn += len(piece)
        return np.concatenate(pieces)[:length]
