"""The package as it installs: a wheel in an environment with torch and its own dependencies, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from tests.speech import RATE, bursts, write_checkpoint

# What the recipe's environment has and the recogniser must do without.
ABSENT = ("k2", "lhotse", "sentencepiece", "kaldialign", "kaldilm", "torchaudio", "onnx", "matplotlib", "tensorboard")


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=folder, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def installed(repo_root: Path, tmp_path_factory) -> Path:
    """The folder `bin` of an environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"  # a build leaves files beside the sources
    tracked = run(["git", "ls-files", "-z", "splitformer", "pyproject.toml", "README.md", "LICENSE"], repo_root).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo_root / name, source / name)
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], folder)
    [wheel] = folder.glob("splitformer-*.whl")
    local_uv = repo_root / ".cache/uv/bin/uv"
    uv = local_uv if local_uv.is_file() else "uv"
    release = torch.__version__.partition("+")[0]
    packages = f"torch=={release} {'numpy<2' if release.startswith('1.') else 'numpy'} {wheel}"
    script = f"""
        source requirements/index.sh
        "{uv}" venv -q --python "{sys.executable}" "{folder}/env"
        "{uv}" pip install -q -p "{folder}/env/bin/python" {" ".join(f'"{each}"' for each in packages.split())}
    """
    run(["bash", "-euc", script], repo_root)
    return folder / "env/bin"


def test_the_wheel_brings_no_more_than_it_needs(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    assert run([installed / "python", "-c", code, *ABSENT], tmp_path).stdout.strip() == "[]"
    code = "import splitformer, pathlib; print((pathlib.Path(splitformer.__file__).parent / 'py.typed').is_file())"
    assert run([installed / "python", "-c", code], tmp_path).stdout.strip() == "True"


def test_the_readme_example_runs_as_installed(installed: Path, repo_root: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "averaged.pt", num_layers=4, exit_layers=(2, 4))
    soundfile.write(tmp_path / "meeting.wav", bursts(30.0), RATE)
    readme = (repo_root / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    lines = run([installed / "python", "-c", code], tmp_path).stdout.splitlines()
    assert len(lines) >= 2  # longer than a segment may be
    ends = [tuple(map(float, line.split()[:2])) for line in lines]
    assert ends[0][0] == 0.0 and ends[-1][1] == pytest.approx(30.0, abs=0.01)
    assert {line.split()[-1] for line in lines} == {"4"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["averaged.pt", "meeting.wav"], "no files are written"


HELP_OF = sorted(path.stem for path in (Path(__file__).parents[2] / "splitformer/bin").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", HELP_OF)
def test_help_states_one_default_per_option(name: str, repo_root: Path) -> None:
    shown = run([sys.executable, "-m", f"splitformer.bin.{name}", "--help"], repo_root).stdout
    entries = re.split(r" (?=--[a-z])", " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split()))
    assert len(entries) > 2
    for entry in entries:
        assert "(default: None)" not in entry and "(default: )" not in entry and entry.count("(default") <= 1, entry


def test_the_command_lists_its_sub_commands_and_runs_them(installed: Path, tmp_path: Path) -> None:
    listed = run([installed / "splitformer", "--help"], tmp_path).stdout
    for name in ("train", "decode", "transcribe", "export", "import-released", "doctor"):
        assert f"\n  {name} " in listed
    write_checkpoint(tmp_path / "averaged.pt")
    soundfile.write(tmp_path / "a.wav", bursts(2.0), RATE)
    arguments = ["transcribe", "--checkpoint", "averaged.pt", "--exit", "1", "a.wav"]
    by_command = run([installed / "splitformer", *arguments], tmp_path).stdout
    by_module = run([installed / "python", "-m", "splitformer.bin.transcribe", *arguments[1:]], tmp_path).stdout
    assert by_command == by_module and by_command.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "unknown command 'tarin'"),
        (["transcribe", "--checkpoint", "none.pt", "a.wav"], "splitformer transcribe: there is no checkpoint none.pt"),
    ],
)
def test_errors_of_users_are_one_line(installed: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [installed / "splitformer", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "decode"])
def test_a_missing_package_is_named(installed: Path, repo_root: Path, tmp_path: Path, command: str) -> None:
    """Whether the command imports it at once or as it runs."""
    (tmp_path / "conf.toml").write_text("")
    options = {
        "train": "--config conf.toml --train-cuts a --dev-cuts a --lang-dir . --exp-dir exp",
        "decode": "--checkpoint a.pt --cuts a=a --lang-dir . --output-dir out",
    }[command]
    arguments = [installed / "splitformer", command, *options.split()]
    done = subprocess.run(list(map(str, arguments)), cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "pip install 'splitformer[train]'" in done.stderr, done.stderr
