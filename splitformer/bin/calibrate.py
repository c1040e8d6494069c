"""Fit an exit policy on a calibration set and write policy.json.

    python -m splitformer.bin.calibrate --checkpoint EXP/averaged.pt --cuts dev=CUTS --test-cuts test=CUTS \
        --lang-dir LANG --policy learned_nbest --max-relative-wer 0.05
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.early_exit.calibration import Target, TargetKind
from splitformer.early_exit.fitting import CalibrationOptions, fit_policy, load_calibration
from splitformer.early_exit.names import DEFAULT
from splitformer.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options(CalibrationOptions):
    """Fit an exit policy on a calibration set, so that it meets one target, and write policy.json.

    Every utterance runs through all exits once. Each exit is searched by the method, and with the weights, that
    bin/decode chose on that set. The setting of the policy is chosen by cross-validation over speakers.
    bin/decode --exit-policy applies the policy.
    """

    policy: str = DEFAULT
    """name of the policy (docs/dynamic_exits.md)"""
    max_relative_wer: float | None = None
    """target: early exits add at most this share of the last exit's errors (default: 0.05)"""
    target_layers: float | None = None
    """target: mean exit layer, at most"""
    target_macs: float | None = None
    """target: share of the last exit's multiply-accumulates, at most"""
    target_rtf: float | None = None
    """target: real-time factor on this machine, at most"""
    deadline_ms: float | None = None
    """target, with --policy deadline: milliseconds for each batch"""
    output: Path | None = None
    """file to write (default: policy.json beside the checkpoint)"""


def run(options: Options) -> None:
    target = _target(options)
    calibration = load_calibration(options, [options.policy])
    fitted = fit_policy(calibration, options.policy, target, options.checkpoint)
    output = options.output or options.checkpoint.parent / "policy.json"
    fitted.save(output)
    on = fitted.fitted_on
    log.info("%s for %s: %s", options.policy, target, on["setting"])
    for unseen in ("speakers", "utterances"):
        if result := on.get(f"unseen_{unseen}"):
            log.info("on unseen %s: %s", unseen, ", ".join(f"{key} {value:.4g}" for key, value in result.items()))
    print(output)


def _target(options: Options) -> Target:
    """Return the target of the command line; raise UserError if there is more than one."""
    targets: dict[str, tuple[TargetKind, float | None]] = {
        "--max-relative-wer": ("max_relative_wer", options.max_relative_wer),
        "--target-layers": ("layers", options.target_layers),
        "--target-macs": ("macs", options.target_macs),
        "--target-rtf": ("rtf", options.target_rtf),
        "--deadline-ms": ("deadline_ms", options.deadline_ms),
    }
    given = {option: (kind, value) for option, (kind, value) in targets.items() if value is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: a policy is fitted to one target; give one of these options")
    kind, value = next(iter(given.values()), ("max_relative_wer", 0.05))
    if kind == "deadline_ms" and options.policy != "deadline":
        raise UserError(f"--deadline-ms {value:g} is for --policy deadline, not {options.policy}")
    return Target(kind, value)


if __name__ == "__main__":
    sys.exit(command(run))
