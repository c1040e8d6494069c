"""benchmarks/gpu.sh: its checks pass on a CPU, with torch alone, and a failed check is on the page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# packages that a machine with torch alone lacks
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("k2", "lhotse", "tyro", "sentencepiece", "soundfile", "kaldialign", "rapidfuzz"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def gpu(repo_root: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(BLOCK)
    command = [repo_root / "benchmarks/gpu.sh", "--device", "cpu", "--quick", "--output", folder / "gpu.md", *arguments]
    env = {**os.environ, "SPLITFORMER_PYTHON": sys.executable, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], text=True, capture_output=True, env=env)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("1."), reason="benchmarks/gpu.sh needs torch 2")
def test_the_checks_pass_on_a_cpu_with_torch_alone(repo_root: Path, tmp_path: Path) -> None:
    done = gpu(repo_root, tmp_path, "--only", "same", "steps", "ranks", "throughput", "run")
    page = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + page
    assert "**NO**" not in page and "seconds of audio per second" in page and "give --train-cuts" in page


def test_without_a_gpu_the_remedy_is_named(repo_root: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        return
    done = gpu(repo_root, tmp_path, "--device", "cuda")
    assert done.returncode == 2 and "give --device cpu --quick" in done.stderr, done.stderr
