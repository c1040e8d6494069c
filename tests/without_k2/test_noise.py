"""Noise in the training data: its level, its reproducibility, and what happens if it cannot be read."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Fbank
from lhotse.cut import MonoCut
from lhotse.utils import fastcopy

from splitformer.config import AugmentConfig, ConfigError
from splitformer.corpora.fbank import compute_fbank, write_audio_cuts
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import musan_pairs
from splitformer.corpora.validation import validate_split
from splitformer.data.cut_index import DataError, index_cuts
from splitformer.data.features import SAMPLING_RATE, FbankOptions
from splitformer.data.manifests import ManifestError, read_cuts
from splitformer.data.noise import NoiseFilter, NoiseMixer
from tests.factories import RATE
from tests.training_runs import in_fork, options, same, small_config, training_data, wait_for, weights

FBANK = FbankOptions("lhotse")


@pytest.fixture(scope="module")
def musan(tmp_path_factory) -> Path:
    """Noise of 33 s and 3 s and music of 8 s in MUSAN's layout, at 16 and at 8 kHz."""
    folder = tmp_path_factory.mktemp("noise") / "musan"
    rng = np.random.default_rng(0)
    for name, seconds, rate in (("noise/free-sound/noise-a", 33.0, RATE), ("noise/free-sound/noise-b", 3.0, RATE),
                                ("music/fma/music-a", 8.0, RATE // 2)):  # fmt: skip
        path = folder / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        slow = np.repeat(rng.uniform(0.02, 0.3, int(seconds * 10)), rate // 10)  # its loudness changes
        soundfile.write(path, slow * rng.standard_normal(len(slow)), rate)
    (folder / "music/fma/ANNOTATIONS").write_text("music-a rock N someone\n")
    return folder


@pytest.fixture(scope="module")
def noise_cuts(musan, tmp_path_factory) -> tuple[Path, Path]:
    """Noise cuts with audio alone, and with features."""
    folder = tmp_path_factory.mktemp("noise_cuts")
    files = folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"
    write_split(musan_pairs(musan, Skipped()), *files)
    validate_split(*files)
    write_audio_cuts(*files, folder / "audio.jsonl.gz")
    compute_fbank(*files, folder / "cuts.jsonl.gz", folder / "feats", FBANK)
    return folder / "audio.jsonl.gz", folder / "cuts.jsonl.gz"


def test_noise_is_cut_into_windows(noise_cuts):
    for path in noise_cuts:
        spans = [(cut.id, cut.start, cut.duration) for cut in read_cuts(path)]
        assert spans == [
            ("music-a-000", 0.0, 8.0),  # music comes first, as in MUSAN's own list of parts
            ("noise-a-000", 0.0, 10.0),
            ("noise-a-001", 10.0, 10.0),
            ("noise-a-002", 20.0, 10.0),  # the last 3 s are too short
            ("noise-b-000", 0.0, 3.0),  # but this is all there is
        ]
        assert all(cut.sampling_rate == SAMPLING_RATE for cut in read_cuts(path))


def test_missing_or_damaged_musan_folders(musan, tmp_path):
    with pytest.raises(ManifestError, match="has none of the folders music, noise, speech"):
        list(musan_pairs(tmp_path, Skipped()))
    (tmp_path / "speech").mkdir()
    with pytest.raises(ManifestError, match=r"no recording \(\.wav\) in its folders"):
        list(musan_pairs(tmp_path, Skipped()))
    (tmp_path / "noise").symlink_to(musan / "noise")
    (tmp_path / "speech/broken.wav").write_bytes(b"RIFF, or so it says")
    soundfile.write(tmp_path / "speech/good.wav", np.ones(RATE), RATE)
    skipped = Skipped()
    found = [recording for recording, _ in musan_pairs(tmp_path, skipped)]
    assert [recording.id for recording in found] == ["noise-a", "noise-b", "good"]
    assert found[2].sources[0].source == str(tmp_path / "speech/good.wav") and len(skipped) == 1
    assert len(list(musan_pairs(tmp_path, Skipped(), limit=1))) == 2
    with pytest.raises(ManifestError, match=r"broken\.wav.*--strict"):
        list(musan_pairs(tmp_path, Skipped(strict=True)))


def mixer(path: Path, folder: Path, kind: str | None, p: float = 1.0, snr=(10.0, 20.0)) -> NoiseMixer:
    index, _ = index_cuts(read_cuts(path), [path], NoiseFilter(kind, 80), folder)
    return NoiseMixer(index, p, snr)


@pytest.mark.parametrize("seconds", [0.7, 4.0, 24.0])
@pytest.mark.parametrize("snr", [-5.0, 3.0, 17.0])
def test_the_signal_to_noise_ratio_is_the_requested_one(noise_cuts, tmp_path, seconds, snr):
    """Over the whole utterance, in audio and in features, with one window or several in a row."""
    rng = np.random.default_rng(1)
    samples = (rng.standard_normal(int(seconds * RATE)) * np.linspace(0.01, 0.1, int(seconds * RATE))).astype("float32")
    random.seed(0)
    mixed = mixer(noise_cuts[0], tmp_path / "a", None, snr=(snr, snr)).into_audio(samples)
    assert mixed.shape == samples.shape and mixed.dtype == np.float32
    noise = mixed.astype(np.float64) - samples
    assert 10 * np.log10((samples**2.0).sum() / (noise**2).sum()) == pytest.approx(snr, abs=0.05)
    assert np.abs(noise).reshape(-1, 100).max(axis=1).min() > 0, "noise from the first sample to the last"

    feats = Fbank().extract(samples, RATE)
    mixed_in = mixer(noise_cuts[1], tmp_path / "f", "kaldi-fbank", snr=(snr, snr))
    mixed = mixed_in.into_features(feats, "kaldi-fbank", 0.01)
    assert mixed.shape == feats.shape and mixed.dtype == np.float32
    speech = np.exp(feats.astype(np.float64))
    noise = np.exp(mixed.astype(np.float64)) - speech
    assert 10 * np.log10(speech.sum() / noise.sum()) == pytest.approx(snr, abs=0.05)


def test_ratios_are_drawn_uniformly_for_the_requested_fraction(noise_cuts, tmp_path):
    mixed_in, ratios = mixer(noise_cuts[1], tmp_path, "kaldi-fbank", p=0.4, snr=(0.0, 10.0)), []
    feats = np.zeros((50, 80), dtype=np.float32)
    random.seed(3)
    for _ in range(600):
        mixed = mixed_in.into_features(feats, "kaldi-fbank", 0.01)
        if mixed is not feats:
            ratios.append(-10 * np.log10((np.exp(mixed.astype(np.float64)) - 1).sum() / (50 * 80)))
    assert len(ratios) / 600 == pytest.approx(0.4, abs=0.06)
    assert min(ratios) > -0.01 and max(ratios) < 10.01 and np.mean(ratios) == pytest.approx(5.0, abs=0.5)


def test_mixed_features_are_close_to_those_of_mixed_audio(noise_cuts, tmp_path):
    """With the same draws, and because the energies of independent signals add up."""
    samples = (0.05 * np.random.default_rng(2).standard_normal(3 * RATE)).astype("float32")
    random.seed(5)
    audio = mixer(noise_cuts[0], tmp_path / "a", None, snr=(0.0, 0.0)).into_audio(samples)
    random.seed(5)
    feats = mixer(noise_cuts[1], tmp_path / "f", "kaldi-fbank", snr=(0.0, 0.0)).into_features(
        Fbank().extract(samples, RATE), "kaldi-fbank", 0.01
    )
    difference = Fbank().extract(audio, RATE) - feats
    assert abs(difference.mean()) < 0.25 and difference.std() < 1.0


def noisy(corpus, folder, cuts, on_the_fly, num_workers=0, p=0.5):
    augment = {"noise_p": p, "noise_snr": (0.0, 10.0)}
    return training_data(corpus, folder, None, num_workers, augment, on_the_fly, [cuts])


def all_batches(data, first=0, epoch=2):
    plan = data.plan(epoch)
    return list(data.batches(plan, epoch, first, 2, range(2)))


@pytest.mark.parametrize("on_the_fly", [True, False], ids=["audio", "features"])
def test_noise_depends_on_seed_epoch_batch_and_micro_batch_alone(corpus, noise_cuts, tmp_path, on_the_fly):
    cuts = noise_cuts[0 if on_the_fly else 1]
    whole = all_batches(noisy(corpus, tmp_path / "0", cuts, on_the_fly))
    random.seed(99)
    forked = noisy(corpus, tmp_path / "2", cuts, on_the_fly, num_workers=2)
    for first in (0, 2, len(forked.plan(2)) - 1):  # a run that resumes starts in the middle
        rest = all_batches(forked, first)
        assert len(rest) == len(whole) - 2 * first
        for ours, theirs in zip(rest, whole[2 * first :], strict=True):
            assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)
            assert torch.equal(ours.x_lens, theirs.x_lens) and not ours.errors

    quiet = training_data(corpus, tmp_path / "quiet", augment={"p": 0.0}, on_the_fly=on_the_fly)
    loud = training_data(
        corpus, tmp_path / "loud", None, 0, {"p": 0.0, "noise_p": 0.5, "noise_snr": (0.0, 0.0)},
        on_the_fly, [cuts],
    )  # fmt: skip
    changed = 0
    for ours, theirs in zip(all_batches(loud), all_batches(quiet), strict=True):
        assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x_lens, theirs.x_lens)
        for x, y, frames in zip(ours.x, theirs.x, ours.x_lens.tolist()):
            different = not torch.equal(x[:frames], y[:frames])
            changed += different
            if different:
                assert (x[:frames] - y[:frames]).mean() > 0.3, "noise fills what was quiet"
    assert 25 < changed < 55, "of 80 about half"
    first, other = all_batches(loud, epoch=2)[0], all_batches(loud, epoch=3)[0]
    assert first.cut_ids != other.cut_ids or not torch.equal(first.x, other.x)


def test_a_batch_reads_only_the_noise_that_it_mixes_in(corpus, noise_cuts, tmp_path, monkeypatch):
    cuts = [fastcopy(cut, id=f"{cut.id}-{i}") for cut in read_cuts(noise_cuts[1]) for i in range(40)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "many.jsonl.gz")
    data = noisy(corpus, tmp_path / "index", tmp_path / "many.jsonl.gz", False, p=1.0)
    read = []
    real = MonoCut.load_features
    monkeypatch.setattr(MonoCut, "load_features", lambda self: read.append(self.id) or real(self))
    batch = next(iter(data.batches(data.plan(1), 1, 0, 1, range(1))))
    noise = set(read) - set(batch.cut_ids)
    # utterances are shorter than windows: each takes one
    assert 0 < len(noise) <= len(batch.cut_ids) and noise <= {cut.id for cut in cuts}


def test_noise_that_cannot_be_read_is_left_out_and_named(corpus, noise_cuts, tmp_path):
    cuts = list(read_cuts(noise_cuts[0]))
    for cut in cuts:
        if cut.id.startswith("noise-a"):
            cut.recording.sources[0].source = str(tmp_path / "gone.wav")
    CutSet.from_cuts(cuts).to_file(tmp_path / "some.jsonl.gz")
    batches = all_batches(noisy(corpus, tmp_path / "some", tmp_path / "some.jsonl.gz", True, p=1.0))
    errors = {name: reason for batch in batches for name, reason in batch.errors.items()}
    assert errors.keys() == {"noise-a-000", "noise-a-001", "noise-a-002"}
    assert all(reason.startswith("noise that cannot be read") for reason in errors.values())
    assert sum(len(batch.cut_ids) for batch in batches) == 80, "no utterance is lost"

    for cut in cuts:
        cut.recording.sources[0].source = str(tmp_path / "gone.wav")
    CutSet.from_cuts(cuts).to_file(tmp_path / "none.jsonl.gz")
    with pytest.raises(DataError, match=r"20 noise cuts in a row cannot be read.*--musan-dir"):
        all_batches(noisy(corpus, tmp_path / "none", tmp_path / "none.jsonl.gz", True, p=1.0))


def test_noise_of_another_kind_is_refused(corpus, noise_cuts, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)no noise .* can be mixed in .*no features to mix into stored"):
        noisy(corpus, tmp_path / "a", noise_cuts[0], False)
    CutSet.from_cuts(cut.drop_recording() for cut in read_cuts(noise_cuts[1])).to_file(tmp_path / "f.jsonl.gz")
    with pytest.raises(ValueError, match="no audio to mix into audio"):
        noisy(corpus, tmp_path / "b", tmp_path / "f.jsonl.gz", True)
    narrow = noise_cuts[1].parent
    files = narrow / "recordings.jsonl.gz", narrow / "supervisions.jsonl.gz"
    compute_fbank(*files, tmp_path / "40.jsonl.gz", tmp_path / "feats", FbankOptions("lhotse", 40))
    with pytest.raises(ValueError, match=r"its features are \('kaldi-fbank', 40\), those of the training cuts .* 80\)"):
        noisy(corpus, tmp_path / "c", tmp_path / "40.jsonl.gz", False)


def test_noise_and_its_probability_go_together(corpus, noise_cuts, tmp_path):
    with pytest.raises(ConfigError, match=r"noise_p = 0\.5 with no --noise-cuts .*give --noise-cuts FILE.*--musan-dir"):
        training_data(corpus, tmp_path, augment={"noise_p": 0.5})
    with pytest.raises(ConfigError, match=r"noise_p = 0\.0 with --noise-cuts .*set augment\.noise_p"):
        training_data(corpus, tmp_path, noise_cuts=[noise_cuts[1]])
    with pytest.raises(ConfigError, match="a probability"):
        AugmentConfig(noise_p=1.5)
    for snr in ((10.0,), (20.0, 10.0)):
        with pytest.raises(ConfigError, match="noise_snr"):
            AugmentConfig(noise_snr=snr)


def test_a_killed_run_with_noise_resumes_with_the_same_weights(corpus, noise_cuts, tmp_path):
    config = small_config(num_epochs=1)
    config = replace(config, augment=replace(config.augment, noise_p=0.5))
    given = {"noise_cuts": (noise_cuts[1],)}
    whole = in_fork(config, options(corpus, tmp_path / "whole", **given))
    killed = options(corpus, tmp_path / "killed", save_minutes=0.0, **given)
    process = in_fork(config, killed)
    wait_for(lambda: list(killed.exp_dir.glob("epoch-1-step-*.pt")))
    process.kill()
    process.join()
    assert not (killed.exp_dir / "epoch-1.pt").exists()
    resumed = in_fork(config, replace(killed, num_workers=2))
    for process in (whole, resumed):
        process.join()
        assert process.exitcode == 0
    assert same(weights(killed.exp_dir / "epoch-1.pt"), weights(tmp_path / "whole/epoch-1.pt"))
