"""Check this machine and its Python environment: what is missing or does not fit together, and the remedy.

    python -m splitformer.bin.doctor                              # all that the recipe needs
    python -m splitformer.bin.doctor --stages train decode        # what these stages of run.sh need
"""

from __future__ import annotations

import sys

from splitformer.cli import command
from splitformer.doctor import RECOGNIZER, STAGES, Options, check_disk, check_shared_memory, examine
from splitformer.errors import UserError


def run(options: Options) -> int:
    if unknown := sorted(set(options.stages) - set(STAGES)):
        raise UserError(f"--stages {' '.join(unknown)}: choose among {', '.join(STAGES)}")
    rows, problems = examine(options)
    problems += check_disk(options) + check_shared_memory(options)
    if options.quiet:
        rows = []
    for name, version, remark in rows:
        print(f"{name:<16} {version:<16} {remark}".rstrip())
    if options.verbose:
        from torch.utils import collect_env

        print(f"\n{collect_env.get_pretty_env_info()}")
    fatal = sum(problem.fatal for problem in problems)
    out = sys.stderr if options.quiet and fatal else sys.stdout
    for problem in problems:
        print(f"\n{'PROBLEM' if problem.fatal else 'note'}: {problem.what}\n  remedy: {problem.remedy}", file=out)
    if fatal or not options.quiet:
        what = f"Stages {', '.join(options.stages)}" if options.stages else "The recipe"
        verdict = f"cannot run here: fix the {fatal} problem{'s' * (fatal > 1)} above" if fatal else "can run here"
        print(f"\n{what} {verdict}.", file=out)
    if fatal and not options.stages and not {problem.package for problem in problems} & set(RECOGNIZER):
        print("The recogniser (splitformer transcribe, splitformer.load) can run here.", file=out)
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(command(run))
