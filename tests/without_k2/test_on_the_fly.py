"""Features computed on the fly equal the stored ones, in the same batches."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment

from splitformer.corpora.fbank import compute_fbank, write_audio_cuts
from splitformer.corpora.manifests import write_split
from splitformer.data.cut_index import DataError
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import ManifestError, read_cuts
from splitformer.report.records import read_training_log
from splitformer.training.loop import Trainer
from tests.factories import RATE, make_lang_dir, make_split, make_texts
from tests.training_runs import ALONE, options, small_config, training_data

FBANK = FbankOptions("lhotse")
TOLERANCE = 2**-5
"""lilcom rounds stored features to multiples of this."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A speed-perturbed corpus with stored features, and its cuts without features: (corpus, audio cuts)."""
    folder = tmp_path_factory.mktemp("both")
    texts = make_texts(41)
    files = make_split(folder, texts)
    compute_fbank(*files, folder / "stored.jsonl.gz", folder / "feats", FBANK, speed_perturb=True)
    summary = write_audio_cuts(*files, folder / "audio.jsonl.gz", speed_perturb=True)
    assert summary.num_cuts == 3 * 41
    stored = folder / "stored.jsonl.gz"
    return (folder, stored, stored, make_lang_dir(folder, texts)), folder / "audio.jsonl.gz"


def epoch(data, parts=1, first=0, number=2):
    plan = data.plan(number)
    return list(data.batches(plan, number, first, parts, range(parts)))


def test_batches_are_those_of_stored_features(both, tmp_path):
    corpus, audio = both
    plain = {"augment": {"p": 0.0}}
    stored = training_data(corpus, tmp_path / "stored", **plain)
    live = training_data(corpus, tmp_path / "live", [audio], on_the_fly=True, **plain)
    assert live.report.kept == stored.report.kept == 123
    assert live.report.seconds == pytest.approx(stored.report.seconds)
    assert all(not cut.has_features for cut in read_cuts(audio))
    batches = epoch(stored), epoch(live)
    for ours, theirs in zip(*batches, strict=True):
        assert ours.cut_ids == theirs.cut_ids and ours.texts == theirs.texts
        assert torch.equal(ours.x_lens, theirs.x_lens) and torch.equal(ours.y, theirs.y)
        assert ours.x.shape == theirs.x.shape and not ours.errors
        assert (ours.x - theirs.x).abs().max() < TOLERANCE
    assert any("_sp0.9" in cut_id for batch in batches[1] for cut_id in batch.cut_ids)
    torch.testing.assert_close(live.feature_deviation(), stored.feature_deviation(), rtol=1e-2, atol=0)
    # stored features of the cuts are ignored
    neither = training_data(corpus, tmp_path / "neither", on_the_fly=True, **plain)
    for ours, theirs in zip(epoch(neither), batches[1], strict=True):
        assert torch.equal(ours.x, theirs.x)


def test_an_epoch_does_not_depend_on_the_loading_processes_and_resumes_from_any_batch(both, tmp_path):
    corpus, audio = both
    whole = epoch(training_data(corpus, tmp_path / "a", [audio], on_the_fly=True), parts=2)
    data = training_data(corpus, tmp_path / "b", [audio], num_workers=2, on_the_fly=True)
    for first in (0, len(data.plan(2)) - 2):
        for ours, theirs in zip(epoch(data, 2, first), whole[2 * first :], strict=True):
            assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)


def test_audio_at_another_rate_is_resampled(tmp_path):
    texts = make_texts(30)
    files = make_split(tmp_path, texts, rate=8000)
    corpus = (tmp_path, None, None, make_lang_dir(tmp_path, texts))
    write_audio_cuts(*files, tmp_path / "audio.jsonl.gz")
    compute_fbank(*files, tmp_path / "stored.jsonl.gz", tmp_path / "feats", FBANK)
    stored = training_data(corpus, tmp_path / "s", [tmp_path / "stored.jsonl.gz"], augment={"p": 0.0})
    live = training_data(corpus, tmp_path / "l", [tmp_path / "audio.jsonl.gz"], on_the_fly=True, augment={"p": 0.0})
    for ours, theirs in zip(epoch(live), epoch(stored), strict=True):
        assert (ours.x - theirs.x).abs().max() < TOLERANCE


@pytest.fixture
def damaged(both, tmp_path):
    """Copies of the audio cuts with some unreadable recordings: cuts, their folder, {cut id: part of the reason}."""
    corpus, audio = both
    copies = tmp_path / "audio"
    shutil.copytree(corpus[0] / "audio", copies)
    cuts = [cut for cut in read_cuts(audio) if "_sp" not in cut.id]
    for cut in cuts:
        cut.recording.sources[0].source = str(copies / Path(cut.recording.sources[0].source).name)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (copies / "r004.wav").unlink()
    (copies / "r010.wav").write_bytes(b"")
    soundfile.write(copies / "r020.wav", np.zeros(0), RATE)
    samples, _ = soundfile.read(copies / "r040.wav", dtype="float32")
    samples[len(samples) // 2] = float("nan")
    soundfile.write(copies / "r040.wav", samples, RATE, subtype="FLOAT")
    reasons = {f"u{n:03d}": "cannot be read" for n in (4, 5, 10, 11, 20, 21)} | {"u040": "samples are not finite"}
    return tmp_path / "cuts.jsonl.gz", copies, reasons


@pytest.mark.parametrize("num_workers", [0, 2])
def test_audio_that_cannot_be_read_is_left_out_and_named(both, tmp_path, damaged, num_workers):
    cuts, _, reasons = damaged
    data = training_data(both[0], tmp_path / "index", [cuts], num_workers, on_the_fly=True)
    batches = epoch(data)
    errors = {cut_id: reason for batch in batches for cut_id, reason in batch.errors.items()}
    assert errors.keys() == reasons.keys()
    assert all(part in errors[cut_id] for cut_id, part in reasons.items()), errors
    assert sum(len(batch.cut_ids) for batch in batches) == 41 - len(reasons)
    assert all(torch.isfinite(batch.x).all() for batch in batches)


def test_missing_audio_ends_the_epoch_with_the_remedy(both, tmp_path, damaged):
    cuts, copies, _ = damaged
    data = training_data(both[0], tmp_path / "index", [cuts], on_the_fly=True)
    shutil.rmtree(copies)
    with pytest.raises(DataError, match=r"nor can the 20 cuts after it be read. Was the audio moved"):
        epoch(data, parts=40)
    with pytest.raises(DataError, match="none of the features can be read"):
        data.feature_deviation()


def test_cuts_without_audio_or_features_are_an_error(both, tmp_path):
    corpus, audio = both
    with pytest.raises(ValueError, match=r"dropped 123: no stored features: the fbank stage.*--on-the-fly"):
        training_data(corpus, tmp_path / "index", [audio])
    CutSet.from_cuts(cut.drop_recording() for cut in read_cuts(corpus[1])).to_file(tmp_path / "no-audio.jsonl.gz")
    with pytest.raises(ValueError, match="no audio to compute features from"):
        training_data(corpus, tmp_path / "index", [tmp_path / "no-audio.jsonl.gz"], on_the_fly=True)
    write_split([], tmp_path / "r.jsonl.gz", tmp_path / "s.jsonl.gz")
    with pytest.raises(ManifestError, match="is empty"):
        write_audio_cuts(tmp_path / "r.jsonl.gz", tmp_path / "s.jsonl.gz", tmp_path / "cuts.jsonl.gz")


def test_an_utterance_of_three_minutes_is_dropped_and_reported(both, tmp_path):
    corpus, audio = both
    cuts = list(read_cuts(audio))[:41]
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(180 * RATE), RATE)
    outlier = Recording.from_file(path).to_cut()
    outlier.supervisions = [SupervisionSegment("long", "long", 0.0, 180.0, 0, cuts[0].supervisions[0].text)]
    CutSet.from_cuts([*cuts, outlier]).to_file(tmp_path / "cuts.jsonl.gz")
    data = training_data(corpus, tmp_path / "index", [tmp_path / "cuts.jsonl.gz"], on_the_fly=True)
    assert data.report.kept == 41 and data.report.dropped == {"longer than data.max_utterance_seconds = 25.0": 1}


def test_training_on_the_fly(both, corpus, tmp_path):
    (folder, _, _, lang_dir), audio = both
    of_audio, config = (folder, audio, corpus[2], lang_dir), small_config(num_epochs=1)
    Trainer(config, options(of_audio, tmp_path / "live", on_the_fly=True), ALONE).train()
    assert read_training_log(tmp_path / "live/training.jsonl")[-1].unreadable_cuts == 0
    with pytest.raises(DataError, match="give --on-the-fly"):
        Trainer(config, options(of_audio, tmp_path / "without"), ALONE)
