#!/usr/bin/env python3
"""Print the words of a dictionary of CMU Sphinx, one per line."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.errors import UserError


@dataclass(frozen=True)
class Options:
    """Print the words of a dictionary of CMU Sphinx, one per line."""

    dictionary: Path
    """lines `WORD PHONE ...`"""


def run(options: Options) -> None:
    print("\n".join(sphinx_words(options.dictionary)))


def sphinx_words(dictionary: str | Path) -> list[str]:
    """Return the words of a dictionary, sorted; `WORD(2)` is another pronunciation of WORD.

    Raises:
      UserError: a line without a pronunciation.
    """
    words = set()
    with open(dictionary, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) == 1:
                raise UserError(f"{dictionary}:{number}: {fields[0]!r} has no pronunciation")
            if fields:
                words.add(re.sub(r"\(\d+\)$", "", fields[0]))
    return sorted(words)


if __name__ == "__main__":
    sys.exit(command(run))
