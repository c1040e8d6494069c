"""Say what this Python environment has, what is missing or does not fit together, and the remedy.

    python -m splitformer.bin.doctor

The exit status is 0 where the recipe can run from preparation to report, and 1 where it cannot.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

SETUP = "run ./setup.sh, and the recipe with .venv/bin/python as run.sh does"
NEWER_TORCH = "see 'GPUs that need a newer torch' in README.md"


@dataclass(frozen=True)
class Package:
    name: str  # as Python imports it
    needed_for: str
    optional: bool = False


PACKAGES = (
    Package("numpy", "everything"),
    Package("torch", "everything"),
    Package("k2", "lang folders, decoding graphs, ctc-decoding and 1best"),
    Package("lhotse", "data preparation, training and decoding"),
    Package("soundfile", "reading audio"),
    Package("sentencepiece", "tokens"),
    Package("kaldilm", "language models in graphs"),
    Package("kaldialign", "word error rates"),
    Package("tqdm", "progress bars"),
    Package("tensorboard", "training"),
    Package("matplotlib", "the report's plots"),
    *([Package("tomli", "configurations")] if sys.version_info < (3, 11) else []),
    Package("torchaudio", "some of Lhotse's readers and augmentations", optional=True),
    Package("kaldifeat", "--fbank kaldifeat", optional=True),
    Package("lilcom", "compressed feature files", optional=True),
    Package("onnx", "bin/export", optional=True),
    Package("onnxruntime", "bin/export: running what it wrote, int8", optional=True),
    Package("sherpa_onnx", "tests of exported models", optional=True),
    Package("safetensors", "released weights in that format, and exporting to it", optional=True),
    Package("espeakng_loader", "the corpus that the recipe synthesises", optional=True),
)


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do about it; `fatal` where the recipe cannot run with it."""

    what: str
    remedy: str
    fatal: bool = True


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (1, 13, 1) for "1.13.1+cu117"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()


def installed_version(name: str) -> str | None:
    """The version on disk, found without importing; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def built_for_torch(name: str) -> str | None:
    """The torch version that k2 or kaldifeat was compiled against, from its own file, not imported.

    Both refuse another torch, or crash in it, so their own word is read and not asked for.
    """
    try:
        file = Path(str(metadata.distribution(name).locate_file(f"{name}/torch_version.py")))
        text = file.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(rf'^{name}_torch_version = "(.*)"', text, re.MULTILINE)
    return found[1] if found else None


def pinned_torch(name: str) -> str | None:
    """The one torch version that the package's metadata asks for; None where it admits several."""
    try:
        wanted = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None
    found = [m[1] for m in (re.match(r"torch\s*\(?==\s*([\w.+]+)\)?\s*$", line) for line in wanted) if m]
    return found[0] if found else None


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU runs code that was compiled for `architectures`.

    Machine code ("sm_86") runs on the same major and the same or a higher minor capability, PTX
    ("compute_80") on every later one.

    Args:
      capability: of the GPU, (major, minor).
      architectures: as `torch.cuda.get_arch_list()` gives them.
    """
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = re.sub(r"\D", "", digits)
        if not digits:
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]) or (
            kind == "compute" and built <= capability
        ):
            return True
    return False


def check_versions(versions: dict[str, str]) -> list[Problem]:
    """Versions that are known not to go together.

    Args:
      versions: package name -> version, of what is installed.
    """
    problems = []
    torch = versions.get("torch")
    if torch is None:
        return problems
    for name in ("k2", "torchaudio", "kaldifeat"):
        built = built_for_torch(name) or pinned_torch(name)
        if name in versions and built and release(built) != release(torch):
            what = f"{name} was built for torch {built}, this is {torch}"
            remedy = f"install the {name} that was built for torch {torch} ({NEWER_TORCH}), or {SETUP}"
            problems.append(Problem(what, remedy, fatal=name == "k2"))
    lhotse = versions.get("lhotse")
    if lhotse and release(torch) < (2,) and release(lhotse) > (1, 32, 1):
        problems.append(
            Problem(
                f"lhotse {lhotse} does not go with torch {torch}: its samplers do not start",
                f"install lhotse==1.32.1, the last for torch 1.13, or {SETUP}",
            )
        )
    numpy = versions.get("numpy")
    if numpy and release(numpy) >= (2,) and release(torch) < (2, 3):
        problems.append(
            Problem(
                f"numpy {numpy} does not go with torch {torch}, which was built against numpy 1",
                f"install 'numpy<2', or {SETUP}",
            )
        )
    return problems


def check_gpus(torch: ModuleType) -> tuple[list[str], list[Problem]]:
    """Descriptions of the GPUs that torch sees, and what is wrong with them."""
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            what = f"an NVIDIA driver is loaded, but torch (for CUDA {torch.version.cuda}) sees no GPU"
            remedy = f"look at CUDA_VISIBLE_DEVICES and at the CUDA version in nvidia-smi; {NEWER_TORCH}"
            return [], [Problem(what, remedy, fatal=False)]
        return [], []
    lines, problems = [], []
    architectures = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        described = f"GPU {i} {name}, compute capability {capability[0]}.{capability[1]}"
        lines.append(described)
        if not has_kernels(capability, architectures):
            what = f"torch {torch.__version__} has no kernels for {described}, only {' '.join(architectures)}"
            remedy = f"{NEWER_TORCH}; CUDA_VISIBLE_DEVICES= hides the GPU and computes on the CPU"
            problems.append(Problem(what, remedy))
    return lines, problems


def import_error(name: str) -> str | None:
    """Why the package does not import, in one line; None where it does."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary package raises nearly anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def remedy_for(package: Package, versions: dict[str, str]) -> str:
    """What to do where the package is missing or broken."""
    if package.name == "k2" and release(versions.get("torch", "")) >= (2,):
        return (
            f"install the k2 that was built for torch {versions['torch']} ({NEWER_TORCH}), or {SETUP}; "
            "training, averaging and the report do without"
        )
    return SETUP


def examine() -> tuple[list[tuple[str, str, str]], list[Problem]]:
    """Rows (name, version, remark) on everything the recipe uses, and the problems."""
    rows = [("python", sys.version.split()[0], sys.executable)]
    problems = []

    versions = {p.name: v for p in PACKAGES if (v := installed_version(p.name)) is not None}
    mismatches = check_versions(versions)
    for package in PACKAGES:
        error = import_error(package.name)
        version = versions.get(package.name)
        remarks = [f"optional, for {package.needed_for}"] if package.optional else []
        if error is not None:
            remarks.insert(0, "MISSING" if version is None else "DOES NOT IMPORT")
            if version is not None or not package.optional:  # else the row says enough
                state = "is missing" if version is None else f"{version} does not import: {error}"
                what = f"{package.name} {state}; it is needed for {package.needed_for}"
                problems.append(Problem(what, remedy_for(package, versions), not package.optional))
        elif package.name == "torch":
            torch = sys.modules["torch"]
            gpus, gpu_problems = check_gpus(torch)
            cuda = torch.version.cuda
            remarks.append(f"built for CUDA {cuda}" if cuda else "built without CUDA")
            remarks += gpus or ["no GPU: computes on the CPU"]
            problems += gpu_problems
        if built := built_for_torch(package.name):
            remarks.append(f"built for torch {built}")
        rows.append((package.name, version or "-", "; ".join(remarks)))
    return rows, mismatches + problems


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    rows, problems = examine()
    for name, version, remark in rows:
        print(f"{name:<16} {version:<16} {remark}".rstrip())
    for problem in problems:
        print(f"\n{'PROBLEM' if problem.fatal else 'note'}: {problem.what}\n  remedy: {problem.remedy}")
    fatal = sum(problem.fatal for problem in problems)
    verdict = f"cannot run here: {fatal} of the above must be mended" if fatal else "can run here"
    print(f"\nThe recipe {verdict}.")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
