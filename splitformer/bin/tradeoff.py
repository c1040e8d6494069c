"""Compute WER against cost for every exit policy: fitted on a calibration set, shown on test sets.

    python -m splitformer.bin.tradeoff --checkpoint EXP/averaged.pt --cuts dev=CUTS --test-cuts test=CUTS \
        --lang-dir LANG --output-dir EXP/early_exit --corpus NAME
"""

from __future__ import annotations

import datetime
import functools
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from splitformer.cli import command
from splitformer.decoding.decode import system_name
from splitformer.early_exit.calibration import make_family
from splitformer.early_exit.fitting import CalibrationOptions, load_calibration
from splitformer.early_exit.tradeoff import tradeoff
from splitformer.errors import UserError
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import TradeoffRecord

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Options(CalibrationOptions):
    """Compute WER against cost for every exit policy: fitted on a calibration set, shown on test sets.

    Writes tradeoff-TEST.json for each test set, which bin/report turns into tables and plots, and exits/SET.json, the
    errors, statistics and costs of every utterance at every exit.
    """

    policies: tuple[str, ...] = ()
    """names of the policies (default: all that the model has heads for)"""
    output_dir: Path
    """directory for the records"""
    corpus: str
    """corpus that the records name"""
    system: str | None = None
    """system that the records name (default: the exp_dir's name without -seedN)"""
    notice: str = ""
    """sentence that reports show above every table with these results"""
    draws: int = 1000
    """number of bootstrap samples"""


def run(options: Options) -> None:
    if not options.test_cuts:
        raise UserError("--test-cuts is missing: the sets to compute the curves of, as NAME=PATH")
    if options.draws < 1:
        raise UserError(f"--draws {options.draws}: the intervals need at least one draw, better 1000")
    if "fixed" in options.policies:
        raise UserError("--policies fixed: the fixed exits are in every record; leave the name out")
    calibration = load_calibration(options, options.policies)
    tables = {}
    for name in calibration.sets:
        tables[name] = calibration.table(name)
        tables[name].save(options.output_dir / "exits" / f"{name}.json")
    for test in calibration.tests:
        found = tradeoff(
            tables[calibration.name],
            tables[test],
            [make_family(policy) for policy in calibration.policies],
            draws=options.draws,
            progress=functools.partial(tqdm, desc=f"policies on {test}", disable=None, leave=False),
        )
        TradeoffRecord(
            corpus=options.corpus,
            system=options.system or system_name(options.checkpoint),
            seed=calibration.loaded.contents["seed"],
            test_set=test,
            calibration_set=calibration.name,
            method=calibration.method.name,
            **found._asdict(),
            commit=git_commit(ROOT),
            command=command_line(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            warning=calibration.warnings[test],
            notice=options.notice,
        ).save(options.output_dir / f"tradeoff-{test}.json")
        for saving in found.savings:
            if saving.allowed == 0.05:
                log.info(
                    f"{test} {saving.policy}, calibrated to +5 %: {100 * saving.relative_wer:+.1f} % relative WER "
                    f"({100 * saving.relative_wer_low:+.1f} to {100 * saving.relative_wer_high:+.1f} at 95 %), saves "
                    f"{100 * saving.macs_saved:.0f} % of MACs and {100 * saving.time_saved:.0f} % of time"
                )


if __name__ == "__main__":
    sys.exit(command(run))
