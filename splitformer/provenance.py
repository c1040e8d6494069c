"""What the recipe writes down: records of decoding and training, and the one way in which files are written.

Standard library only, so that every other module may import it.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

# What `bin/report` writes and git tracks: a fresh table does not change the code that computes the next one.
GENERATED = ("egs/*/results/*", "egs/*/RESULTS.md", "egs/*/*.png")


def command_line(root: str | Path) -> str:
    """What was typed to start this process, quoted for a shell, with paths under `root` relative to it."""
    root = f"{Path(root).resolve()}/"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        start = [sys.argv[0]]
    else:
        start = ["python", "-m", spec.name]
    return shlex.join(word.replace(root, "") for word in [*start, *sys.argv[1:]])


def git_commit(root: str | Path) -> str:
    """Short hash of the commit checked out at `root`; "+dirty" follows where tracked files differ from it.

    Generated tables and plots do not count as a difference. Outside a git work tree: "unknown".
    """
    # no optional locks: asking must not make a concurrent `git commit` fail
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
