"""Manifests and checkpoints are data: each test plants a program where a library would run it."""

from __future__ import annotations

import json
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from lhotse import CutSet, RecordingSet

from splitformer.checkpoint import CheckpointError, load_checkpoint
from splitformer.corpora.fbank import compute_fbank
from splitformer.data.batches import load_cuts
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import Manifest, UnsafeManifest
from tests.training_runs import train, training_data


class Payload:
    """A pickle that calls a function when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewritten(cuts, output, change):
    """Write the cuts of a manifest with `change` applied to the fields of the second."""
    items = [cut.to_dict() for cut in CutSet.from_file(cuts)]
    change(items[1])
    output.write_text("".join(json.dumps(item) + "\n" for item in items))
    return output


def command_source(item, planted):
    item["recording"]["sources"][0] |= {"type": "command", "source": f"touch {planted}; cat /dev/null"}


def fetched_source(item, planted):
    item["recording"]["sources"][0] |= {"type": "url", "source": f"http://localhost:1/{planted.name}"}


def piped_audio(item, planted):
    item["recording"]["sources"][0]["source"] = f"pipe:touch {planted}"


def piped_features(item, planted):
    item["features"] |= {"storage_path": f"pipe:touch {planted};", "storage_key": "x.npy"}


def kaldi_features(item, planted):
    item["features"] |= {"storage_type": "kaldiio", "storage_path": f"touch {planted} |", "storage_key": "x"}


def custom_array(item, planted):
    array = {"storage_type": "numpy_files", "storage_path": f"pipe:touch {planted};", "storage_key": "x", "shape": [2]}
    item["custom"] = {"ivector": array}


DANGERS = [command_source, fetched_source, piped_audio, piped_features, kaldi_features, custom_array]


@pytest.mark.parametrize("danger", DANGERS, ids=lambda danger: danger.__name__)
def test_a_manifest_that_would_run_or_fetch_something_is_refused(corpus, tmp_path, danger):
    planted = tmp_path / "planted"
    cuts = rewritten(corpus[1], tmp_path / "cuts.jsonl", lambda item: danger(item, planted))
    with pytest.raises(UnsafeManifest, match=r"cuts\.jsonl: train-001\S* has .*store audio and features as files"):
        training_data(corpus, tmp_path / "index", [cuts])
    assert not planted.exists()


def test_lhotse_would_have_run_it(corpus, tmp_path):
    """Otherwise these tests would show nothing."""
    for danger in (command_source, piped_features):
        planted = tmp_path / danger.__name__
        cuts = rewritten(corpus[1], tmp_path / "cuts.jsonl", lambda item: danger(item, planted))  # noqa: B023
        cut = list(CutSet.from_file(cuts))[1]
        with pytest.raises(Exception):  # noqa: B017
            cut.load_features() if danger is piped_features else cut.load_audio()
        assert planted.exists()


def test_pickled_features_are_refused(corpus, tmp_path):
    planted = tmp_path / "planted"
    data = pickle.dumps(Payload(planted)).hex()
    cut = next(iter(CutSet.from_file(corpus[1])))
    cut.features.storage_type, cut.features.storage_key = "memory_raw", data
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(UnsafeManifest, match="memory_raw"):
        list(load_cuts([tmp_path / "cuts.jsonl"]))
    assert not planted.exists()


def test_the_command_names_the_cut_and_runs_nothing(corpus, tmp_path):
    planted = tmp_path / "planted"
    cuts = rewritten(corpus[1], tmp_path / "cuts.jsonl", lambda item: command_source(item, planted))
    run = train((corpus[0], cuts, *corpus[2:]), tmp_path, tmp_path / "exp")
    assert run.returncode == 1 and "train: " in run.stderr and "audio of the type 'command'" in run.stderr
    assert "Traceback" not in run.stderr and not planted.exists()


def test_recordings_are_checked_before_features_are_computed(corpus, tmp_path):
    planted = tmp_path / "planted"
    cuts = list(CutSet.from_file(corpus[1]))[:2]
    recordings = RecordingSet.from_recordings([cut.recording for cut in cuts])
    recordings.to_file(tmp_path / "recordings.jsonl")
    assert [each.id for each in Manifest(tmp_path / "recordings.jsonl")] == [cut.recording.id for cut in cuts]
    item = cuts[1].recording.to_dict()
    item["sources"][0] |= {"type": "command", "source": f"touch {planted}"}
    (tmp_path / "recordings.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "supervisions.jsonl").write_text(json.dumps(cuts[1].supervisions[0].to_dict()) + "\n")
    with pytest.raises(UnsafeManifest, match=r"recordings\.jsonl: train-001 has audio of the type 'command'"):
        compute_fbank(
            tmp_path / "recordings.jsonl", tmp_path / "supervisions.jsonl", tmp_path / "cuts.jsonl",
            tmp_path / "features", FbankOptions(),
        )  # fmt: skip
    assert not planted.exists()


def test_checkpoints_run_nothing(tmp_path):
    for number, contents in enumerate(
        (
            lambda planted: Payload(planted),
            lambda planted: {"plain": {"config": "{}"}, "tensors": {"model": Payload(planted)}},
            lambda planted: {"plain": {"config": Payload(planted)}, "tensors": {"model": {}}},
        )
    ):
        planted, path = tmp_path / f"planted-{number}", tmp_path / f"{number}.pt"
        torch.save(contents(planted), path)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)
        assert not planted.exists()
        torch.load(path, **({"weights_only": False} if torch.__version__ >= "2" else {}))
        assert planted.exists(), "the payload works where it is not refused"


def test_the_library_does_not_unpickle_or_start_a_shell_elsewhere(repo_root):
    patterns = ["weights_only=False", r"pickle\.loads?\b", "allow_pickle=True", "shell=True", r"os\.system", r"\beval\("]  # noqa: E501
    found = subprocess.run(
        ["grep", "-rnE", "--include=*.py", "|".join(patterns), "splitformer", "local"],
        capture_output=True, text=True, cwd=repo_root,
    )  # fmt: skip
    lines = [line for line in found.stdout.splitlines() if "eval()" not in line]
    assert lines == []
    loads = subprocess.run(["grep", "-rn", "--include=*.py", "torch.load(", "splitformer", "local"],
                           capture_output=True, text=True, cwd=repo_root).stdout  # fmt: skip
    assert loads and all("weights_only=True" in line for line in loads.splitlines())
