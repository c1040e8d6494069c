"""Training data with torchaudio's front end and lilcom, installed with k2: on the fly, in Shar, with noise."""

from __future__ import annotations

import random

import numpy as np
import pytest
import soundfile
import torch

from splitformer.corpora.fbank import compute_fbank, write_audio_cuts
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import musan_pairs
from splitformer.corpora.shar import export_shar
from splitformer.data.cut_features import STORED_FRAMES
from splitformer.data.cut_index import index_cuts
from splitformer.data.features import FbankOptions, LinearMel
from splitformer.data.manifests import read_cuts
from splitformer.data.noise import NoiseFilter, NoiseMixer
from splitformer.data.shar import SharCuts
from tests.factories import RATE, make_lang_dir, make_split, make_texts
from tests.training_runs import training_data

CLEAR = {"p": 0.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folder with manifests, with audio.jsonl.gz, lilcom.jsonl.gz (log-mel) and linear.jsonl.gz; and the corpus."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = make_texts(30)
    files = make_split(folder, texts)
    write_audio_cuts(*files, folder / "audio.jsonl.gz", speed_perturb=True)
    for name, extractor in (("lilcom", "lhotse"), ("linear", "linear-mel")):
        options = FbankOptions(extractor)
        compute_fbank(*files, folder / f"{name}.jsonl.gz", folder / name, options, speed_perturb=True)
    return folder, (folder, folder / "linear.jsonl.gz", None, make_lang_dir(folder, texts))


def epoch(data):
    return list(data.batches(data.plan(1), 1, 0, 2, range(2)))


def test_linear_mel_on_the_fly_has_its_last_frame(prepared, tmp_path):
    folder, corpus = prepared
    stored = training_data(corpus, tmp_path / "stored", augment=CLEAR, features="linear-mel")
    audio = [folder / "audio.jsonl.gz"]
    live = training_data(corpus, tmp_path / "live", audio, augment=CLEAR, on_the_fly=True, features="linear-mel")
    for ours, theirs in zip(epoch(live), epoch(stored), strict=True):
        assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x_lens, theirs.x_lens)
        torch.testing.assert_close(ours.x, theirs.x)
    # stored features of another kind are ignored
    other = training_data(corpus, tmp_path / "other", augment=CLEAR, on_the_fly=True)
    fbank = training_data(corpus, tmp_path / "fbank", [folder / "lilcom.jsonl.gz"], augment=CLEAR)
    for ours, theirs in zip(epoch(other), epoch(fbank), strict=True):
        assert torch.equal(ours.x_lens, theirs.x_lens) and (ours.x - theirs.x).abs().max() < 2**-5


def test_linear_mel_in_shar_has_its_last_frame(prepared, tmp_path):
    _, corpus = prepared
    with pytest.raises(ValueError, match=r"energies without a logarithm.*choose packing numpy"):
        export_shar(corpus[1], tmp_path / "lilcom", "lilcom")
    export_shar(corpus[1], tmp_path / "shar", "numpy")
    assert any(STORED_FRAMES in (cut.custom or {}) for cut in SharCuts(tmp_path / "shar"))
    plain = training_data(corpus, tmp_path / "a", features="linear-mel")
    sharded = training_data(corpus, tmp_path / "b", [tmp_path / "shar"], features="linear-mel")
    for ours, theirs in zip(epoch(sharded), epoch(plain), strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.x_lens, theirs.x_lens)


def test_lilcom_in_shar_rounds_once_more_and_changes_nothing_else(prepared, tmp_path):
    folder, corpus = prepared
    cuts = folder / "lilcom.jsonl.gz"
    for packing in ("numpy", "lilcom"):
        export_shar(cuts, tmp_path / packing, packing)
    plain = training_data(corpus, tmp_path / "a", [cuts], augment=CLEAR)
    exact = training_data(corpus, tmp_path / "b", [tmp_path / "numpy"], augment=CLEAR)
    packed = training_data(corpus, tmp_path / "c", [tmp_path / "lilcom"], augment=CLEAR)
    for theirs, same, close in zip(epoch(plain), epoch(exact), epoch(packed), strict=True):
        assert theirs.cut_ids == same.cut_ids == close.cut_ids
        assert torch.equal(same.x, theirs.x) and torch.equal(close.x_lens, theirs.x_lens)
        assert (close.x - theirs.x).abs().max() <= 2**-6
    small, large = (sum(p.stat().st_size for p in (tmp_path / n).glob("*.tar")) for n in ("lilcom", "numpy"))
    assert small < 0.6 * large


def test_noise_is_mixed_into_energies_without_a_logarithm(tmp_path):
    path = tmp_path / "musan/noise/a.wav"
    path.parent.mkdir(parents=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(7 * RATE), RATE)
    files = tmp_path / "recordings.jsonl.gz", tmp_path / "supervisions.jsonl.gz"
    write_split(musan_pairs(tmp_path / "musan", Skipped()), *files)
    cuts = tmp_path / "cuts.jsonl.gz"
    compute_fbank(*files, cuts, tmp_path / "feats", FbankOptions("linear-mel"))
    index, _ = index_cuts(read_cuts(cuts), [cuts], NoiseFilter("linear-mel", 80), tmp_path / "index")
    feats = LinearMel().extract(0.05 * np.random.default_rng(1).standard_normal(9 * RATE), RATE)
    random.seed(0)
    mixed = NoiseMixer(index, 1.0, (6.0, 6.0)).into_features(feats, "linear-mel", 0.01)
    assert mixed.shape == feats.shape and (mixed > feats).all()
    assert 10 * np.log10(feats.sum() / (mixed.astype(np.float64) - feats).sum()) == pytest.approx(6.0, abs=0.05)
