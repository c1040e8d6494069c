"""Noise, music and babble under the training speech, as icefall mixes MUSAN in (arXiv 1510.08484).

Prepared, noise is a split like any other: recordings, and windows of some seconds in the place of supervisions. In
training, windows are drawn by number from an index, so that a batch reads those that it mixes in and no others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lhotse import CutSet
from lhotse.audio.mixer import AudioMixer
from lhotse.cut import Cut
from lhotse.features.base import get_extractor_type
from lhotse.features.mixer import FeatureMixer

from splitformer.data.cut_index import CutIndex, DataError, index_cuts
from splitformer.data.features import SAMPLING_RATE
from splitformer.data.manifests import ManifestError

TRIES = 20
"""Windows that may be unreadable one after the other."""


# ---------------------------------------------------------------------------------------------- training


class NoiseFilter:
    """Says which cuts can be mixed in: into audio, or into features of one kind."""

    def __init__(self, kind: str | None, num_mel_bins: int) -> None:
        """`kind` is that of the features, None: noise is mixed into audio."""
        self.kind, self.num_mel_bins = kind, num_mel_bins
        self.signature = ["noise", kind, num_mel_bins]

    def check(self, cut: Cut) -> tuple[str | None, int]:
        """Why `cut` is dropped, None where it is kept; and 0 labels."""
        if self.kind is None:
            return (None if cut.has_recording else "no audio to mix into audio"), 0
        if not cut.has_features:
            return "no features to mix into stored features", 0
        has, wanted = (cut.features.type, cut.num_features), (self.kind, self.num_mel_bins)
        return (None if has == wanted else f"its features are {has}, those of the training cuts {wanted}"), 0


class NoiseMixer:
    """Mixes noise into some of the utterances; draws by the module `random`, which the caller has seeded.

    The noise covers the whole utterance: a stretch of a window, or several windows one after the other. One gain for
    all of it makes the ratio of the energies over the utterance what was drawn, in audio and in features alike.
    """

    def __init__(self, index: CutIndex, p: float, snr: tuple[float, float]) -> None:
        """`p`: probability for each utterance; `snr`: decibels, from and to, drawn evenly."""
        self.index, self.p, self.snr = index, p, snr
        self.faults: dict[str, str] = {}
        """{cut id: reason} of the noise that could not be read"""

    def into_audio(self, samples: np.ndarray) -> np.ndarray:
        """(S,) samples at SAMPLING_RATE, with noise or as they are."""
        snr = self._draw_snr()
        if snr is None:
            return samples
        noise = self._draw(len(samples), SAMPLING_RATE, _audio)
        mixer = AudioMixer(samples[None], SAMPLING_RATE)
        mixer.add_to_mix(noise[None], snr=snr)
        return mixer.mixed_audio[0].astype(np.float32)

    def into_features(self, feats: np.ndarray, kind: str, frame_shift: float) -> np.ndarray:
        """(T, C) features that the extractor of the name `kind` made, with noise or as they are.

        Energies are added: that of a sum of two signals, but for the product of the two, which has no mean.
        """
        snr = self._draw_snr()
        if snr is None:
            return feats
        noise = self._draw(len(feats), 1 / frame_shift, _features)
        mixer = FeatureMixer(get_extractor_type(kind), feats, frame_shift)
        mixer.add_to_mix(noise, sampling_rate=SAMPLING_RATE, snr=snr)
        return mixer.mixed_feats.astype(np.float32)

    def _draw_snr(self) -> float | None:
        return random.uniform(*self.snr) if random.random() < self.p else None

    def _draw(self, length: int, rate: float, load: Callable[[Cut], np.ndarray]) -> np.ndarray:
        """`length` items of noise, samples or frames, of which a second has `rate`."""
        pieces: list[np.ndarray] = []
        found = unreadable = 0
        while found < length:
            cut = self.index[random.randrange(len(self.index))]
            wanted = length / rate + 1.0  # a second to spare, for rounding
            if not pieces and cut.duration > wanted:
                cut = cut.truncate(offset=random.uniform(0.0, cut.duration - wanted), duration=wanted, preserve_id=True)
            try:
                piece = load(cut)
                if not len(piece) or not np.isfinite(piece).all():
                    raise ManifestError("it is empty, or not finite")
            except Exception as error:  # whatever a reader of damaged files raises
                self.faults[cut.id] = f"noise that cannot be read ({' '.join(str(error).split())[:300]})"
                unreadable += 1
                if unreadable == TRIES:
                    raise DataError(
                        f"{TRIES} noise cuts in a row cannot be read, lastly {cut.id}: {error}. Were they moved or "
                        "removed? ./prepare.sh --musan-dir makes them"
                    ) from error
                continue
            unreadable = 0
            pieces.append(piece)
            found += len(piece)
        return np.concatenate(pieces)[:length]


def _audio(cut: Cut) -> np.ndarray:
    if cut.sampling_rate != SAMPLING_RATE:
        cut = cut.resample(SAMPLING_RATE)
    return cut.load_audio()[0]


def _features(cut: Cut) -> np.ndarray:
    return cut.load_features()


def noise_mixer(
    cuts: CutSet, sources: list[Path], keep: NoiseFilter, folder: Path, p: float, snr: tuple[float, float]
) -> NoiseMixer:
    """The mixer of the noise cuts that `keep` keeps; `folder` keeps their index.

    Raises:
      ValueError: none is left.
    """
    index, report = index_cuts(cuts, sources, keep, folder)
    if not report.kept:
        raise ValueError(
            f"no noise in {', '.join(map(str, sources))} can be mixed in ({report}): ./prepare.sh --musan-dir makes "
            "such that can, with the --fbank, --num-mel-bins and --on-the-fly of the training data"
        )
    return NoiseMixer(index, p, snr)
