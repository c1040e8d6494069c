"""Acoustic features computed with torch alone, equal to those that training stores.

`Fbank` equals `lhotse.Fbank`, and `LinearMel` equals `splitformer.data.features.LinearMel` (torchaudio), both to
within float32 rounding; `tests/without_k2/test_fbank.py` compares them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from splitformer.errors import UserError
from splitformer.model.subsampling import SAMPLING_RATE

HOP = 160
"""Samples between two frames: 10 ms."""


class Fbank(nn.Module):
    """Kaldi's log-mel filterbank energies, (..., n) samples to (..., (n + 80) // 160, num_mel_bins).

    Povey windows of 25 ms, 512 FFT points, mel bins from 20 Hz to 7600 Hz, no dither. Frames are centred
    (`snip_edges=False`) and the signal is mirrored at both ends.
    """

    WINDOW, FFT, PREEMPHASIS = 400, 512, 0.97
    LOW_HZ, HIGH_HZ = 20.0, SAMPLING_RATE / 2 - 400.0
    min_samples = WINDOW
    """Shorter recordings have no features."""

    window: Tensor
    mel_bank: Tensor

    def __init__(self, num_mel_bins: int = 80) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(self.WINDOW, periodic=False).pow(0.85))
        low, high = (1127.0 * np.log(1 + hz / 700) for hz in (self.LOW_HZ, self.HIGH_HZ))
        # float32 as in Lhotse: a mel value of 2800 rounds by 1e-4, which moves the filters' edges
        edges = low + torch.arange(num_mel_bins + 2) * ((high - low) / (num_mel_bins + 1))
        frequencies = SAMPLING_RATE / self.FFT * np.arange(self.FFT // 2, dtype=np.float32)
        bank = _triangles(torch.from_numpy(1127.0 * np.log(1 + frequencies / 700)), edges)
        self.register_buffer("mel_bank", nn.functional.pad(bank, (0, 0, 0, 1)))  # nothing at the Nyquist frequency

    def forward(self, samples: Tensor) -> Tensor:
        length = samples.shape[-1]
        frames = (length + HOP // 2) // HOP
        left = (self.WINDOW - HOP) // 2
        right = (frames - 1) * HOP + self.WINDOW - length - left
        padded = torch.cat([samples[..., :left].flip(-1), samples, samples[..., -right:].flip(-1)], dim=-1)
        x = padded.unfold(-1, self.WINDOW, HOP)
        x = x - x.mean(dim=-1, keepdim=True)
        x = x - self.PREEMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        power = torch.fft.rfft(x * self.window, n=self.FFT).abs() ** 2
        return (power @ self.mel_bank).clamp(min=torch.finfo(torch.float32).eps).log()


class LinearMel(nn.Module):
    """Mel energies without a logarithm, (..., n) samples to (..., n // 160 + 1, num_mel_bins).

    The front end of the published code (arXiv 2506.18035): Hann windows of 20 ms, 1024 FFT points, HTK mel bins from
    0 Hz to 8000 Hz.
    """

    WINDOW, FFT = 320, 1024
    min_samples = FFT // 2 + 1
    """The signal is mirrored at both ends by half the FFT points, which needs one sample more."""

    window: Tensor
    mel_bank: Tensor

    def __init__(self, num_mel_bins: int = 80) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(self.WINDOW))
        highest = 2595.0 * np.log10(1 + SAMPLING_RATE / 2 / 700)
        edges = 700.0 * (10.0 ** (torch.linspace(0.0, highest, num_mel_bins + 2) / 2595.0) - 1.0)
        self.register_buffer("mel_bank", _triangles(torch.linspace(0, SAMPLING_RATE // 2, self.FFT // 2 + 1), edges))

    def forward(self, samples: Tensor) -> Tensor:
        spectrum = torch.stft(samples, self.FFT, HOP, self.WINDOW, self.window, return_complex=True)
        return spectrum.abs().pow(2).transpose(-1, -2) @ self.mel_bank


FRONT_ENDS: dict[str, type[Fbank] | type[LinearMel]] = {"lhotse": Fbank, "kaldifeat": Fbank, "linear-mel": LinearMel}
"""Front ends by the names that `--fbank` has in every command; lhotse and kaldifeat compute the same features."""


def front_end(name: str, num_mel_bins: int) -> Fbank | LinearMel:
    """Return the front end of this name; raise UserError if there is none."""
    if name not in FRONT_ENDS:
        raise UserError(f"fbank {name!r}: choose one of {', '.join(FRONT_ENDS)}")
    return FRONT_ENDS[name](num_mel_bins)


def _triangles(frequencies: Tensor, edges: Tensor) -> Tensor:
    """Return (F, bins) weights of triangular filters between `edges` (bins + 2,), at `frequencies` (F,)."""
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    at = frequencies.unsqueeze(1)
    return torch.minimum((at - left) / (centre - left), (right - at) / (right - centre)).clamp(min=0.0)
