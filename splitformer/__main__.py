"""The command `splitformer`: its sub-commands are the modules of `splitformer.bin`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import splitformer.bin
from splitformer.cli import command, missing_package


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `splitformer NAME OPTIONS...`; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names = [module.name.replace("_", "-") for module in pkgutil.iter_modules(splitformer.bin.__path__)]
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:<18} {_summary(name)}" for name in names)
        print(f"usage: splitformer COMMAND [options]; splitformer COMMAND --help lists them\n\n{listed}")
        return 0
    name, *rest = arguments
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        print(f"splitformer: unknown command {name!r}; commands are {', '.join(names)}.{meant}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"splitformer.bin.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if (remedy := missing_package(error)) is None:
            raise
        print(f"splitformer {name}: {remedy}", file=sys.stderr)
        return 1
    return command(module.run, rest, prog=f"splitformer {name}")


def _summary(name: str) -> str:
    """The first line of the module's docstring, read without importing what the command needs."""
    spec = importlib.util.find_spec(f"splitformer.bin.{name.replace('-', '_')}")
    assert spec is not None and spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        return file.readline().strip().strip('"')


if __name__ == "__main__":
    sys.exit(main())
