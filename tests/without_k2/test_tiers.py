"""The layout's rules as tests: which module may import what, and forbidden names in the library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDARD_LIBRARY = sys.stdlib_module_names | {"tomllib", "tomli"}  # from Python 3.11, and before


@dataclass(frozen=True)
class Tier:
    modules: tuple[str, ...]  # patterns of module names
    packages: frozenset[str]  # what they may import besides the standard library
    library: tuple[str, ...]  # patterns of the library's own modules that they may import


def modules(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"splitformer.{folder}.{name}" for name in names)


BASE = (
    "splitformer.errors",
    "splitformer.files",
    "splitformer.provenance",
    "splitformer.config",
    "splitformer.decoding.methods",
    "splitformer.early_exit.names",
)
RECORDS = modules("report", "records", "tables")
MODEL = (*BASE, "splitformer.model.*", "splitformer.checkpoint")
TENSOR_SEARCHES = modules(
    "decoding", "hypothesis", "greedy", "alignment", "context", "lang", "word_list", "prefix_beam", "prefixes",
    "modified_beam", "searches",
)  # fmt: skip
SEARCHES = (*MODEL, *TENSOR_SEARCHES)
POLICIES = modules("early_exit", "statistics", "policies", "exit_table", "calibration", "tradeoff", "running", "search")
LOSSES = modules("losses", "multi_exit")
SCORING = ("splitformer.scoring",)
DATA = (*MODEL, "splitformer.data.*")
TRAINING = (*SEARCHES, *LOSSES, *RECORDS, *SCORING, *DATA, "splitformer.training.*")
SPEECH = (*SEARCHES, *POLICIES, "splitformer.speech.*")
REPORT = (*BASE, "splitformer.report.*")
EXPORT = modules("export", "wrappers", "check")

IO = {"numpy", "tqdm"}
CUTS = {"torch", "torchaudio", "lhotse", "kaldifeat", "sentencepiece", "soundfile", *IO}

# The first pattern that fits a module names its tier.
TIERS = {
    "base": Tier(BASE, frozenset(), BASE),
    "entry": Tier(("splitformer.cli", "splitformer.__main__", "splitformer"), frozenset({"tyro"}), ("splitformer.*",)),
    "records": Tier(RECORDS, frozenset(), (*BASE, *RECORDS)),
    "model": Tier(MODEL, frozenset({"torch"}), MODEL),
    # methods that need k2 are imported inside a function, when one is asked for
    "tensor searches": Tier(
        TENSOR_SEARCHES, frozenset({"torch", "rapidfuzz"}), (*SEARCHES, "splitformer.decoding.graph_searches")
    ),
    "exit policies": Tier(POLICIES, frozenset({"torch", "rapidfuzz"}), (*SEARCHES, *RECORDS, *POLICIES)),
    # the transducer loss is imported inside a function: CTC trains without k2
    "losses": Tier(LOSSES, frozenset({"torch"}), (*MODEL, "splitformer.losses.*")),
    "transducer loss": Tier(("splitformer.losses.*",), frozenset({"torch", "k2"}), (*MODEL, *LOSSES)),
    "scoring": Tier(SCORING, frozenset({"kaldialign"}), (*BASE, *SCORING)),
    "data": Tier(("splitformer.data.*",), frozenset({*CUTS, "filelock"}), DATA),
    "training": Tier(("splitformer.training.*",), frozenset({*CUTS, "tensorboard", "filelock", "rapidfuzz"}), TRAINING),
    "speech": Tier(("splitformer.speech.*",), frozenset({"torch", "soundfile", "rapidfuzz", *IO}), SPEECH),
    "decoding": Tier(
        ("splitformer.decoding.*", "splitformer.early_exit.*"),
        frozenset({"torch", "k2", "rapidfuzz", *IO}),
        (*SEARCHES, *POLICIES, *RECORDS, *SCORING, *DATA, "splitformer.decoding.*", "splitformer.early_exit.*"),
    ),
    "corpora": Tier(
        ("splitformer.corpora.*",),
        frozenset({*CUTS, "k2", "google", "distributed"}),  # google.protobuf reads sentencepiece's files
        (*DATA, *modules("decoding", "lang", "graphs"), "splitformer.speech.audio", "splitformer.corpora.*"),
    ),
    "export without packages": Tier(EXPORT, frozenset({"torch"}), (*SEARCHES, *EXPORT)),
    "export formats": Tier(
        ("splitformer.export.formats",),
        frozenset({"torch", "onnx", "onnxruntime", "safetensors"}),
        (*SEARCHES, *EXPORT),
    ),
    "export": Tier(
        ("splitformer.export.*",),
        frozenset({*CUTS, "onnx", "onnxruntime", "safetensors", "kaldialign", "google"}),
        (*SEARCHES, *SCORING, *DATA, "splitformer.corpora.tokens", "splitformer.export.*"),
    ),
    "doctor": Tier(("splitformer.doctor",), frozenset({*CUTS, "tyro"}), (*BASE, "splitformer.cli")),
    "report": Tier(("splitformer.report.*",), frozenset({"matplotlib"}), REPORT),
    "commands without k2": Tier(
        modules("bin", "train", "average", "export", "report", "doctor", "import_released", "transcribe"),
        frozenset({"torch", "tqdm"}),
        (*TRAINING, *REPORT, *SPEECH, "splitformer.cli", "splitformer.doctor", "splitformer.corpora.tokens",
         "splitformer.export.*"),
    ),
    "commands": Tier(("splitformer.bin.*",), frozenset({"torch", *IO}), ("splitformer.*",)),
    "stage scripts": Tier(("local.*",), frozenset({"torch", "lhotse", *IO}), ("splitformer.*",)),
}
# What a package imports itself, so that blocking it would block the package.
BROUGHT_ALONG = {
    "torch": {"numpy"},
    "matplotlib": {"numpy"},
    "lhotse": {"torch", "torchaudio", "soundfile", *IO},
    "tensorboard": {"numpy", "google"},
    "onnx": {"numpy", "google"},
    "onnxruntime": {"numpy", "google"},
    "safetensors": {"numpy"},
}
BLOCKABLE = {"k2", "torchaudio"}.union(*(tier.packages for tier in TIERS.values()))
NEED_K2 = ("transducer loss", "decoding", "corpora", "commands", "stage scripts")
NEVER_AT_IMPORT = {"kaldifeat"}  # a set-up without a compiler does without


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tier_of(module: str) -> str | None:
    return next((name for name, tier in TIERS.items() if any(fnmatch(module, p) for p in tier.modules)), None)


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, package: str) -> list[str]:
    """Every module that the code imports, wherever the import stands; `from a import b` gives "a.b"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found += [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                found.append(str(node.args[0].value))
    return found


def is_library_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def violations(source: str, module: str, package: str) -> list[str]:
    """What `module`, whose text is `source`, imports against its tier."""
    name = tier_of(module)
    if name is None:
        return [f"{module} is in no tier: add it to TIERS, and to docs/architecture.md"]
    tier = TIERS[name]
    wrong = []
    for imported in imports(ast.parse(source), package):
        top = imported.split(".")[0]
        if top == "splitformer":
            target = imported if is_library_module(imported) else imported.rpartition(".")[0]
            allowed = target == "splitformer" or any(
                fnmatch(target, p) or p == f"{target}.*" for p in tier.library
            )
        else:
            allowed = top in STANDARD_LIBRARY or top in tier.packages
        if not allowed:
            wrong.append(f"{module} (tier {name!r}) imports {imported}")
    return wrong


@pytest.mark.parametrize("file", python_files("splitformer", "local"), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_stay_within_the_tier(file: Path) -> None:
    module = module_name(file)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    source = file.read_text(encoding="utf-8")
    if file.name == "__init__.py" and not source.strip():
        return
    assert violations(source, module, package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("splitformer.model.encoder", "import k2"),
        ("splitformer.model.encoder", "def f():\n    from k2 import Fsa"),
        ("splitformer.model.encoder", "import importlib\nimportlib.import_module('k2.ragged')"),
        ("splitformer.model.encoder", "from ..data import tokenizer"),
        ("splitformer.model.encoder", "from splitformer.decoding import greedy"),
        ("splitformer.files", "import torch"),
        ("splitformer.training.loop", "from splitformer.decoding.ctc import hlg_lattice"),
        ("splitformer.bin.train", "import splitformer.decoding.graphs"),
        ("splitformer.decoding.graphs", "import lhotse"),
        ("splitformer.decoding.prefix_beam", "import k2"),
        ("splitformer.novelty", "import os"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module, module.rpartition(".")[0])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tier", [name for name in TIERS if name not in NEED_K2])
def test_modules_import_with_nothing_but_their_tiers_packages(tier: str) -> None:
    """In a Python that has neither k2 nor anything else of the tiers below."""
    modules = [module_name(f) for f in python_files("splitformer")]
    modules = [m for m in modules if tier_of(m) == tier]
    allowed = set(TIERS[tier].packages)
    if tier == "commands without k2":
        allowed |= BLOCKABLE - {"k2"}
    allowed = allowed.union(*(BROUGHT_ALONG.get(package, set()) for package in allowed)) - NEVER_AT_IMPORT
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(BLOCKABLE - allowed)}))\n"
        f"for module in {modules}: importlib.import_module(module)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_optional_k2_import() -> None:
    """No `try: import k2`: a module needs k2 or it does not."""
    for file in python_files("splitformer", "local", "egs", "tests"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                tried = imports(ast.Module(node.body, []), "")
                assert not [m for m in tried if m.split(".")[0] == "k2"], f"{file}:{node.lineno}"


def corpus_names() -> set[str]:
    return {"mini", "an4", "librispeech", "tedlium", "voxpopuli"}  # those that ship: users add others


def corpus_traces(text: str, names: set[str], paths: bool = True) -> list[str]:
    """Lines of the text that name a corpus or, with `paths`, a `data/...` path.

    Short names count as whole words only.
    """
    patterns = [n if len(n) > 5 else rf"(?<![a-z0-9]){n}(?!-batch|[a-z0-9])" for n in map(re.escape, names)]
    if paths:
        patterns.append(r"(?<!splitformer/)(?<![\w.-])data/\S")
    pattern = re.compile("|".join(patterns), re.IGNORECASE)
    return [f"{i}: {line.strip()}" for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


@pytest.mark.parametrize(
    "file",
    sorted([*python_files("splitformer", "local"), *(ROOT / "local").rglob("*.sh")]),
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_the_library_knows_no_corpus_and_no_path(file: Path) -> None:
    """What belongs to one corpus is in egs/, and only shell scripts hold corpus paths."""
    assert corpus_traces(file.read_text(encoding="utf-8"), corpus_names(), paths=file.suffix == ".py") == []


@pytest.mark.parametrize(
    "line",
    ['cuts = "data/fbank/x"', "if corpus == 'an4':", "prepare_librispeech(", "# as in Mini", "$dir/data/y"],
)
def test_traces_of_a_corpus_are_seen(line: str) -> None:
    assert corpus_traces(line, {"an4", "mini", "librispeech"})


@pytest.mark.parametrize(
    "line", ["from splitformer.corpora.ngram import x", "a mini-batch", "minimum", "splitformer/data/x.py"]
)
def test_other_words_are_no_traces(line: str) -> None:
    assert not corpus_traces(line, {"an4", "mini", "librispeech"})
