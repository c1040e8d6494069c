"""Feature extractors: log-mel filterbanks (fbank), and the mel energies of the published code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lhotse import Fbank, FbankConfig, KaldifeatFbank, KaldifeatFbankConfig, Recording
from lhotse.cut import Cut
from lhotse.cut.data import DataCut
from lhotse.features import FeatureExtractor
from lhotse.features.base import register_extractor
from lhotse.features.kaldifeat import KaldifeatMelOptions
from lhotse.utils import is_module_available

from splitformer.config import Config
from splitformer.data.manifests import ManifestError, use_soundfile
from splitformer.errors import UserError
from splitformer.model.subsampling import SAMPLING_RATE

Extractor = Literal["lhotse", "kaldifeat", "linear-mel"]
EXTRACTOR_FOR: dict[str, Extractor] = {"fbank": "lhotse", "linear-mel": "linear-mel"}
"""Value of `data.features` in the configuration -> the extractor that computes these features on any machine."""
MIN_SAMPLES: dict[Extractor, int] = {"lhotse": 400, "kaldifeat": 400, "linear-mel": 513}
"""Fewest samples that give a frame: one analysis window of 25 ms. linear-mel mirrors half of its 1024 points at both
ends, which takes one sample more than that half."""


@dataclass(frozen=True)
class FbankOptions:
    """Parameters of the features.

    extractor: "lhotse" (lhotse.Fbank), "kaldifeat" (lhotse.KaldifeatFbank, the same features, on the GPU if there is
      one), or "linear-mel" (LinearMel), the front end of the published code.
    num_mel_bins: features per frame. Frames are 25 ms wide (20 ms for linear-mel), 10 ms apart.
    """

    extractor: Extractor = "lhotse"
    num_mel_bins: int = 80

    def __post_init__(self) -> None:
        if self.extractor not in MIN_SAMPLES:
            raise UserError(f"fbank {self.extractor!r}: choose one of {', '.join(MIN_SAMPLES)}")
        if self.extractor == "kaldifeat" and not is_module_available("kaldifeat"):
            raise UserError("kaldifeat is not installed (setup.sh builds it if there is a C++ compiler); "
                            "use --fbank lhotse")  # fmt: skip
        if self.extractor == "linear-mel" and not is_module_available("torchaudio"):
            raise UserError("--fbank linear-mel needs torchaudio, which is not installed: use the environment that "
                            "./setup.sh makes without --torch2")  # fmt: skip


def fbank_options(config: Config) -> FbankOptions:
    """Return the options that compute a model's features."""
    return FbankOptions(EXTRACTOR_FOR[config.data.features], config.model.num_mel_bins)


def features_of(cut: Cut) -> str | None:
    """Return the value of `data.features` that describes the stored features of `cut`, None without features."""
    if not cut.has_features:
        return None
    return "linear-mel" if cut.features.type == LinearMel.name else "fbank"


def check_features(cut: Cut, config: Config) -> None:
    """Raise ManifestError if the stored features of `cut` are not those that `config` describes."""
    kind = features_of(cut) if isinstance(cut, DataCut) else config.data.features  # others consist of several
    given, wanted = (kind, cut.num_features), (config.data.features, config.model.num_mel_bins)
    if given != wanted:
        raise ManifestError(
            f"{cut.id} has {given[0]} features of {given[1]} mel bins, but data.features is {wanted[0]} and "
            f"model.num_mel_bins is {wanted[1]}: change the conf, or make the features again (prepare.sh with --fbank "
            "and --num-mel-bins)"
        )


@dataclass
class LinearMelConfig:
    """The published code's numbers (arXiv 2506.18035): windows of 20 ms, padded to 1024 points, every 10 ms."""

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
    """Mel energies without a logarithm, as the published code computes them.

    torchaudio's Spectrogram (power 2), then its MelScale (HTK scale, 0 Hz to Nyquist). Windows are centred on their
    frame and the signal is mirrored at both ends. This gives samples // hop + 1 frames, often one more than Lhotse
    counts from the duration; `cut_features.AllFrames` keeps it.
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
        """Compute features (S // hop + 1, C) of samples (S,) or (1, S)."""
        if sampling_rate != self.config.sampling_rate:
            raise ValueError(f"linear-mel takes audio of {self.config.sampling_rate} Hz, not of {sampling_rate}")
        waveform = torch.as_tensor(samples, dtype=torch.float32).flatten()
        return self._transform(waveform).T.contiguous().numpy()

    @staticmethod
    def mix(features_a: np.ndarray, features_b: np.ndarray, energy_scaling_factor_b: float) -> np.ndarray:
        """Add the energies of two uncorrelated signals."""
        return features_a + energy_scaling_factor_b * features_b

    @staticmethod
    def compute_energy(features: np.ndarray) -> float:
        return float(np.sum(features))


def make_extractor(options: FbankOptions) -> FeatureExtractor:
    """Return Lhotse's extractor for 16 kHz.

    fbank has Lhotse's defaults: no dither, 20 Hz to 400 Hz below Nyquist, Povey windows, `snip_edges=False`.
    """
    if options.extractor == "lhotse":
        return Fbank(FbankConfig(sampling_rate=SAMPLING_RATE, num_filters=options.num_mel_bins))
    if options.extractor == "linear-mel":
        return LinearMel(LinearMelConfig(num_mel_bins=options.num_mel_bins))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return KaldifeatFbank(
        KaldifeatFbankConfig(mel_opts=KaldifeatMelOptions(num_bins=options.num_mel_bins), device=device)
    )


def extract(extractor: FeatureExtractor, waveforms: list[np.ndarray]) -> list[np.ndarray]:
    """Compute features (T, C) of each waveform (samples,). kaldifeat takes a batch, Lhotse one at a time."""
    if isinstance(extractor, KaldifeatFbank):
        tensors = [torch.from_numpy(each).to(extractor.device) for each in waveforms]
        # the inner extractor: Lhotse's wrapper stacks equal lengths and turns others into lists
        feats = extractor.extractor(tensors, chunk_size=extractor.config.chunk_size)
        return [each.cpu().numpy() for each in feats]
    return [extractor.extract(each, SAMPLING_RATE) for each in waveforms]


def load_samples(cut: Cut, options: FbankOptions) -> np.ndarray:
    """Return the samples (S,) of a cut, float32.

    Raises:
      ManifestError: there are too few samples for a frame, or some are not finite; a decoder may raise anything else.
    """
    samples = np.ascontiguousarray(cut.load_audio()[0], dtype=np.float32)
    if len(samples) < (least := MIN_SAMPLES[options.extractor]):
        raise ManifestError(f"{len(samples)} samples are less than one window of {least}")
    if not np.isfinite(samples).all():
        raise ManifestError(f"{int((~np.isfinite(samples)).sum())} of {len(samples)} samples are not finite")
    return samples


def fbank_of_file(path: str | Path, options: FbankOptions) -> torch.Tensor:
    """Return the features (T, C) of an audio file's first channel, resampled to 16 kHz if necessary.

    Raises:
      UserError: the file is missing, unreadable or too short.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no audio file {path}")
    use_soundfile()
    try:
        recording = Recording.from_file(path).resample(SAMPLING_RATE)
        samples = recording.load_audio(channels=recording.channel_ids[:1])[0]
    except Exception as error:  # every format has a reader with errors of its own
        raise UserError(f"{path} cannot be read as audio: {error}") from error
    if len(samples) < (least := MIN_SAMPLES[options.extractor]):
        raise UserError(f"{path} has {len(samples)} samples; a frame takes at least {least}")
    return torch.from_numpy(extract(make_extractor(options), [samples])[0])
