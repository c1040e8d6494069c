"""LibriSpeech's folders: complete or not, and divided again by speaker, from its own layout to tables that say so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from splitformer.data.manifests import read_supervisions
from splitformer.report.records import DecodeRecord
from tests.corpora import write_librispeech

NOTICE = "Not comparable with LibriSpeech's figures"
OF_TEST_CLEAN = {"dev": {"672", "4507"}, "test": {"1089", "8455"}, "train": {"61", "121", "8463"}}
TINY = ["model.d_model=32", "model.num_heads=2", "model.feedforward_dim=64", "model.num_layers=2"]
TINY += ["model.exit_layers=[1,2]", "model.parallel_exits=[1,2]", "training.num_epochs=1", "training.average_epochs=1"]


def run(repo_root: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPLITFORMER_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [f"./{script}", "--corpus", "librispeech", *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, env=environment, text=True, capture_output=True)


def write_sources(root: Path, dev_clean: bool = True) -> None:
    """Write a test-clean with seven of its speakers, and a dev-clean with two of its."""
    names = {"test-clean": sorted(int(name) for group in OF_TEST_CLEAN.values() for name in group)}
    write_librispeech(root, {"test-clean": 28}, names)
    if dev_clean:
        write_librispeech(root, {"dev-clean": 8}, {"dev-clean": [84, 174]})


def speakers(work: Path, split: str) -> set[str]:
    manifest = work / f"data/manifests/resplit-{split}_supervisions.jsonl.gz"
    return {segment.speaker for segment in read_supervisions(manifest)}


def test_speakers_of_the_resplit(repo_root: Path, tmp_path: Path) -> None:
    """Nobody is in two splits, dev-clean is for training alone, and its arrival makes the manifests again."""
    arguments = ["--subset", "resplit", "--download-dir", tmp_path, "--work-dir", tmp_path / "work", "--num-jobs", 1]
    arguments += ["--stop-stage", "manifests", "--allow-incomplete"]
    write_sources(tmp_path, dev_clean=False)
    first = run(repo_root, "prepare.sh", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    assert {split: speakers(tmp_path / "work", split) for split in OF_TEST_CLEAN} == OF_TEST_CLEAN
    write_librispeech(tmp_path, {"dev-clean": 8}, {"dev-clean": [84, 174]})
    second = run(repo_root, "prepare.sh", *arguments)
    assert second.returncode == 0 and "8 utterances of 2 speakers" in second.stdout, second.stdout + second.stderr
    with_dev = {**OF_TEST_CLEAN, "train": OF_TEST_CLEAN["train"] | {"84", "174"}}
    assert {split: speakers(tmp_path / "work", split) for split in OF_TEST_CLEAN} == with_dev


def test_every_table_and_record_of_the_resplit_says_what_it_is(repo_root: Path, tmp_path: Path) -> None:
    write_sources(tmp_path)
    arguments = ["--subset", "resplit", "--download-dir", tmp_path, "--work-dir", tmp_path / "work", "--num-jobs", 1]
    arguments += ["--allow-incomplete", "--vocab-size", 40, "--speed-perturb", "false", "--num-processes", 1]
    arguments += ["--methods", "greedy_search", "1best", "--hlg-scales", 0.7, "--policy", "posterior", "--set", *TINY]
    done = run(repo_root, "run.sh", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = (tmp_path / "work").rglob("RESULTS.md")
    assert "resplit" in str(results)
    text = results.read_text()
    tables = re.split(r"\n\n(?=\| )", text)
    assert len(tables) > 5 and all(part.endswith("**") and NOTICE in part[-160:] for part in tables[:-1]), text
    assert "(published)" not in text and "2506.18035" not in text
    records = [path for name in ("decode", "early_exit") for path in (tmp_path / "work").rglob(f"{name}/*.json")]
    assert len(records) == 2 * 2 * 2 + 2
    assert all(json.loads(path.read_text())["notice"].startswith(NOTICE) for path in records)
    assert {DecodeRecord.load(path).test_set for path in records if "-exit-" in path.name} == {
        "resplit-dev", "resplit-test"
    }  # fmt: skip
    assert not list((tmp_path).rglob("*.arpa.gz")), "the language model is that of the training text"
    published = run(repo_root, "run.sh", *arguments, "--publish")
    assert published.returncode == 2 and "not those of the corpus" in published.stderr


@pytest.mark.parametrize("subset", ["mini", "resplit"])
def test_an_incomplete_folder_is_not_taken_for_whole(repo_root: Path, tmp_path: Path, subset: str) -> None:
    if subset == "mini":
        write_librispeech(tmp_path, {"train-clean-5": 4, "dev-clean-2": 4})
        folder, known = tmp_path / "LibriSpeech/train-clean-5", 1519
    else:
        write_sources(tmp_path, dev_clean=False)
        folder, known = tmp_path / "LibriSpeech/test-clean", 2620
    arguments = ["--subset", subset, "--download-dir", tmp_path, "--work-dir", tmp_path / "work"]
    arguments += ["--stop-stage", "download"]
    fewer = run(repo_root, "prepare.sh", *arguments)
    found = rf"{folder.name} is incomplete: it has \d+ of {known} utterances"
    assert fewer.returncode == 1 and re.search(found, fewer.stderr), fewer.stderr
    assert "--allow-incomplete" in fewer.stderr
    gone = sorted(folder.rglob("*.flac"))[1]
    gone.unlink()
    missing = run(repo_root, "prepare.sh", *arguments)
    assert missing.returncode == 1 and f"1 files are missing: {gone.relative_to(folder)}" in missing.stderr
    next(folder.rglob("*.trans.txt")).unlink()
    assert ".trans.txt" in run(repo_root, "prepare.sh", *arguments).stderr
    taken = run(repo_root, "prepare.sh", *arguments, "--allow-incomplete")
    assert taken.returncode == 0 and "files are missing" in taken.stdout, taken.stderr


@pytest.mark.slow
def test_what_is_chosen_for_test_other_is_chosen_on_dev_other(repo_root: Path, tmp_path: Path) -> None:
    splits = {"train-clean-5": 8, "dev-clean": 4, "dev-other": 4, "test-clean": 4, "test-other": 4}
    write_librispeech(tmp_path, splits)
    arguments = ["--train-splits", "train-clean-5", "--download-dir", tmp_path, "--work-dir", tmp_path / "work"]
    arguments += ["--allow-incomplete", "--estimate-lm", "--num-jobs", 1, "--vocab-size", 40, "--num-processes", 1]
    arguments += ["--speed-perturb", "false", "--methods", "greedy_search", "1best", "--hlg-scales", 0.5, 1]
    done = run(repo_root, "run.sh", *arguments, "--blank-penalties", 0, "--policy", "posterior", "--set", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    [experiment] = (path.parent for path in (tmp_path / "work").rglob("averaged.pt"))
    for kind in ("clean", "other"):
        record = DecodeRecord.load(experiment / f"decode/test-{kind}-exit-02-1best.json")
        assert record.config["decoding"]["tuned_on"] == f"dev-{kind}"
        name = "policy.json" if kind == "clean" else "policy-dev-other.json"
        assert json.loads((experiment / name).read_text())["fitted_on"]["set"] == f"dev-{kind}"
        tradeoff = json.loads((experiment / f"early_exit/tradeoff-test-{kind}.json").read_text())
        assert tradeoff["calibration_set"] == f"dev-{kind}"


@pytest.mark.slow
def test_the_resplit_of_real_speech_has_the_documented_sizes(repo_root: Path, tmp_path: Path, shared: Path) -> None:
    unpack = shared / "data/librispeech_opus/unpack.py"
    if not unpack.is_file():
        pytest.skip(f"there is no {unpack}")
    subprocess.run([sys.executable, unpack, tmp_path], check=True, capture_output=True)
    arguments = ["--subset", "resplit", "--download-dir", tmp_path, "--work-dir", tmp_path / "work", "--num-jobs", 2]
    done = run(repo_root, "prepare.sh", *arguments, "--stop-stage", "manifests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1313 utterances of 20 speakers" in done.stdout
    assert "(1784 of test-clean, 1313 of dev-clean; 48 speakers)" in done.stdout
    assert [len(speakers(tmp_path / "work", split)) for split in ("dev", "test")] == [4, 8]
    readme = (repo_root / "egs/librispeech/README.md").read_text()
    for split, utterances in (("dev", 254), ("test", 582)):
        manifest = tmp_path / f"work/data/manifests/resplit-{split}_supervisions.jsonl.gz"
        segments = list(read_supervisions(manifest))
        assert len(segments) == utterances
        assert f"| {utterances} | {sum(each.duration for each in segments) / 3600:.2f} |" in readme
