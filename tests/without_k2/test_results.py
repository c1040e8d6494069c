"""Records are saved and loaded unchanged, and no failure leaves half a file."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.provenance import git_commit
from splitformer.report.records import DecodeRecord, EpochRecord, append_epoch, read_training_log


def decode_record() -> DecodeRecord:
    return DecodeRecord(
        corpus="toy", system="small", seed=42, test_set="test", exit_layer=2, num_layers=4,
        method="greedy_search", wer=12.5, errors=3, insertions=1, deletions=0, substitutions=2, ref_words=24,
        num_utterances=5,
        fallback_utterances=0, audio_seconds=12.25, rtf=0.03, parameters=1000, macs_per_second=2.5e8, epoch=3,
        avg=2, training_seconds=61.5, world_size=1, device="cpu", config={"model": {"exit_layers": [2, 4]}},
        commit="0123abc", command="python -m splitformer.bin.decode", date="2026-01-02T03:04:05",
    )  # fmt: skip


def epoch_record(epoch: int, loss: float = 1.5) -> EpochRecord:
    per_exit = {2: loss, 10: loss / 2}
    return EpochRecord(epoch, 9.5, 1200.0, 0.02, 1e-3, loss, per_exit, per_exit, {2: 31.25, 10: 12.5})


def test_a_decode_record_loads_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "decode" / "test-exit-02-greedy_search.json"
    decode_record().save(path)
    assert DecodeRecord.load(path) == decode_record()
    assert list(json.loads(path.read_text())) == sorted(f.name for f in dataclasses.fields(DecodeRecord))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda values: values.update(cer=1.0), r"unknown keys \['cer'\]"),
        (lambda values: values.pop("rtf"), r"missing keys \['rtf'\]"),
    ],
)
def test_a_record_with_other_keys_is_refused_by_name(tmp_path: Path, change, named: str) -> None:
    path = tmp_path / "record.json"
    decode_record().save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=named) as raised:
        DecodeRecord.load(path)
    assert "record.json" in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json"):
        DecodeRecord.load(tmp_path / "record.json")


def test_error_counts_with_another_sum_are_refused() -> None:
    with pytest.raises(ValueError, match="4 errors are not"):
        dataclasses.replace(decode_record(), errors=4)


def test_the_training_log_replaces_epochs_that_are_trained_again(tmp_path: Path) -> None:
    log = tmp_path / "training.jsonl"
    assert read_training_log(log) == []
    for epoch in (1, 2, 3):
        append_epoch(log, epoch_record(epoch))
    assert read_training_log(log) == [epoch_record(1), epoch_record(2), epoch_record(3)]
    append_epoch(log, epoch_record(2, loss=0.5))  # a run resumed from epoch 1
    assert read_training_log(log) == [epoch_record(1), epoch_record(2, loss=0.5)]


def test_a_broken_line_of_the_training_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "training.jsonl"
    append_epoch(log, epoch_record(1))
    with log.open("a") as file:
        file.write('{"epoch": 2, "sec')
    with pytest.raises(UserError, match=r"training\.jsonl:2"):
        read_training_log(log)


@pytest.mark.parametrize(("mode", "content"), [("w", "grüße\n"), ("wb", b"\x00\xff")])
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, mode: str, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for _ in range(2):
        with atomic_write(path, mode) as file:
            file.write(content)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), atomic_write(path) as file:
        file.write("new")
        raise RuntimeError("halfway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'a'"), atomic_write("unused", "a"):
        pass


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, repo_root: Path, mode: str) -> None:
    """A limit on file sizes stops the write in the middle, as a full disk does; in a separate process."""
    path = tmp_path / "file"
    path.write_text("old")
    code = f"""
import resource, signal
from splitformer.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_write({str(path)!r}, {mode!r}) as file:
        for _ in range(300):
            file.write({'"x"' if mode == "w" else 'b"x"'} * 1000)
except OSError as error:
    print("refused:", error)
"""
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, cwd=repo_root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_git_commit_marks_changed_code_and_not_fresh_results(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert git_commit(tmp_path) == "unknown"
    code, table = tmp_path / "code.py", tmp_path / "egs" / "toy" / "RESULTS.md"
    table.parent.mkdir(parents=True)
    code.write_text("1\n")
    table.write_text("1\n")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "untracked").touch()
    table.write_text("2\n")
    assert git_commit(tmp_path) == commit
    code.write_text("2\n")
    assert git_commit(tmp_path) == f"{commit}+dirty"


def test_the_command_line_is_relative_to_the_repository(repo_root: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "command.py").write_text(
        "from splitformer.provenance import command_line\nfrom pathlib import Path\n"
        "print(command_line(Path(__file__).parents[1]))\n"
    )
    words = ["--output", str(tmp_path / "egs" / "x"), "a b"]
    done = subprocess.run(
        [sys.executable, "-m", "package.command", *words],
        cwd=tmp_path, env={"PYTHONPATH": f"{repo_root}:{tmp_path}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "python -m package.command --output egs/x 'a b'"
