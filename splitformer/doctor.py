"""What this machine and its Python environment lack for the stages of the recipe, with remedies."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

from splitformer.cli import EXTRAS
from splitformer.errors import UserError

IS_CLONE = (Path(__file__).parents[1] / "setup.sh").is_file()
SETUP = "run ./setup.sh, and the recipe with .venv/bin/python as run.sh does"
RECOGNIZER = ("numpy", "torch", "tyro", "tqdm", "rapidfuzz", "soundfile")
"""packages of `splitformer transcribe` and the Python API"""
NEWER_TORCH = "see 'GPUs that need a newer torch' in docs/training.md"

STAGES = (
    "download", "manifests", "fbank", "bpe", "lang", "lm", "graphs",
    "train", "average", "decode", "early_exit", "report",
)  # fmt: skip
SEARCHING = ("decode", "early_exit")

# {package, as Python imports it: (what needs it, stages that need it)}
REQUIRED: dict[str, tuple[str, tuple[str, ...]]] = {
    "numpy": ("everything", STAGES),
    "torch": ("everything", STAGES),
    "tyro": ("commands", STAGES),
    "tqdm": ("progress bars", STAGES),
    **({"tomli": ("configurations", STAGES)} if sys.version_info < (3, 11) else {}),
    "lhotse": ("data", ("download", "manifests", "fbank", "bpe", "train", *SEARCHING)),
    "soundfile": ("reading audio", ("download", "manifests", "fbank", "bpe", "train", *SEARCHING)),
    "sentencepiece": ("tokens", ("manifests", "fbank", "bpe", "lang", "train", *SEARCHING)),
    "rapidfuzz": ("edit distances", ("train", *SEARCHING)),
    "k2": ("lexicons, decoding graphs and searches, training a transducer", ("lang", "graphs", "train", *SEARCHING)),
    "kaldilm": ("language models in graphs", ("graphs",)),
    "filelock": ("data and training", ("download", "manifests", "fbank", "bpe", "train", *SEARCHING)),
    "tensorboard": ("training", ("train",)),
    "kaldialign": ("word error rates", SEARCHING),
    "matplotlib": ("the report's plots", ("report",)),
}
OPTIONAL = {
    "torchaudio": "--fbank linear-mel, some of Lhotse's readers",
    "kaldifeat": "--fbank kaldifeat",
    "lilcom": "compressed features: without it, those of each utterance are a file, and three times as large",
    "onnx": "splitformer export",
    "onnxruntime": "running exported models, and int8",
    "sherpa_onnx": "tests of exported models",
    "safetensors": "weights in that format",
    "distributed": "--executor dask:ADDRESS",
    "espeakng_loader": "the synthesised corpus",
}
"""{package: what needs it}"""
LILCOM_BYTES, FLOAT_BYTES = 35.3e6, 115.2e6
"""Bytes of an hour of features with 80 bins: as lilcom packs them (docs/data_at_scale.md), and as float32."""
PREFETCHED = 2
"""Batches that a loading process keeps ready in shared memory: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Check this machine and Python environment. The exit status is 0 if the stages can run, and 1 if they cannot."""

    verbose: bool = False
    """also print what torch.utils.collect_env reports, for a bug report"""
    quiet: bool = False
    """print problems alone"""
    stages: tuple[str, ...] = ()
    """stages of run.sh that are to run (default: all)"""
    graphs: str = "HLG LG G"
    """decoding graphs that they make and read; 'words' for the lexicon alone, 'none'"""
    transducer: bool = False
    """the model that is trained has a transducer"""
    fbank: Literal["lhotse", "kaldifeat", "linear-mel"] = "lhotse"
    """program that computes the features"""
    num_mel_bins: int = 80
    """features per frame"""
    store_hours: tuple[str, ...] = ()
    """DIR=HOURS: hours of audio whose features are to be stored there; of one DIR, all are added"""
    store_gigabytes: tuple[str, ...] = ()
    """PATH=GB: size of a file or folder that is to be written"""
    batch_seconds: float = 0.0
    """seconds of audio in a training batch, of all processes together"""
    num_workers: int = 1
    """data loading processes of each training process"""


@dataclass(frozen=True)
class Problem:
    """A problem and its remedy; the recipe cannot run with a `fatal` one."""

    what: str
    remedy: str
    fatal: bool = True
    package: str = ""


def needed(options: Options) -> dict[str, str]:
    """Return {package: what needs it} for the packages without which the selected stages do not run."""
    stages = set(options.stages or STAGES)
    graphs = set() if options.graphs == "none" else set(options.graphs.split())
    packages = {name: purpose for name, (purpose, of) in REQUIRED.items() if stages & set(of)}
    if options.stages:  # else everything is asked for
        k2_stages = {"lang"} if graphs else set()
        k2_stages |= {"graphs", *SEARCHING} if graphs - {"words"} else set()
        k2_stages |= {"train"} if options.transducer else set()
        if not stages & k2_stages:
            packages.pop("k2", None)
        if not graphs - {"words"}:
            packages.pop("kaldilm", None)
    if "fbank" in stages and options.fbank != "lhotse":
        name = "kaldifeat" if options.fbank == "kaldifeat" else "torchaudio"
        packages[name] = f"--fbank {options.fbank}"
    return packages


def examine(options: Options) -> tuple[list[tuple[str, str, str]], list[Problem]]:
    """Rows (name, version, remark) of Python and every package of the recipe, and the problems."""
    rows = [("python", sys.version.split()[0], sys.executable)]
    purposes = {**{name: purpose for name, (purpose, _) in REQUIRED.items()}, **OPTIONAL}
    versions = {name: version for name in purposes if (version := installed_version(name))}
    required = needed(options)
    asked = required if options.quiet else purposes  # importing everything takes seconds
    problems = [each for each in check_versions(versions) if not options.quiet or each.package in asked]
    for name, purpose in purposes.items():
        if name not in asked:
            continue
        version, error = versions.get(name), import_error(name)
        remarks = [] if name in required else [f"optional, for {purpose}" if name in OPTIONAL else f"for {purpose}"]
        if error is not None:
            remarks.insert(0, "MISSING" if version is None else "DOES NOT IMPORT")
            if version is not None or name in required:  # the row says enough of an optional package that is missing
                state = "is missing" if version is None else f"{version} does not import: {error}"
                remedy = SETUP if IS_CLONE else f"pip install {_requirement(name)}"
                if name == "k2" and release(versions.get("torch", "")) >= (2,):
                    remedy = f"install the k2 that was built for torch {versions['torch']} ({NEWER_TORCH}), or {SETUP}"
                what = f"{name} {state}; it is needed for {required.get(name, purpose)}"
                problems.append(Problem(what, remedy, fatal=name in required, package=name))
        elif name == "torch":
            torch = sys.modules["torch"]
            gpus, gpu_problems = check_gpus(torch, uses_gpu(options))
            remarks.append(f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA")
            remarks += gpus or ["no GPU: computes on the CPU"]
            problems += gpu_problems
        if built := built_for_torch(name):
            remarks.append(f"built for torch {built}")
        rows.append((name, version or "-", "; ".join(remarks)))
    for names, check in WORK_TOGETHER.items():
        if all(name in required and sys.modules.get(name) for name in names):
            problems += try_together(names, versions, check)
    if "fbank" in (options.stages or STAGES) and options.fbank != "linear-mel" and "lilcom" not in versions:
        what = f"lilcom is missing; it is for {OPTIONAL['lilcom']}"
        problems.append(Problem(what, "pip install lilcom", fatal=False, package="lilcom"))
    return rows, problems


def _requirement(package: str) -> str:
    """Return what pip is to install: an extra of this package that brings `package`, or the package itself."""
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return package if extra is None else f"'splitformer[{extra}]'"


def uses_gpu(options: Options) -> bool:
    """Whether a selected stage computes on a GPU if there is one."""
    stages = set(options.stages or STAGES)
    return bool(stages & {"train", *SEARCHING}) or ("fbank" in stages and options.fbank == "kaldifeat")


def check_versions(versions: dict[str, str]) -> list[Problem]:
    """Packages {name: version} that were compiled for another torch: they crash, or do not import."""
    torch = versions.get("torch")
    problems = []
    for name in ("k2", "torchaudio", "kaldifeat"):
        built = built_for_torch(name) or pinned_torch(name)
        if torch and name in versions and built and release(built) != release(torch):
            remedy = f"install the {name} that was built for torch {torch} ({NEWER_TORCH}), or {SETUP}"
            what = f"{name} was built for torch {built}, this is {torch}"
            problems.append(Problem(what, remedy, fatal=name == "k2", package=name))
    return problems


def numpy_of_tensor() -> None:
    import torch

    torch.zeros(1).numpy()


def sampler_of_cuts() -> None:
    from lhotse import CutSet
    from lhotse.dataset import SimpleCutSampler

    SimpleCutSampler(CutSet.from_cuts([]), max_cuts=1)


WORK_TOGETHER: dict[tuple[str, ...], Callable[[], None]] = {
    ("torch", "numpy"): numpy_of_tensor,
    ("torch", "lhotse"): sampler_of_cuts,
}
"""{packages: what they do together}: tried, because no list of versions that go together stays true"""
LAST_FOR_TORCH_1 = {"numpy": "'numpy<2'", "lhotse": "lhotse==1.32.1"}


def try_together(names: Sequence[str], versions: dict[str, str], check: Callable[[], None]) -> list[Problem]:
    """A problem if `check`, which uses the packages together, fails."""
    try:
        check()
    except Exception as error:  # whatever packages raise that do not fit
        first, other = names
        what = f"{other} {versions.get(other)} does not work with {first} {versions.get(first)}: {one_line(error)}"
        wanted = LAST_FOR_TORCH_1[other] if release(versions.get(first, "")) < (2,) else f"a newer {other} or {first}"
        return [Problem(what, f"install {wanted}, or {SETUP}", package=other)]
    return []


# ---- the machine


def check_disk(options: Options) -> list[Problem]:
    """Disks without room for what the stages will write."""
    bytes_of_hour = FLOAT_BYTES
    if options.fbank != "linear-mel" and installed_version("lilcom"):
        bytes_of_hour = LILCOM_BYTES
    bytes_of_hour *= options.num_mel_bins / 80
    sizes: dict[Path, float] = {}
    for option, unit, values in (
        ("--store-hours", bytes_of_hour, options.store_hours),
        ("--store-gigabytes", 1e9, options.store_gigabytes),
    ):
        for value in values:
            name, _, number = value.rpartition("=")
            if not re.fullmatch(r"\d+(\.\d+)?", number) or not name:
                raise UserError(f"{option} {value}: expected PATH=NUMBER")
            sizes[Path(name)] = sizes.get(Path(name), 0.0) + unit * float(number)
    wanted: dict[int, tuple[Path, float]] = {}  # {file system: (a folder on it, bytes)}
    for path, size in sizes.items():
        folder = existing(path)
        disk = os.stat(folder).st_dev
        rest = max(0.0, size - written(path))  # an earlier run may have been interrupted
        wanted[disk] = folder, wanted.get(disk, (folder, 0.0))[1] + rest
    problems = []
    for folder, size in wanted.values():
        status = os.statvfs(folder)
        free = status.f_bavail * status.f_frsize
        if size > free:
            what = f"about {size / 1e9:.1f} GB will be written below {folder}, where {free / 1e9:.1f} GB are free"
            remedy = "free some space, choose another disk by --work-dir and --download-dir, or store less: "
            remedy += "--on-the-fly, --speed-perturb false"
            if bytes_of_hour > LILCOM_BYTES and options.fbank != "linear-mel":
                remedy += ", or lilcom, which takes a third of the space (pip install lilcom)"
            problems.append(Problem(what, remedy))
    return problems


def existing(path: Path) -> Path:
    """The nearest folder that exists: `path` itself, or one above it."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def written(path: Path) -> int:
    """Bytes on disk of a file or of all files below a folder, and of a download that has not ended."""
    files = [path, path.with_name(f"{path.name}.part"), *(path.rglob("*") if path.is_dir() else ())]
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def check_shared_memory(options: Options, folder: Path = Path("/dev/shm")) -> list[Problem]:
    """A problem if the loading processes' batches do not fit into shared memory: they would die of SIGBUS."""
    size = PREFETCHED * options.num_workers * options.batch_seconds * 100 * 4 * options.num_mel_bins
    if not size or not folder.is_dir():
        return []
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if size <= free:
        return []
    what = f"batches of {options.num_workers} loading processes take {size / 1e6:.0f} MB of shared memory, and "
    what += f"{folder} has {free / 1e6:.0f} MB free"
    remedy = "give the container more (docker run --shm-size=8g, or --ipc=host), or mount -o remount,size=8g "
    remedy += f"{folder}; fewer --num-workers or a smaller data.max_duration need less"
    return [Problem(what, remedy)]


def check_gpus(torch: ModuleType, used: bool = True) -> tuple[list[str], list[Problem]]:
    """Descriptions of the GPUs that torch sees, and what is wrong with them; fatal if they are `used`."""
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
            problems.append(Problem(what, remedy, fatal=used))
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
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
