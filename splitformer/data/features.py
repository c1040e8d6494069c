"""Mel filterbank features (fbank): computed in parallel, stored in shards, continued after a fault; or none at all.

A shard is a folder with the features of SHARD_CUTS consecutive cuts and their manifest. It is written under a
temporary name and moved into place when complete, so that a run that was killed, or met a full disk, goes on
where it stopped; and the result does not depend on the number of jobs. Cuts without features (`write_audio_cuts`) are
for training that computes them as it goes: `on_the_fly` does so by the same functions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import (
    Fbank,
    FbankConfig,
    Features,
    KaldifeatFbank,
    KaldifeatFbankConfig,
    Recording,
)
from lhotse.cut import Cut
from lhotse.features import FeatureExtractor
from lhotse.features.base import register_extractor
from lhotse.features.kaldifeat import KaldifeatMelOptions
from lhotse.utils import compute_num_frames, fastcopy, is_module_available

from splitformer.data.manifests import ManifestError, use_soundfile
from splitformer.model.subsampling import FRAME_SHIFT, SAMPLING_RATE

EXTRACTORS = ("lhotse", "kaldifeat", "linear-mel")
"""Of these the first two compute the same, on a CPU and on a GPU."""
STORED_FRAMES = "stored_frames"
"""Custom field of cuts that have another number of stored frames than Lhotse counts from the duration."""
MIN_SAMPLES = {"lhotse": 400, "kaldifeat": 400, "linear-mel": 513}
"""Less audio has no frame: one analysis window of 25 ms; for linear-mel, which mirrors half of its 1024 points at both
ends, one sample more than that half."""


@dataclass(frozen=True)
class FbankOptions:
    """What determines the features.

    extractor: "lhotse" (lhotse.Fbank), "kaldifeat" (lhotse.KaldifeatFbank, on the GPU where there is one), or
      "linear-mel" (LinearMel), the front end of the authors' released code.
    num_mel_bins: features per frame; frames are 25 ms wide (those of linear-mel 20), 10 ms apart.
    strict: unreadable audio is fatal, not skipped.
    """

    extractor: str = "lhotse"
    num_mel_bins: int = 80
    strict: bool = False

    def __post_init__(self) -> None:
        if self.extractor not in EXTRACTORS:
            raise ValueError(f"fbank {self.extractor!r}: choose one of {', '.join(EXTRACTORS)}")
        if self.extractor == "kaldifeat" and not is_module_available("kaldifeat"):
            raise ValueError("kaldifeat is not installed (setup.sh builds it where there is a C++ compiler); "
                             "use --fbank lhotse")  # fmt: skip
        if self.extractor == "linear-mel" and not is_module_available("torchaudio"):
            raise ValueError("--fbank linear-mel is torchaudio's Spectrogram and MelScale, and torchaudio is not "
                             "installed: use the environment that ./setup.sh makes without --torch2")  # fmt: skip


@dataclass
class LinearMelConfig:
    """The released code's numbers (arXiv 2506.18035): windows of 20 ms, padded to 1024 points, every 10 ms."""

    sampling_rate: int = SAMPLING_RATE
    n_fft: int = 1024
    win_length: int = 320
    hop_length: int = 160
    num_mel_bins: int = 80

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LinearMelConfig:
        return LinearMelConfig(**data)


@register_extractor
class LinearMel(FeatureExtractor):
    """Mel energies without logarithm: torchaudio's Spectrogram (power 2), then its MelScale (HTK's scale, 0 Hz to
    Nyquist), as the authors' released code computes them.

    Windows are centred on their frame and the signal is mirrored at both ends, so that there are samples // hop + 1
    frames, often one more than Lhotse counts from the duration: `datamodule.WholeFeatures` keeps it.
    """

    name = "linear-mel"
    config_type = LinearMelConfig

    def __init__(self, config: LinearMelConfig | None = None) -> None:
        super().__init__(config)
        from torchaudio.transforms import MelScale, Spectrogram  # not in every environment, see FbankOptions

        c = self.config
        self._transform = torch.nn.Sequential(
            Spectrogram(n_fft=c.n_fft, win_length=c.win_length, hop_length=c.hop_length, power=2.0),
            MelScale(sample_rate=c.sampling_rate, n_mels=c.num_mel_bins, n_stft=c.n_fft // 2 + 1),
        )

    @property
    def frame_shift(self) -> float:
        return self.config.hop_length / self.config.sampling_rate

    def feature_dim(self, sampling_rate: int) -> int:
        return self.config.num_mel_bins

    def extract(self, samples: np.ndarray | torch.Tensor, sampling_rate: int) -> np.ndarray:
        """Samples (S,) or (1, S) to features (S // hop + 1, C)."""
        if sampling_rate != self.config.sampling_rate:
            raise ValueError(f"linear-mel takes audio of {self.config.sampling_rate} Hz, not of {sampling_rate}")
        waveform = torch.as_tensor(samples, dtype=torch.float32).flatten()
        return self._transform(waveform).T.contiguous().numpy()

    @staticmethod
    def mix(features_a: np.ndarray, features_b: np.ndarray, energy_scaling_factor_b: float) -> np.ndarray:
        """Energies add up, where the signals have nothing to do with each other."""
        return features_a + energy_scaling_factor_b * features_b

    @staticmethod
    def compute_energy(features: np.ndarray) -> float:
        return float(np.sum(features))


def make_extractor(options: FbankOptions) -> FeatureExtractor:
    """Lhotse's defaults (no dither, 20 Hz to 400 Hz below Nyquist, povey window, no cut edges), at 16 kHz."""
    if options.extractor == "lhotse":
        return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_filters=options.num_mel_bins))
    if options.extractor == "linear-mel":
        return LinearMel(LinearMelConfig(num_mel_bins=options.num_mel_bins))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return KaldifeatFbank(
        KaldifeatFbankConfig(mel_opts=KaldifeatMelOptions(num_bins=options.num_mel_bins), device=device)
    )


def audio_of(cut: Cut, options: FbankOptions) -> np.ndarray:
    """(S,) float32 samples of a cut at SAMPLING_RATE.

    Raises:
      ManifestError: too few samples for a frame, or samples that are not finite; and whatever a decoder raises.
    """
    samples = np.ascontiguousarray(cut.load_audio()[0], dtype=np.float32)
    if len(samples) < (least := MIN_SAMPLES[options.extractor]):
        raise ManifestError(f"{len(samples)} samples are less than one window of {least}")
    if not np.isfinite(samples).all():
        raise ManifestError(f"{int((~np.isfinite(samples)).sum())} of {len(samples)} samples are not finite")
    return samples


def with_features(cut: Cut, feats: np.ndarray, kind: str, frame_shift: float, storage: dict[str, Any]) -> Cut:
    """The cut with the manifest of its features (T, C), which are those of the whole cut.

    Args:
      kind: the extractor's name.  frame_shift: seconds.
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
        num_frames=num_frames,  # Lhotse refuses a manifest with another number than its own
        num_features=feats.shape[1],
        frame_shift=frame_shift,
        sampling_rate=SAMPLING_RATE,
        **storage,
    )
    return fastcopy(cut, features=features, custom=custom or None)


def more_frames(cut: Cut) -> int:
    """How many more frames are stored than Lhotse would load, where the features are those of the whole cut."""
    stored = (getattr(cut, "custom", None) or {}).get(STORED_FRAMES)
    if stored is None or abs(cut.start - cut.features.start) > 1e-3:
        return 0
    return stored - cut.num_frames if abs(cut.duration - cut.features.duration) < 1e-3 else 0


def whole_features(cut: Cut) -> np.ndarray:
    """(T, C) stored features of a cut, with all frames that the front end made of it."""
    return cut.features.load() if more_frames(cut) else cut.load_features()


def extract(extractor: FeatureExtractor, waveforms: list[np.ndarray]) -> list[np.ndarray]:
    """Features (T, C) of each waveform (samples,). kaldifeat takes one batch, Lhotse one at a time."""
    if isinstance(extractor, KaldifeatFbank):
        tensors = [torch.from_numpy(each).to(extractor.device) for each in waveforms]
        # the inner extractor: Lhotse's wrapper stacks equal lengths and turns others into lists
        feats = extractor.extractor(tensors, chunk_size=extractor.config.chunk_size)
        return [each.cpu().numpy() for each in feats]
    return [extractor.extract(each, SAMPLING_RATE) for each in waveforms]


def fbank_of_file(path: str | Path, options: FbankOptions) -> torch.Tensor:
    """(T, C) features of an audio file's first channel, resampled where need be.

    Raises:
      FileNotFoundError, ValueError: no such file, or none that can be read as audio.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no audio file {path}")
    use_soundfile()
    try:
        recording = Recording.from_file(path)
        if recording.sampling_rate != SAMPLING_RATE:
            recording = recording.resample(SAMPLING_RATE)
        samples = recording.load_audio(channels=recording.channel_ids[:1])[0]
    except Exception as error:  # each format has a reader with errors of its own
        raise ValueError(f"{path} cannot be read as audio: {error}") from error
    if len(samples) < (least := MIN_SAMPLES[options.extractor]):
        raise ValueError(f"{path} has {len(samples)} samples; {least} are the fewest for a frame")
    return torch.from_numpy(extract(make_extractor(options), [samples])[0])
