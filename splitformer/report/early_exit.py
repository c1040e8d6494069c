"""What exit policies save, as sections of RESULTS.md: savings, curves against the fixed exits, real decodings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from splitformer.report.records import BudgetPoint, EarlyExitRecord, Saving, TradeoffRecord
from splitformer.report.runs import Run
from splitformer.report.tables import commands, markdown_table, mean, percent, spread

FIXED, LEARNED, ORACLE = "fixed", "learned_nbest", "oracle"
_ORDER = (
    FIXED,
    "entropy",
    "entropy_non_blank",
    "posterior",
    "nbest_posterior",
    "patience",
    "learned",
    LEARNED,
    "budget",
    "deadline",
)
_SUMMARY_ALLOWED = 0.05

_WHAT = (
    "An exit policy decides after every exit whether an utterance leaves the encoder there. Every setting was chosen "
    "on the calibration set alone, and the tables show what it then gave on the set they are of; the 95 % intervals "
    "are bootstrapped over utterances. Saved is a share of what the last exit costs for all utterances; below 0 the "
    "policy costs more than it saves. In hindsight: the largest saving among all settings whose WER on the set itself "
    "is within what is allowed, which no choice made on other data is sure to reach."
)


def dynamic_exits_title(system: str) -> str:
    """The title, in `render`'s `plots`, of a system's WER against cost under exit policies."""
    return f"Dynamic exits of {system}"


def ordered_policies(names: Iterable[str]) -> list[str]:
    """Each name once: those known in their order, `patience_2` beside `patience`; then others, and the oracle last."""

    def place(name: str) -> tuple[int, str]:
        known = [each for each in _ORDER if name == each or name.startswith(each)]
        return (_ORDER.index(max(known, key=len)) if known else len(_ORDER) + (name == ORACLE), name)

    return sorted(set(names), key=place)


def ordered_tradeoffs(runs: Iterable[Run], dev_sets: Sequence[str]) -> list[TradeoffRecord]:
    """Those of all runs: test sets before dev sets, and each set's by seed."""
    records = [record for run in runs for record in run.tradeoffs]
    return sorted(records, key=lambda r: (r.test_set in dev_sets, r.test_set, r.method, r.seed))


# ---- after the summary


def dynamic_exits_summary(runs: Sequence[Run], dev_sets: Sequence[str]) -> list[str]:
    """One row per system and test set, in one policy; nothing where no policy was tried."""
    rows = []
    for system in sorted({run.system for run in runs}):
        own = [run for run in runs if run.system == system]
        tests = [record for record in ordered_tradeoffs(own, dev_sets) if record.test_set not in dev_sets]
        for records in _by_set(tests):
            decoded = [r.policy for run in own for r in run.early_exits if r.test_set == records[0].test_set]
            policy = _policy_of_summary(records, decoded)
            if policy is not None:
                found = _savings(records, _SUMMARY_ALLOWED, policy)
                seeds = ", ".join(str(record.seed) for record in records)
                rows.append([system, records[0].test_set, seeds, policy, *_mean_cells(found, len(records))])
    if not rows:
        return []
    header = ["system", "set", "seeds", "policy", "WER change over the last exit", "MACs saved"]
    return [
        "### Savings of dynamic exits",
        f"Where the WER may be {_share(_SUMMARY_ALLOWED, 0)} above the last exit's, with settings chosen on the "
        "calibration set alone; over several seeds the mean (lowest to highest). All policies stand with each system.",
        markdown_table(header, rows, left=4),
    ]


def _policy_of_summary(records: Sequence[TradeoffRecord], decoded: Sequence[str]) -> str | None:
    """The learned policy, else the first that was really decoded; None where neither has a saving to show."""
    found = {s.policy for record in records for s in record.savings if _same(s.allowed, _SUMMARY_ALLOWED)}
    return next((name for name in (LEARNED, *ordered_policies(decoded)) if name in found), None)


# ---- a system's section


def dynamic_exits(runs: Sequence[Run], dev_sets: Sequence[str], plot: str | None) -> list[str]:
    """The section of one system, in parts; nothing where no policy was tried. `plot`: a file's name."""
    tradeoffs = ordered_tradeoffs(runs, dev_sets)
    early_exits = [record for run in runs for record in run.early_exits]
    if not tradeoffs and not early_exits:
        return []
    parts = ["### Dynamic exits"]
    if plot is not None:
        parts.append(f"![{dynamic_exits_title(runs[0].system)}]({plot})")
    parts.append(_WHAT)
    for records in _by_set(tradeoffs):
        parts += _one_set(records)
    if early_exits:
        parts += [
            "Decoded under a policy, which decides while the exits are computed; the real-time factor includes it:",
            _decoded_table(early_exits),
        ]
    return [*parts, commands([*tradeoffs, *early_exits])]


def _by_set(records: Iterable[TradeoffRecord]) -> list[list[TradeoffRecord]]:
    """Sorted records in groups that differ in the seed alone."""
    return [list(own) for _, own in groupby(records, key=lambda r: (r.test_set, r.method))]


def _one_set(records: Sequence[TradeoffRecord]) -> list[str]:
    """One seed in full; of several the means, and each seed folded away."""
    if len(records) == 1:
        return [f"#### {_name(records[0])}", _described(records[0]), *_savings_tables(records[0]), *_curves(records)]
    seeds = ", ".join(str(record.seed) for record in records)
    parts = [
        f"#### {records[0].test_set}, {len(records)} seeds",
        f"Means over seeds {seeds} (lowest to highest), by how far the WER may be above the last exit's:",
        _means_table(records),
        *_curves(records),
    ]
    for record in records:
        parts += [
            f"<details><summary>{_name(record)}</summary>",
            _described(record),
            *_savings_tables(record),
            *_curves([record]),
            "</details>",
        ]
    return parts


def _name(record: TradeoffRecord) -> str:
    return f"{record.test_set}, seed {record.seed}"


def _described(record: TradeoffRecord) -> str:
    return (
        f"Calibrated on {record.calibration_set}, words by {record.method}. The last exit, without a policy: "
        f"WER {percent(record.last_wer)} ({record.num_utterances} utterances, {record.ref_words} words), "
        f"{record.last_macs_per_second / 1e9:.3f}·10⁹ MACs per s of audio, real-time factor {record.last_rtf:.4f}. "
        f"Commit `{record.commit}`, {record.date[:10]}."
    )


def _savings_tables(record: TradeoffRecord) -> list[str]:
    """A table per allowed WER, each after its lead-in."""
    header = [
        "policy",
        "setting",
        "WER",
        "change over the last exit (95 % CI)",
        "MACs saved",
        "layers saved",
        "time saved",
        "MACs saved in hindsight",
    ]
    parts = []
    for allowed in _allowed([record]):
        rows = [
            [
                s.policy,
                s.setting,
                percent(s.wer),
                f"{_change(s.relative_wer)} ({_change(s.relative_wer_low)} to {_change(s.relative_wer_high)})",
                _share(s.macs_saved),
                _share(s.layers_saved),
                _share(s.time_saved),
                _share(s.hindsight_macs_saved),
            ]
            for policy in ordered_policies(s.policy for s in record.savings)
            for s in _savings([record], allowed, policy)
        ]
        parts += [_lead_in(allowed), markdown_table(header, rows, left=2)]
    return parts


def _lead_in(allowed: float) -> str:
    if allowed == 0:
        return "Where the WER may not be above the last exit's:"
    return f"Where the WER may be {_share(allowed, 0)} above the last exit's:"


def _means_table(records: Sequence[TradeoffRecord]) -> str:
    """Rows policies; for each allowed WER the change that it gave and the MACs saved."""
    allowed = _allowed(records)
    header = ["policy"]
    for each in allowed:
        header += [f"+{_share(each, 0)}:<br>WER change", f"+{_share(each, 0)}:<br>MACs saved"]
    rows = []
    for policy in ordered_policies(s.policy for record in records for s in record.savings):
        cells = (_mean_cells(_savings(records, each, policy), len(records)) for each in allowed)
        rows.append([policy, *(text for pair in cells for text in pair)])
    return markdown_table(header, rows)


def _mean_cells(savings: Sequence[Saving], seeds: int) -> list[str]:
    """Change of WER and MACs saved, over seeds."""
    return [
        spread([s.relative_wer for s in savings], _change, seeds, to=" to "),
        spread([s.macs_saved for s in savings], _share, seeds, to=" to "),
    ]


def _allowed(records: Sequence[TradeoffRecord]) -> list[float]:
    return sorted({s.allowed for record in records for s in record.savings})


def _savings(records: Sequence[TradeoffRecord], allowed: float, policy: str) -> list[Saving]:
    """Of one policy, by seed."""
    return [s for record in records for s in record.savings if s.policy == policy and _same(s.allowed, allowed)]


# ---- at equal cost


def _curves(records: Sequence[TradeoffRecord]) -> list[str]:
    """The policies' curves against that of the fixed exits, of one seed or as the mean of several."""
    points = [point for record in records for point in record.budgets if point.policy != FIXED]
    if not points:
        return []
    bold = "its 95 % interval excludes 0" if len(records) == 1 else "every seed's 95 % interval excludes 0"
    return [
        "Against the fixed exits at equal cost: the policy's WER minus theirs, percent absolute, where the average "
        f"cost is the given share of the last exit's MACs; in bold where {bold}.",
        _budget_table(points, len(records)),
        _count_below(points, len(records)),
    ]


def _budget_table(points: Sequence[BudgetPoint], seeds: int) -> str:
    """Rows policies, columns budgets, below the WER of the fixed exits."""
    budgets = sorted({point.budget for point in points})
    fixed = [mean([point.fixed_wer for point in points if point.budget == budget]) for budget in budgets]
    rows = [["(WER of the fixed exits)", *map(percent, fixed)]]
    for policy in ordered_policies(point.policy for point in points):
        row = [policy]
        for budget in budgets:
            own = [point for point in points if (point.policy, point.budget) == (policy, budget)]
            text = f"{_no_negative_zero(mean([point.difference for point in own]), 2):+.2f}" if own else "–"
            row.append(f"**{text}**" if _clear(own, seeds) else text)
        rows.append(row)
    return markdown_table(["policy", *(_share(budget, 0) for budget in budgets)], rows)


def _count_below(points: Sequence[BudgetPoint], seeds: int) -> str:
    """At how many budgets each policy is better than the fixed exits."""
    told = []
    for policy in ordered_policies(point.policy for point in points):
        by_budget: dict[float, list[BudgetPoint]] = {}
        for point in points:
            if point.policy == policy:
                by_budget.setdefault(point.budget, []).append(point)
        below = [own for own in by_budget.values() if mean([point.difference for point in own]) < 0]
        in_bold = sum(_clear(own, seeds) for own in below)
        told.append(f"{policy} at {len(below)} of {len(by_budget)} budgets ({in_bold} in bold)")
    return f"WER below the fixed exits': {', '.join(told)}."


def _clear(points: Sequence[BudgetPoint], seeds: int) -> bool:
    """Whether the intervals of all seeds are on the same side of 0."""
    if len(points) < seeds:
        return False
    return all(p.difference_high < 0 for p in points) or all(p.difference_low > 0 for p in points)


# ---- really decoded


def _decoded_table(records: Sequence[EarlyExitRecord]) -> str:
    """One row a decoding; what went wrong has a column where it happened at all."""
    order = ordered_policies(record.policy for record in records)
    records = sorted(records, key=lambda r: (r.test_set, order.index(r.policy), r.target, r.method, r.seed))
    faults = {
        "passed for NaN": [record.nan_exits for record in records],
        "late": [record.late_utterances for record in records],
        "empty lattices": [record.fallback_utterances for record in records],
    }
    faults = {name: counts for name, counts in faults.items() if any(counts)}
    header = ["set", "seed", "policy", "target", "decoding"]
    header += ["WER", "mean layer", "utterances by exit", "MACs saved", "real-time factor", *faults]
    rows = [
        [
            r.test_set,
            str(r.seed),
            r.policy,
            r.target,
            r.method,
            percent(r.wer),
            f"{r.layers:.2f}",
            ", ".join(f"{layer}: {count}" for layer, count in sorted(r.exits.items())),
            _share(1 - r.macs_per_second / r.last_exit_macs_per_second),
            f"{r.rtf:.4f}",
            *(str(counts[number]) for counts in faults.values()),
        ]
        for number, r in enumerate(records)
    ]
    return markdown_table(header, rows, left=5)


# ---- numbers as text


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-6)


def _share(value: float | None, digits: int = 1) -> str:
    """0.382 as `38.2 %`."""
    return "–" if value is None else f"{_no_negative_zero(100 * value, digits):.{digits}f} %"


def _change(value: float) -> str:
    """0.031 as `+3.1 %`."""
    return f"{_no_negative_zero(100 * value, 1):+.1f} %"


def _no_negative_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0
