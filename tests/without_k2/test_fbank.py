"""Features that are computed with torch alone are those that training stores; so is audio that is resampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import Fbank as LhotseFbank
from lhotse import FbankConfig
from lhotse.augmentation import get_or_create_resampler

from splitformer.errors import UserError
from splitformer.speech.audio import resample_blocks
from splitformer.speech.fbank import Fbank, LinearMel, front_end
from tests.factories import tone_speech

LENGTHS = [1, 79, 80, 81, 120, 159, 160, 239, 240, 241, 4321, 15600]
"""Samples after the shortest recording: around every place at which the number of frames changes."""


def speech() -> np.ndarray:
    return tone_speech("ABC DEFGH AB", np.random.default_rng(0)).astype(np.float32)


def lhotse_features(samples: np.ndarray, num_mel_bins: int) -> np.ndarray:
    return LhotseFbank(FbankConfig(num_filters=num_mel_bins)).extract(samples, 16000)


def released_features(samples: np.ndarray, num_mel_bins: int) -> np.ndarray:
    transforms = pytest.importorskip("torchaudio.transforms")
    spectrogram = transforms.Spectrogram(n_fft=1024, win_length=320, hop_length=160, power=2.0)
    mel_scale = transforms.MelScale(n_mels=num_mel_bins, sample_rate=16000, n_stft=513)
    return mel_scale(spectrogram(torch.from_numpy(samples))).T.numpy()


def blocks(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


@pytest.mark.parametrize("num_mel_bins", [80, 40, 20])
@pytest.mark.parametrize("more", LENGTHS)
def test_fbank_equals_lhotse(more: int, num_mel_bins: int) -> None:
    samples = speech()[1000 : 1399 + more]
    features = Fbank(num_mel_bins)(torch.from_numpy(samples)).numpy()
    np.testing.assert_allclose(features, lhotse_features(samples, num_mel_bins), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_mel_bins", [80, 40, 20])
@pytest.mark.parametrize("more", LENGTHS)
def test_linear_mel_equals_torchaudio(more: int, num_mel_bins: int) -> None:
    samples = speech()[1000 : 1512 + more]
    features = LinearMel(num_mel_bins)(torch.from_numpy(samples)).numpy()
    np.testing.assert_allclose(features, released_features(samples, num_mel_bins), atol=1e-7, rtol=1e-5)


def test_features_of_real_speech(shared: Path) -> None:
    for path in sorted((shared / "data/LibriSpeech").rglob("*.flac")):
        samples, _ = soundfile.read(path, dtype="float32")
        features = Fbank()(torch.from_numpy(samples)).numpy()
        np.testing.assert_allclose(features, lhotse_features(samples, 80), atol=1e-5, rtol=1e-5)


def test_silence_clicks_and_overload_have_the_features_of_lhotse() -> None:
    click = np.zeros(4000, np.float32)
    click[2000] = 1.0
    for samples in (np.zeros(4000, np.float32), np.full(4000, 0.5, np.float32), click, 1e4 * speech()[:4000]):
        features = Fbank()(torch.from_numpy(samples)).numpy()
        np.testing.assert_allclose(features, lhotse_features(samples, 80), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module", [Fbank, LinearMel])
def test_a_batch_has_the_features_of_its_rows(module: type[torch.nn.Module]) -> None:
    batch = torch.from_numpy(np.stack([speech()[:8000], speech()[4000:12000]]))
    front_end = module()
    torch.testing.assert_close(front_end(batch), torch.stack([front_end(row) for row in batch]), atol=1e-5, rtol=1e-5)


def test_unknown_front_ends_are_named() -> None:
    assert isinstance(front_end("lhotse", 80), Fbank) and isinstance(front_end("linear-mel", 80), LinearMel)
    with pytest.raises(UserError, match="'mfcc': choose one of lhotse, kaldifeat, linear-mel"):
        front_end("mfcc", 80)


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 32000, 44100, 48000, 96000])
@pytest.mark.parametrize("block", [33, 4410, 10**7])
def test_blocks_are_resampled_as_lhotse_resamples_the_whole(rate: int, block: int) -> None:
    samples = 0.3 * np.random.default_rng(rate).standard_normal(rate // 2 + 17).astype(np.float32)
    expected = get_or_create_resampler(rate, 16000)(torch.from_numpy(samples)).numpy()
    length = int(len(samples) * 16000 / rate + 0.5)
    resampled = np.concatenate(list(resample_blocks(blocks(samples, block), rate)))
    assert resampled.dtype == np.float32 and len(resampled) == length
    np.testing.assert_allclose(resampled, expected[:length], atol=1e-6, rtol=0)


def test_rates_of_the_models_and_without_samples_are_passed_on() -> None:
    samples = speech()
    assert np.array_equal(np.concatenate(list(resample_blocks(blocks(samples, 777), 16000))), samples)
    assert sum(map(len, resample_blocks([], 8000))) == 0


def test_an_odd_rate_keeps_time_and_pitch() -> None:
    """44,101 Hz has no small ratio to 16,000 Hz, and exact filters for it would take 22 GB."""
    time = np.arange(44101) / 44101
    tone = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    resampled = np.concatenate(list(resample_blocks([tone], 44101)))
    assert abs(len(resampled) - 16000) <= 2
    assert abs(np.abs(np.fft.rfft(resampled[:16000])).argmax() - 1000) <= 1
