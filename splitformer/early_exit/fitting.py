"""Fitting exit policies to a model: the sets, the search, and what is written to policy.json."""

from __future__ import annotations

import datetime
import logging
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from splitformer.checkpoint import checkpoint_id
from splitformer.decoding.decode import chosen_search
from splitformer.decoding.loading import Loaded, check_features, load_for_decoding, named_sets, speakers_of
from splitformer.decoding.searches import Method, Options, make_method
from splitformer.early_exit.calibration import Target, calibrate, make_family, split_by
from splitformer.early_exit.collect import collect
from splitformer.early_exit.exit_table import ExitTable
from splitformer.early_exit.names import POLICIES, WITHOUT_CTC
from splitformer.early_exit.policies import CannotFit, FittedPolicy, check_disjoint
from splitformer.errors import UserError
from splitformer.provenance import command_line, git_commit

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """The options of every command that fits exit policies."""

    checkpoint: Path
    """averaged.pt of bin/average"""
    cuts: str
    """calibration set, as NAME=PATH"""
    test_cuts: tuple[str, ...] = ()
    """test sets of other speakers, as NAME=PATH"""
    lang_dir: Path
    """lang_dir of the training, with the graphs of the search"""
    decode_dir: Path | None = None
    """records of bin/decode (default: decode/ beside the checkpoint)"""
    method: str | None = None
    """search (default: the one with the lowest WER in the records of the calibration set)"""
    exit: int | None = None
    """end the model at the exit after this layer"""
    repeats: int = 2
    """run each utterance so many times; the shortest times are kept"""


@dataclass(frozen=True)
class Calibration:
    """A model with the sets to run it on, and the search whose errors policies are fitted to.

    name, tests: the calibration set, and test sets; sets: {name: path of the cuts} of all of them.
    warnings: {test set: what limits its results, or ""}.
    policies: to be fitted. method, options: the search, and its options at each exit.
    """

    name: str
    tests: tuple[str, ...]
    sets: dict[str, Path]
    warnings: dict[str, str]
    policies: tuple[str, ...]
    loaded: Loaded
    method: Method
    options: dict[int, Options]
    repeats: int

    def table(self, name: str) -> ExitTable:
        """Run a set through all exits."""
        search = (self.method, self.options, self.repeats)
        return collect(self.loaded, self.sets[name], *search, progress=f"all exits of {name}")


def load_calibration(options: CalibrationOptions, policies: Sequence[str] = ()) -> Calibration:
    """Check sets and policies against each other and the model, and load what is needed to run it.

    Args:
      policies: to be fitted (default: all but `fixed` that the model has heads for).
    Raises:
      UserError: the calibration set is a test set or shares too much with one (`check_disjoint`), the model has one
        exit or lacks a CTC head that a policy needs, or records of the search are missing.
    """
    if options.repeats < 1:
        raise UserError(f"--repeats {options.repeats}: run each utterance at least once")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    [(name, cuts)] = named_sets("--cuts", [options.cuts]).items()
    tests = named_sets("--test-cuts", options.test_cuts)
    warnings = check_calibration_set(name, cuts, tests)
    loaded = load_for_decoding(options.checkpoint, options.lang_dir, device, options.exit)
    layers, heads = loaded.config.model.exit_layers, loaded.config.model.heads
    check_policies(policies, layers, heads)
    dynamic = tuple(each for each in POLICIES if each != "fixed" and ("ctc" in heads or each in WITHOUT_CTC))
    for path in (cuts, *tests.values()):
        check_features(path, loaded.config)
    decode_dir = options.decode_dir or options.checkpoint.parent / "decode"
    method, of_exit = chosen_search(decode_dir, name, options.method, layers, heads)
    return Calibration(
        name=name,
        tests=tuple(tests),
        sets={name: cuts, **tests},
        warnings=warnings,
        policies=tuple(policies) or dynamic,
        loaded=loaded,
        method=make_method(method, options.lang_dir, loaded.tokenizer.vocab_size, device),
        options=of_exit,
        repeats=options.repeats,
    )


def check_calibration_set(name: str, cuts: Path, tests: Mapping[str, Path]) -> dict[str, str]:
    """Return {test set: warning or ""}; raise CannotFit where a test set is, or shares too much with, the set."""
    if name in tests or re.search("(?<![a-z])test(?![a-z])", name.lower()):
        raise CannotFit(
            f"{name} is a test set: a policy cannot be evaluated on what it was fitted to. Calibrate on a dev set "
            "(--cuts dev=PATH)"
        )
    speakers = speakers_of(cuts)
    warnings = {
        test: check_disjoint(name, speakers, speakers.values(), test, speakers_of(path)) for test, path in tests.items()
    }
    for warning in filter(None, warnings.values()):
        log.warning("%s", warning)
    return warnings


def check_policies(policies: Sequence[str], exit_layers: Sequence[int], heads: Sequence[str]) -> None:
    """Raise UserError where the model has no exits to choose from, or lacks the head that a policy needs."""
    if unknown := [policy for policy in policies if policy not in POLICIES]:
        raise UserError(f"unknown policy {', '.join(unknown)}; choose among {', '.join(POLICIES)}")
    if len(exit_layers) == 1:
        raise UserError(
            f"the model has one exit, after layer {exit_layers[0]}: there is nothing to choose; take a model with "
            "several (model.exit_layers)"
        )
    if "ctc" not in heads and (need_ctc := [policy for policy in policies if policy not in WITHOUT_CTC]):
        raise UserError(
            f"{', '.join(need_ctc)}: needs a CTC head, and the heads of this model are {', '.join(heads)}; choose "
            f"among {', '.join(WITHOUT_CTC)}"
        )


def fit_policy(calibration: Calibration, name: str, target: Target, checkpoint: Path) -> FittedPolicy:
    """Fit the policy `name` to the calibration set, so that it meets the target."""
    table = calibration.table(calibration.name)
    family = make_family(name, "layers" if target.kind == "layers" else "macs")
    result: dict[str, float] = {}
    if target.kind == "deadline_ms":
        policy, setting = family.fit(table)(target.value / 1000), family.describe(target.value / 1000)
    else:
        [fitted] = calibrate(table, family, [target])
        policy, setting = fitted.policy, fitted.setting
        result = {key: value for key, value in fitted._asdict().items() if key not in ("policy", "setting")}
    return FittedPolicy(
        title=name,
        policy=policy,
        exit_layers=calibration.loaded.config.model.exit_layers,
        checkpoint=checkpoint_id(checkpoint),
        method=calibration.method.name,
        options={layer: dict(each) for layer, each in calibration.options.items()},
        fitted_on={
            "set": calibration.name,
            "utterances": len(table),
            "cuts": table.utterances,
            "speakers": sorted(set(table.speakers) - {""}),
            "target": str(target),
            "setting": setting,
            f"unseen_{split_by(table)}": result,
            "machine": platform.processor() or platform.machine(),
            "commit": git_commit(ROOT),
            "command": command_line(ROOT),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    )
