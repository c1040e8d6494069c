"""`bin/doctor` in the recipe's own environment: all is well, until versions come first that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def doctor(repo_root: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*first, repo_root]))}
    command = [sys.executable, "-m", "splitformer.bin.doctor"]
    return subprocess.run(
        command, cwd=repo_root, env=environment, capture_output=True, text=True, check=False
    )


def test_the_recipe_can_run_here(repo_root: Path) -> None:
    done = doctor(repo_root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The recipe can run here." in done.stdout
    assert "PROBLEM" not in done.stdout


@pytest.mark.parametrize(
    ("name", "version", "remedy"), [("lhotse", "1.33.0", "lhotse==1.32.1"), ("numpy", "2.1.0", "'numpy<2'")]
)
def test_incompatible_versions_are_reported(
    repo_root: Path, tmp_path: Path, name: str, version: str, remedy: str
) -> None:
    info = tmp_path / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    done = doctor(repo_root, tmp_path)
    assert done.returncode == 1
    assert f"PROBLEM: {name} {version} is incompatible with torch" in done.stdout
    assert remedy in done.stdout
