"""`bin/doctor` in the recipe's own environment: all is well, until versions come first that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitformer.doctor import REQUIRED, STAGES


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


SCRIPTS = {
    "download": ["local/fetch_archive.py"],
    "manifests": ["local/manifests_from_recipe.py", "local/manifests_from_source.py", "local/validate_cuts.py"],
    "fbank": ["local/compute_fbank.py", "local/make_cuts.py", "local/export_shar.py"],
    "bpe": ["local/export_text.py", "local/train_bpe.py"],
    "lang": ["local/prepare_lang.py"],
    "lm": ["local/estimate_lm.py", "local/prune_lm.py"],
    "graphs": ["local/compile_graphs.py"],
    "train": ["splitformer.bin.train", "splitformer.training.loop"],
    "average": ["splitformer.bin.average", "local/use_checkpoint.py"],
    "decode": ["splitformer.bin.decode"],
    "early_exit": ["splitformer.bin.tradeoff", "splitformer.bin.calibrate"],
    "report": ["splitformer.bin.report"],
}


@pytest.mark.slow
def test_the_packages_of_a_stage_are_all_that_it_imports(repo_root: Path) -> None:
    assert set(SCRIPTS) == set(STAGES)
    for stage, scripts in SCRIPTS.items():
        others = [name for name, (_, stages) in REQUIRED.items() if stage not in stages]
        code = f"import importlib, runpy, sys; sys.modules.update(dict.fromkeys({others}))\n"
        for script in scripts:
            is_file = script.endswith(".py")
            code += f"runpy.run_path({script!r})\n" if is_file else f"importlib.import_module({script!r})\n"
        environment = {**os.environ, "PYTHONPATH": str(repo_root)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=repo_root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
