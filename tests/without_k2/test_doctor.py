"""`bin/doctor` against environments with real problems: blocked imports, and packages that do not fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splitformer.doctor import (
    Options,
    built_for_torch,
    check_disk,
    check_shared_memory,
    has_kernels,
    pinned_torch,
    release,
    written,
)
from splitformer.errors import UserError

H100 = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda index: "NVIDIA H100 80GB HBM3"
torch.cuda.get_device_capability = lambda index: (9, 0)
torch.cuda.get_arch_list = lambda: ["sm_37", "sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86"]
"""
"""An H100 as torch 1.13.1+cu117 sees it."""


def doctor(
    repo_root: Path, *blocked: str, first: Path | None = None, arguments: tuple[str, ...] = (), before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the doctor where the modules `blocked` do not import and packages in `first` come before all.

    before: code that runs before it.
    """
    code = (
        f"import runpy, sys\n{before}\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        f"sys.argv[1:] = {arguments}\n"
        "runpy.run_module('splitformer.bin.doctor', run_name='__main__', alter_sys=True)\n"
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


def test_a_missing_package_stops_only_the_stages_that_need_it(repo_root: Path) -> None:
    def stages(*arguments: str) -> int:
        blocked = ("k2", "kaldilm", "matplotlib")
        return doctor(repo_root, *blocked, arguments=("--quiet", "--stages", *arguments)).returncode

    assert stages("manifests", "fbank", "bpe", "lm", "train", "average") == 0
    assert stages("decode", "--graphs", "none") == 0
    assert stages("report") == 1
    assert stages("lang", "graphs", "--graphs", "none") == 0
    for needy in (("lang",), ("graphs",), ("decode",), ("train", "--transducer"), ("lang", "--graphs", "words")):
        done = doctor(repo_root, "k2", arguments=("--quiet", "--stages", *needy))
        assert done.returncode == 1 and "PROBLEM: k2 " in done.stderr, needy
    done = doctor(repo_root, arguments=("--stages", "cook"))
    assert done.returncode == 1 and "--stages cook: choose among download, manifests" in done.stderr


def test_a_gpu_without_kernels_stops_the_stages_that_compute_on_it(repo_root: Path) -> None:
    for stage, status in (("train", 1), ("decode", 1), ("bpe", 0)):
        done = doctor(repo_root, arguments=("--quiet", "--graphs", "none", "--stages", stage), before=H100)
        assert done.returncode == status, done.stdout + done.stderr
        said = done.stderr if status else done.stdout
        assert "has no kernels for GPU 0 NVIDIA H100 80GB HBM3, compute capability 9.0" in said
        assert "GPUs that need a newer torch" in said and "CUDA_VISIBLE_DEVICES=" in said


@pytest.mark.parametrize(
    ("before", "problem"),
    [
        # what torch 1.13 does to Lhotse 1.33, and torch 1.13 to numpy 2
        ("from torch.utils.data import Sampler\ndef fail(*a, **k): raise TypeError('no source')\n"
         "Sampler.__init__ = fail",
         "TypeError: no source"),
        ("import torch\ndef fail(x): raise RuntimeError('Numpy is not available')\ntorch.Tensor.numpy = fail",
         "RuntimeError: Numpy is not available"),
    ],
)  # fmt: skip
def test_packages_that_do_not_work_together(repo_root: Path, before: str, problem: str) -> None:
    done = doctor(repo_root, arguments=("--quiet", "--stages", "train"), before=before)
    assert done.returncode == 1 and "does not work with torch" in done.stderr
    assert problem in done.stderr and "remedy: install" in done.stderr


def test_versions_alone_are_no_problem(repo_root: Path, tmp_path: Path) -> None:
    """The packages that are installed decide, not the numbers in their metadata."""
    for name, version in (("lhotse", "9.9"), ("numpy", "9.9.0")):
        install(tmp_path, name, version, {})
    done = doctor(repo_root, first=tmp_path, arguments=("--quiet", "--stages", "train"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_space_on_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9

    def problems(**options: object) -> list[str]:
        return [problem.what + problem.remedy for problem in check_disk(Options(**options))]

    assert not problems(store_hours=(f"{tmp_path}/data/feats=1",), store_gigabytes=(f"{tmp_path}/x={0.5 * free:.3f}",))
    # what goes to one disk is added up
    [problem] = problems(store_gigabytes=(f"{tmp_path}/new/x={0.7 * free:.3f}", f"{tmp_path}/y={0.7 * free:.3f}"))
    assert f"will be written below {tmp_path}" in problem and "--on-the-fly" in problem
    assert problems(store_hours=(f"{tmp_path}/feats=99999999",))
    # float32 takes three times the space of lilcom
    hours = f"{tmp_path}/feats={0.7 * free * 1e9 / 115.2e6:.1f}"
    assert not problems(store_hours=(hours,)) and problems(store_hours=(hours, hours), fbank="linear-mel")
    with pytest.raises(UserError, match="--store-hours feats: expected PATH=NUMBER"):
        problems(store_hours=("feats",))


def test_what_an_interrupted_run_wrote_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "feats/00000").mkdir(parents=True)
    (tmp_path / "feats/00000/feats.lca").write_bytes(bytes(3_000_000))
    (tmp_path / "corpus.tar.gz.part").write_bytes(bytes(2_000_000))
    assert 3_000_000 <= written(tmp_path / "feats") < 3_100_000
    assert 2_000_000 <= written(tmp_path / "corpus.tar.gz") < 2_100_000
    assert written(tmp_path / "none") == 0


def test_shared_memory_for_the_batches_of_loading_processes(tmp_path: Path) -> None:
    assert not check_shared_memory(Options(batch_seconds=10.0, num_workers=1))
    assert not check_shared_memory(Options(batch_seconds=1e12), tmp_path / "none")
    [problem] = check_shared_memory(Options(batch_seconds=1e12, num_workers=2))
    assert "2 loading processes" in problem.what
    assert "--shm-size" in problem.remedy and "--num-workers" in problem.remedy


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
