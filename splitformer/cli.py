"""Commands: options parsed into a dataclass, and one line for every error that a user can mend."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from tyro import conf as conf
from tyro.conf import Positional as Positional

from splitformer.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 130
"""exit status after Ctrl-C, as a shell has it"""
EXTRAS = {
    "train": ("filelock", "kaldialign", "lhotse", "lilcom", "sentencepiece", "tensorboard", "urllib3"),
    "k2": ("k2", "kaldilm"),
    "export": ("onnx", "onnxruntime", "safetensors"),
    "report": ("matplotlib",),
    "dask": ("distributed",),
}
"""{extra of the package: packages that it brings and earlier ones do not}, see pyproject.toml"""


def command(run: Callable[[Any], int | None], arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse the command line into the dataclass that `run` takes as `options`, call it, and return the exit status.

    The docstring of the dataclass is the description in `--help`, and the string under each field is its help. Options
    are named after the fields: `exp_dir` is `--exp-dir`. An option that takes several values may be repeated.

    A `UserError`, an `OSError` about a file or a full disk, and a missing package are printed in one line: the status
    is that of the error, 1 for most. Any other exception keeps its traceback.

    Args:
      run: its parameter `options` is annotated with a dataclass; it returns the exit status, None for 0.
      arguments: of the command line (default: those of this process).
      prog: the command's name in messages (default: the module's or the script's).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prog = prog or _program()
    kind = typing.get_type_hints(run, include_extras=True)["options"]
    config = (conf.FlagCreatePairsOff, conf.DisallowNone)
    options: Any = tyro.cli(_for_help(kind), prog=prog, args=_gathered(arguments, _lists(kind)), config=config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        return run(options) or 0
    except BrokenPipeError:  # the reader of standard output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        where = "" if error.filename is None else f": {error.filename}"
        print(f"{prog}: {error.strerror or error}{where}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (remedy := missing_package(error)) is None:
            raise
        print(f"{prog}: {remedy}", file=sys.stderr)
    return 1


def _for_help(kind: type) -> type:
    """Return a subclass of the dataclass whose `--help` omits defaults of None and (); the fields' help names them."""
    hints = typing.get_type_hints(kind, include_extras=True)
    replaced: list[tuple[str, Any, Any]] = []
    annotated: Any = Annotated  # mypy takes Annotated[...] with computed markers for an error
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        plain = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
        if field.default is None or field.default == ():
            hint = Annotated[hint, conf.arg(help_behavior_hint="")]
            replaced.append((field.name, hint, dataclasses.field(default=field.default)))
        elif typing.get_origin(plain) is tuple and plain is not hint:  # positional
            hint = Annotated[hint, conf.arg(help_behavior_hint="")]
            replaced.append((field.name, hint, dataclasses.field(kw_only=field.kw_only)))
        elif dataclasses.is_dataclass(plain) and isinstance(plain, type):
            quiet = _for_help(plain)
            parts = (quiet, *getattr(hint, "__metadata__", ()))
            hint = quiet if plain is hint else annotated[parts]
            replaced.append((field.name, hint, dataclasses.field(kw_only=field.kw_only)))
    namespace = {"__doc__": kind.__doc__}
    return dataclasses.make_dataclass(kind.__name__, replaced, bases=(kind,), frozen=True, namespace=namespace)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return how to install what an import lacks; None for a module of this package."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "splitformer"):
        return None
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    what = package if extra is None else f"'splitformer[{extra}]'"
    return f"this command needs {package}: pip install {what}"


def _program() -> str:
    """`train` for `python -m splitformer.bin.train`, `local/train_bpe.py` for a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv[0] if spec is None else spec.name.rpartition(".")[2]


def _lists(kind: Any) -> set[str]:
    """Return the options of a dataclass that take several values."""
    hints = typing.get_type_hints(kind)
    return {f"--{name.replace('_', '-')}" for name, hint in hints.items() if typing.get_origin(hint) in (tuple, list)}


def _gathered(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """Return `--set a --set=b` as `--set a b`: argparse would keep the last alone. `lists`: options like --set."""
    groups: list[list[str]] = [[]]
    for place, argument in enumerate(arguments):
        if argument == "--":
            groups.append(list(arguments[place:]))
            break
        option, equals, value = argument.partition("=")
        if option in lists:
            same = next((group for group in groups if group[:1] == [option]), None)
            if same is None:
                groups.append(same := [option])
            else:  # continue it: a group may have taken values since
                groups.remove(same)
                groups.append(same)
            same.extend([value] if equals else [])
        elif argument.startswith("--"):
            groups.append([argument])
        else:
            groups[-1].append(argument)
    return [argument for group in groups for argument in group]
