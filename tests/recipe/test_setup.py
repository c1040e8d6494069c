"""setup.sh: nothing to do the second time, and nothing claimed where it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


def set_up(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["./setup.sh", *options],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(repo_root: Path, tmp_path: Path) -> Path:
    """A folder with setup.sh and what it reads, and with the uv that the repository's own set-up took."""
    shutil.copy(repo_root / "setup.sh", tmp_path)
    shutil.copytree(repo_root / "requirements", tmp_path / "requirements")
    if (repo_root / ".cache/uv").is_dir():
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache/uv").symlink_to(repo_root / ".cache/uv")
    return tmp_path


def test_a_second_call_does_nothing(repo_root: Path) -> None:
    if Path(sys.prefix) != repo_root / ".venv":
        pytest.skip(f"runs in {sys.prefix}, which setup.sh did not make: use ./tests/run.sh")
    made = repo_root / ".venv/.fingerprint"
    before, start = made.stat().st_mtime_ns, time.monotonic()
    done = set_up(repo_root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 1
    assert made.stat().st_mtime_ns == before


def test_failed_setup_cleans_up(copy: Path) -> None:
    (copy / "requirements/torch2.lock").write_text("no-such-package @ file:///no/such-1.0-py3-none-any.whl\n")
    for _ in range(2):  # a failure is not remembered as a success either
        done = set_up(copy, "--torch2")
        assert done.returncode != 0
        assert "could not install requirements/torch2.lock" in done.stderr
        assert not (copy / ".venv-torch2/.fingerprint").exists()
    assert {f.name for f in (copy / ".cache").iterdir()} <= {"lock", "uv"}


def test_a_package_that_does_not_import_is_a_failure(copy: Path) -> None:
    (copy / "requirements/torch2.lock").write_text("")
    done = set_up(copy, "--torch2")
    assert done.returncode != 0
    assert "No module named 'torch'" in done.stderr
    assert not (copy / ".venv-torch2/.fingerprint").exists()


def test_unknown_arguments_are_refused(copy: Path) -> None:
    done = set_up(copy, "--torch3")
    assert done.returncode == 2
    assert "'--torch3'" in done.stderr
    assert "--torch2" in done.stderr
