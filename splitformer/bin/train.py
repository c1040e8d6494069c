"""Train a system: the losses of its heads at every exit, on cuts of prepare.sh."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.config import load_config
from splitformer.errors import UserError
from splitformer.training.launch import launch
from splitformer.training.options import RunOptions

log = logging.getLogger(__name__)
STOPPED = 143
"""Exit status after a signal, as a shell has it for SIGTERM: callers must not take the run for finished."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train one system on one machine. On several machines, torchrun starts this command on each (docs/training.md)."""

    config: Path
    """conf file (TOML)"""
    set: tuple[str, ...] = ()
    """override values of the conf, as SECTION.KEY=VALUE"""
    num_processes: int = 1
    """ranks to start, one for each GPU or CPU core"""
    inspect: bool = False
    """print statistics of every layer and exit for the next batch instead of training"""


def run(options: Options) -> int | None:
    if options.num_processes < 1:
        raise UserError(f"--num-processes {options.num_processes} must be at least 1")
    config = load_config(options.config, options.set)
    if options.num_processes > 1 and "RANK" not in os.environ:
        return launch(options.num_processes)
    # the process that only starts the ranks needs none of these
    from splitformer.data.tokenizer import Tokenizer
    from splitformer.training.distributed import process_group
    from splitformer.training.loop import Stopped, Trainer, check_options, training_data
    from splitformer.training.saving import locked

    is_main = os.environ.get("RANK", "0") == "0"
    logging.getLogger().setLevel(logging.INFO if is_main else logging.WARNING)

    def index_cuts() -> None:
        check_options(options)
        training_data(options, config, Tokenizer(options.lang_dir), progress=is_main)

    with process_group(options.timeout_minutes, before=index_cuts) as ranks, ExitStack() as stack:
        ranks.on_main(lambda: stack.enter_context(locked(options.exp_dir)))
        trainer = Trainer(config, options, ranks)
        if options.inspect:
            if ranks.is_main:
                progress = trainer.progress
                print(f"epoch {progress.epoch + 1}, batch {progress.batch}, before step {progress.step + 1}\n")
                print(trainer.inspect())
            return 0
        try:
            trainer.train()
        except Stopped as stopped:
            log.info("%s", stopped)
            return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(command(run))
