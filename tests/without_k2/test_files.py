"""Folders that appear whole, made by several processes at once or left by killed ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from splitformer.files import atomic_folder, remove_abandoned

ROOT = Path(__file__).resolve().parents[2]
MAKE = """
import sys, time
from pathlib import Path
from splitformer.files import atomic_folder
for number in range(int(sys.argv[2])):
    with atomic_folder(sys.argv[1]) as folder:
        (folder / "a").write_text("whole")
        (folder / "deep").mkdir()
        (folder / "deep/b").write_text("whole")
        time.sleep(float(sys.argv[3]))
"""


def start(path: Path, times: int, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKE, str(path), str(times), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stderr=subprocess.PIPE)


def test_processes_that_make_one_folder_do_not_destroy_each_other(tmp_path: Path) -> None:
    processes = [start(tmp_path / "shard", 60, 0.002) for _ in range(4)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard"]
    assert (tmp_path / "shard/deep/b").read_text() == (tmp_path / "shard/a").read_text() == "whole"


def test_only_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    alive, killed = start(tmp_path / "alive", 1, 30), start(tmp_path / "killed", 1, 30)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob(".*.tmp/deep/b"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        remove_abandoned(tmp_path)
        assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["alive"]
    finally:
        alive.kill()
        alive.wait()


def test_whatever_stands_in_the_place_of_a_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("file", "link"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / "new").touch()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"] and not (tmp_path / name).is_symlink()
    assert (tmp_path / "elsewhere/kept").exists()
