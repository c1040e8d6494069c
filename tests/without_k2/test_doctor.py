"""`bin/doctor` against environments with real problems: blocked imports, and packages that do not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitformer.bin.doctor import built_for_torch, has_kernels, pinned_torch, release


def doctor(repo_root: Path, *blocked: str, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the doctor where the modules `blocked` do not import and packages in `first` come before all."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "runpy.run_module('splitformer.bin.doctor', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, [first, repo_root])))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=repo_root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def install(folder: Path, name: str, version: str, files: dict[str, str], *requires: str) -> None:
    """Put a package with these metadata and files into `folder`, as an installer does."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    lines += [f"Requires-Dist: {wanted}" for wanted in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_what_does_not_import_is_named_with_the_remedy(repo_root: Path) -> None:
    done = doctor(repo_root, "k2", "kaldialign")
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("k2", "kaldialign"):
        problem = next(line for line in done.stdout.splitlines() if line.startswith(f"PROBLEM: {name} "))
        assert "needed for" in problem
    assert "./setup.sh" in done.stdout
    assert "The recipe cannot run here" in done.stdout


def test_k2_for_another_torch(repo_root: Path, tmp_path: Path) -> None:
    version = 'k2_torch_version = "9.8.7+cu999"\nk2_torch_cuda_version = "99.9"\n'
    broken = 'raise ImportError("libtorch_cuda_of_another_torch.so: cannot open shared object file")\n'
    install(tmp_path, "k2", "1.99.0", {"k2/__init__.py": broken, "k2/torch_version.py": version})
    done = doctor(repo_root, first=tmp_path)
    assert done.returncode == 1
    assert "k2 was built for torch 9.8.7+cu999, this is" in done.stdout
    assert "libtorch_cuda_of_another_torch.so" in done.stdout


def test_versions_are_printed_and_optional_packages_may_be_missing(repo_root: Path) -> None:
    done = doctor(repo_root, "kaldifeat", "torchaudio")
    printed = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert torch.__version__.split("+")[0] in printed["torch"]
    assert "CUDA" in printed["torch"]
    assert sys.executable in printed["python"]
    for name in ("kaldifeat", "torchaudio"):
        assert "MISSING" in printed[name] or "DOES NOT IMPORT" in printed[name]
        assert f"PROBLEM: {name}" not in done.stdout


def test_torch_version_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = '# x\nmadeup_torch_version = "2.1.0+cpu"\n'
    install(tmp_path, "madeup", "1.0", {"madeup/torch_version.py": version})
    install(tmp_path, "pinned", "1.0", {}, "numpy", "torch (==1.13.1)")
    install(tmp_path, "free", "1.0", {}, "torch>=1.10")
    monkeypatch.syspath_prepend(tmp_path)
    assert built_for_torch("madeup") == "2.1.0+cpu"
    assert built_for_torch("pinned") is None
    assert pinned_torch("pinned") == "1.13.1"
    assert pinned_torch("free") is None
    assert pinned_torch("absent") is None


def test_release() -> None:
    assert release("1.13.1+cu117") == (1, 13, 1)
    assert release("1.24.4.dev20240223") == (1, 24, 4)
    assert release("") == ()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ["sm_37", "sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((10, 0), ["sm_90", "sm_120"], False),
        ((8, 6), [], False),
    ],
)
def test_has_kernels(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    assert has_kernels(capability, architectures) is runs
