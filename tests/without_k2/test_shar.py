"""Lhotse Shar folders give the same batches as plain cuts, from any batch on; damaged ones are errors."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from lhotse import CutSet

from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.shar import export_shar
from splitformer.data.batches import load_cuts
from splitformer.data.cut_index import DataError
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import ManifestError, read_cuts
from splitformer.data.shar import SharCuts
from splitformer.report.records import read_training_log
from splitformer.training.loop import Trainer
from tests.factories import make_lang_dir, make_split, make_texts
from tests.training_runs import ALONE, options, small_config, training_data


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A corpus whose cuts are parts of recordings, speed-perturbed, and the same in Shar: (corpus, Shar folder)."""
    folder = tmp_path_factory.mktemp("both")
    texts = make_texts(41)
    files = make_split(folder, texts)
    cuts = folder / "cuts.jsonl.gz"
    compute_fbank(*files, cuts, folder / "feats", FbankOptions("lhotse"), speed_perturb=True)
    assert export_shar(cuts, folder / "shar", "numpy", shard_cuts=50) == 3 * 41
    return (folder, cuts, cuts, make_lang_dir(folder, texts)), folder / "shar"


def epoch(data, first=0, number=2):
    plan = data.plan(number)
    return list(data.batches(plan, number, first, 2, range(2)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_equal_those_of_plain_cuts_from_any_batch_on(both, tmp_path, num_workers):
    corpus, folder = both
    plain = training_data(corpus, tmp_path / "plain")
    sharded = training_data(corpus, tmp_path / "shar", [folder], num_workers)
    assert sharded.report == plain.report
    whole = epoch(plain)
    for first in (0, 3, len(plain.plan(2)) - 1):
        rest = epoch(sharded, first)
        assert len(rest) == len(whole) - 2 * first
        for ours, theirs in zip(rest, whole[2 * first :], strict=True):
            assert ours.cut_ids == theirs.cut_ids and ours.texts == theirs.texts and not ours.errors
            assert torch.equal(ours.x, theirs.x) and torch.equal(ours.x_lens, theirs.x_lens)
    assert torch.equal(sharded.feature_deviation(), plain.feature_deviation())


def test_folders_and_files_can_be_combined(both, tmp_path):
    corpus, _ = both
    cuts = list(read_cuts(corpus[1]))
    CutSet.from_cuts(cuts[:60]).to_file(tmp_path / "a.jsonl.gz")
    CutSet.from_cuts(cuts[60:]).to_file(tmp_path / "b.jsonl.gz")
    export_shar(tmp_path / "b.jsonl.gz", tmp_path / "b", "numpy")
    mixed = training_data(corpus, tmp_path / "mixed", [tmp_path / "a.jsonl.gz", tmp_path / "b"])
    for ours, theirs in zip(epoch(mixed), epoch(training_data(corpus, tmp_path / "plain")), strict=True):
        assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)


def test_lhotse_reads_the_folder_and_its_own_folders_are_read(both, tmp_path):
    corpus, folder = both
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"cuts.{i:06d}.jsonl.gz" for i in range(3)),
        *(f"features.{i:06d}.tar" for i in range(3)),
    ]
    plain, theirs, ours = list(read_cuts(corpus[1])), list(CutSet.from_shar(in_dir=folder)), list(SharCuts(folder))
    for a, b, c in zip(plain, theirs, ours, strict=True):
        assert a.id == b.id == c.id and a.duration == b.duration == c.duration
        assert a.supervisions == b.supervisions == c.supervisions
        assert all(np.array_equal(a.load_features(), each.load_features()) for each in (b, c))
    lhotses = tmp_path / "lhotse"
    lhotses.mkdir()
    without = CutSet.from_cuts(cut.drop_recording() for cut in plain)
    without.to_shar(lhotses, {"features": "numpy"}, shard_size=30)
    for ours, theirs in zip(
        epoch(training_data(corpus, tmp_path / "a", [lhotses])),
        epoch(training_data(corpus, tmp_path / "b")),
        strict=True,
    ):
        assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)


def test_training_from_a_folder(both, corpus, tmp_path):
    (folder, _, _, lang_dir), shards = both
    Trainer(small_config(num_epochs=1), options((folder, shards, corpus[2], lang_dir), tmp_path), ALONE).train()
    assert read_training_log(tmp_path / "training.jsonl")[-1].unreadable_cuts == 0


def test_a_truncated_archive(both, tmp_path):
    """An error before it is indexed; later, the cuts beyond its end are left out, as unreadable features are."""
    corpus, folder = both
    copy = tmp_path / "shar"
    shutil.copytree(folder, copy)
    data = training_data(corpus, tmp_path / "index", [copy])
    archive = copy / "features.000001.tar"
    size = archive.stat().st_size
    archive.write_bytes(archive.read_bytes()[: size // 2])
    batches = epoch(data)
    errors = {cut_id: reason for batch in batches for cut_id, reason in batch.errors.items()}
    assert 20 <= len(errors) <= 30 and sum(len(batch.cut_ids) for batch in batches) == 123 - len(errors)
    assert all("ends before" in reason for reason in errors.values()), errors
    with pytest.raises(ManifestError, match=r"features\.000001\.tar .*prepare\.sh --shar again"):
        training_data(corpus, tmp_path / "again", [copy])
    archive.unlink()
    with pytest.raises(ManifestError, match=r"holds 3 manifests .* and 2 archives"):
        training_data(corpus, tmp_path / "again", [copy])
    for each in copy.glob("features*"):
        each.unlink()
    with pytest.raises(DataError, match="cuts after it be read"):
        epoch(data)


def test_archives_that_do_not_fit_their_manifests_are_refused(both, tmp_path):
    copy = tmp_path / "shar"
    shutil.copytree(both[1], copy)
    shutil.copy(copy / "features.000000.tar", copy / "features.000001.tar")
    with pytest.raises(ManifestError, match=r"holds u000 where cuts\.000001\.jsonl\.gz has u009_sp0\.9"):
        list(load_cuts([copy]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"holds 0 manifests"):
        load_cuts([tmp_path / "empty"])


def test_an_export_appears_when_it_is_complete(both, tmp_path):
    corpus, _ = both
    cuts = list(read_cuts(corpus[1]))
    incomplete, bare = tmp_path / "incomplete.jsonl.gz", tmp_path / "bare.jsonl.gz"
    CutSet.from_cuts([*cuts[:60], cuts[60].drop_features(), *cuts[61:]]).to_file(incomplete)
    CutSet.from_cuts(cut.drop_features() for cut in cuts).to_file(bare)
    out = tmp_path / "exported"
    out.mkdir()
    with pytest.raises(ManifestError, match="has no features"):
        export_shar(incomplete, out / "shar", "numpy", shard_cuts=10)
    with pytest.raises(ManifestError, match="no cuts with features"):
        export_shar(bare, out / "shar", "numpy")
    assert not list(out.iterdir())
    (out / ".shar.0123.tmp").mkdir()  # of an export that was killed
    export_shar(corpus[1], out / "shar", "numpy", shard_cuts=10)
    assert [path.name for path in out.iterdir()] == ["shar"]
