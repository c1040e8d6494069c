"""Check this Python environment: what it has, what is missing or does not fit together, and the remedy."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from splitformer.cli import command

SETUP = "run ./setup.sh, and the recipe with .venv/bin/python as run.sh does"
NEWER_TORCH = "see 'GPUs that need a newer torch' in docs/training.md"

REQUIRED = {
    "numpy": "everything",
    "torch": "everything",
    "tyro": "commands",
    "rapidfuzz": "edit distances",
    "k2": "lexicons, decoding graphs and the searches that read them, transducer training",
    "lhotse": "data preparation, training and decoding",
    "soundfile": "reading audio",
    "sentencepiece": "tokens",
    "kaldilm": "language models in graphs",
    "kaldialign": "word error rates",
    "filelock": "training",
    "tensorboard": "training",
    "tqdm": "progress bars",
    "matplotlib": "the report's plots",
    **({"tomli": "configurations"} if sys.version_info < (3, 11) else {}),
}
OPTIONAL = {
    "torchaudio": "some of Lhotse's readers and augmentations",
    "kaldifeat": "--fbank kaldifeat",
    "lilcom": "compressed feature files",
    "onnx": "splitformer export",
    "onnxruntime": "running exported models, and int8",
    "sherpa_onnx": "tests of exported models",
    "safetensors": "weights in that format",
    "espeakng_loader": "the synthesised corpus",
}
"""{package, as Python imports it: what needs it}"""


@dataclass(frozen=True)
class Options:
    """Check this Python environment. The exit status is 0 if the recipe can run, and 1 if it cannot."""

    verbose: bool = False
    """also print what torch.utils.collect_env reports, for a bug report"""


@dataclass(frozen=True)
class Problem:
    """A problem and its remedy; the recipe cannot run with a `fatal` one."""

    what: str
    remedy: str
    fatal: bool = True


def run(options: Options) -> int:
    rows, problems = examine()
    for name, version, remark in rows:
        print(f"{name:<16} {version:<16} {remark}".rstrip())
    if options.verbose:
        from torch.utils import collect_env

        print(f"\n{collect_env.get_pretty_env_info()}")
    for problem in problems:
        print(f"\n{'PROBLEM' if problem.fatal else 'note'}: {problem.what}\n  remedy: {problem.remedy}")
    fatal = sum(problem.fatal for problem in problems)
    verdict = f"cannot run here: fix the {fatal} problem{'s' * (fatal > 1)} above" if fatal else "can run here"
    print(f"\nThe recipe {verdict}.")
    return 1 if fatal else 0


def examine() -> tuple[list[tuple[str, str, str]], list[Problem]]:
    """Rows (name, version, remark) of Python and every package of the recipe, and the problems."""
    rows = [("python", sys.version.split()[0], sys.executable)]
    versions = {name: version for name in (*REQUIRED, *OPTIONAL) if (version := installed_version(name))}
    problems = check_versions(versions)
    for name, needed_for in {**REQUIRED, **OPTIONAL}.items():
        version, error = versions.get(name), import_error(name)
        remarks = [f"optional, for {needed_for}"] if name in OPTIONAL else []
        if error is not None:
            remarks.insert(0, "MISSING" if version is None else "DOES NOT IMPORT")
            if version is not None or name in REQUIRED:  # the row says enough of an optional package that is missing
                state = "is missing" if version is None else f"{version} does not import: {error}"
                remedy = SETUP
                if name == "k2" and release(versions.get("torch", "")) >= (2,):
                    remedy = f"install the k2 that was built for torch {versions['torch']} ({NEWER_TORCH}), or {SETUP}"
                what = f"{name} {state}; it is needed for {needed_for}"
                problems.append(Problem(what, remedy, fatal=name in REQUIRED))
        elif name == "torch":
            torch = sys.modules["torch"]
            gpus, gpu_problems = check_gpus(torch)
            remarks.append(f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA")
            remarks += gpus or ["no GPU: computes on the CPU"]
            problems += gpu_problems
        if built := built_for_torch(name):
            remarks.append(f"built for torch {built}")
        rows.append((name, version or "-", "; ".join(remarks)))
    return rows, problems


def check_versions(versions: dict[str, str]) -> list[Problem]:
    """Installed versions {package: version} that are known not to go together."""
    torch = versions.get("torch")
    if torch is None:
        return []
    problems = []
    for name in ("k2", "torchaudio", "kaldifeat"):
        built = built_for_torch(name) or pinned_torch(name)
        if name in versions and built and release(built) != release(torch):
            remedy = f"install the {name} that was built for torch {torch} ({NEWER_TORCH}), or {SETUP}"
            problems.append(Problem(f"{name} was built for torch {built}, this is {torch}", remedy, fatal=name == "k2"))
    lhotse, numpy = versions.get("lhotse", ""), versions.get("numpy", "")
    if release(torch) < (2,) and release(lhotse) > (1, 32, 1):
        what = f"lhotse {lhotse} is incompatible with torch {torch}: its samplers fail"
        problems.append(Problem(what, f"install lhotse==1.32.1, the last for torch 1.13, or {SETUP}"))
    if release(torch) < (2, 3) and release(numpy) >= (2,):
        what = f"numpy {numpy} is incompatible with torch {torch}, which was built against numpy 1"
        problems.append(Problem(what, f"install 'numpy<2', or {SETUP}"))
    return problems


def check_gpus(torch: ModuleType) -> tuple[list[str], list[Problem]]:
    """Descriptions of the GPUs that torch sees, and what is wrong with them."""
    if not torch.cuda.is_available():
        if not Path("/proc/driver/nvidia/version").exists():
            return [], []
        what = f"an NVIDIA driver is loaded, but torch (for CUDA {torch.version.cuda}) sees no GPU"
        remedy = f"check CUDA_VISIBLE_DEVICES and the CUDA version in nvidia-smi; {NEWER_TORCH}"
        return [], [Problem(what, remedy, fatal=False)]
    lines, problems = [], []
    architectures = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        name = f"GPU {i} {torch.cuda.get_device_name(i)}, compute capability {capability[0]}.{capability[1]}"
        lines.append(name)
        if not has_kernels(capability, architectures):
            what = f"torch {torch.__version__} has no kernels for {name}, only {' '.join(architectures)}"
            remedy = f"{NEWER_TORCH}; CUDA_VISIBLE_DEVICES= hides the GPU and computes on the CPU"
            problems.append(Problem(what, remedy))
    return lines, problems


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU of compute capability (major, minor) runs code compiled for `torch.cuda.get_arch_list()`.

    Machine code ("sm_86") runs on the same major and the same or a higher minor capability, PTX ("compute_80") on every
    later one.
    """
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]*", architecture)
        if found is None:
            continue
        built = (int(found[2]), int(found[3]))
        same_major = found[1] == "sm" and built[0] == capability[0] and built[1] <= capability[1]
        if same_major or (found[1] == "compute" and built <= capability):
            return True
    return False


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (1, 13, 1) for "1.13.1+cu117"."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()


def installed_version(name: str) -> str | None:
    """The version on disk, found without importing; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def built_for_torch(name: str) -> str | None:
    """The torch version that k2 or kaldifeat was compiled against, read from its own file.

    With another torch both refuse to import, or crash, so that they cannot be asked.
    """
    try:
        file = Path(str(metadata.distribution(name).locate_file(f"{name}/torch_version.py")))
        text = file.read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return None
    found = re.search(rf'^{name}_torch_version = "(.*)"', text, re.MULTILINE)
    return found[1] if found else None


def pinned_torch(name: str) -> str | None:
    """The single torch version that the package's metadata requires; None if it allows several."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None
    found = [m[1] for m in (re.match(r"torch\s*\(?==\s*([\w.+]+)\)?\s*$", line) for line in requirements) if m]
    return found[0] if found else None


def import_error(name: str) -> str | None:
    """Why the package does not import, in one line; None if it does."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary package raises nearly anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


if __name__ == "__main__":
    sys.exit(command(run))
