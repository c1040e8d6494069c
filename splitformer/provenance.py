"""Where numbers come from: the command line and the commit that records and tables name."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

GENERATED = ("egs/*/results/*", "egs/*/RESULTS.md", "egs/*/*.png")
"""Committed files that `bin/report --publish` writes; a fresh table does not change the code."""


def command_line(root: str | Path) -> str:
    """Return the command line of this process, quoted for a shell, with paths under `root` relative to it."""
    root = f"{Path(root).resolve()}/"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = [sys.argv[0]] if spec is None else ["python", "-m", spec.name]
    return shlex.join(word.replace(root, "") for word in [*start, *sys.argv[1:]])


def git_commit(root: str | Path) -> str:
    """Return the short hash of the commit at `root`, followed by "+dirty" if tracked files other than GENERATED differ.

    Outside a git work tree the result is "unknown".
    """
    # no optional locks: a query must not make a concurrent `git commit` fail
    git = ["git", "--no-optional-locks", "-C", str(root)]
    excluded = [f":(top,exclude,glob){pattern}" for pattern in GENERATED]
    commands = (
        [*git, "rev-parse", "--short", "HEAD"],
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *excluded],
    )
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+dirty" if changes.strip() else "")
