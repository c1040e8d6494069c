"""Exit policies in RESULTS.md: savings relative to the last exit, and WER relative to fixed exits at the same cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from splitformer.early_exit.names import DEFAULT, POLICIES
from splitformer.report.records import BudgetPoint, EarlyExitRecord, TradeoffRecord
from splitformer.report.results import Results
from splitformer.report.tables import change, commands, markdown_table, mean, percent, share, spread

FIXED, ORACLE = POLICIES[0], "oracle"
_SUMMARY_ALLOWED = 0.05

_INTRODUCTION = (
    "An exit policy decides after each exit whether an utterance exits there. All settings were chosen on the "
    "calibration set; the tables show what they give on the set in the heading, with 95 % bootstrap intervals over "
    "utterances. Savings are relative to the last exit for all utterances; below 0, the policy costs more than it "
    "saves. The last column is the largest saving among all settings whose WER on the set itself is within the limit; "
    "a setting that is chosen on other data cannot be expected to reach it."
)


def ordered_policies(names: Iterable[str]) -> list[str]:
    """Return each name once, in the order of POLICIES; `patience_2` follows `patience`, the oracle is the last."""

    def place(name: str) -> tuple[int, str]:
        known = [each for each in POLICIES if name.startswith(each)]
        return (POLICIES.index(max(known, key=len)) if known else len(POLICIES) + (name == ORACLE), name)

    return sorted(set(names), key=place)


def tradeoffs_by_set(results: Results, system: str) -> list[list[TradeoffRecord]]:
    """Return a system's records in groups that differ in the seed alone, test sets before dev sets."""
    records = [record for run in results.runs_of(system) for record in run.tradeoffs]
    records.sort(key=lambda r: (r.test_set in results.dev_sets, r.test_set, r.method, r.seed))
    return [list(own) for _, own in groupby(records, key=lambda r: (r.test_set, r.method))]


def savings_summary(results: Results) -> list[str]:
    """Return a table with one policy for each system and test set; nothing if there are no exit policies."""
    rows, notes = [], []
    for system in results.systems:
        early_exits = [record for run in results.runs_of(system) for record in run.early_exits]
        for records in tradeoffs_by_set(results, system):
            test_set, label = records[0].test_set, results.label(system)
            shown = {s.policy for record in records for s in record.savings if s.allowed == _SUMMARY_ALLOWED}
            decoded = ordered_policies(record.policy for record in early_exits if record.test_set == test_set)
            policy = next((name for name in (DEFAULT, *decoded) if name in shown), None)
            if policy is not None and test_set not in results.dev_sets:
                warnings = _warnings(records)
                notes += [f"† {label}, {test_set}: {warning}." for warning in warnings]
                seeds = ", ".join(str(record.seed) for record in records)
                cells = _mean_cells(records, _SUMMARY_ALLOWED, policy)
                rows.append([label + (" †" if warnings else ""), test_set, seeds, policy, *cells])
    if not rows:
        return []
    header = ["system", "set", "seeds", "policy", "WER change over the last exit", "MACs saved"]
    return [
        "### Savings of dynamic exits",
        f"One exit policy per system, calibrated so that early exits add at most {share(_SUMMARY_ALLOWED, 0)} to the "
        "last exit's errors on the calibration set. With several seeds, a cell shows the mean (lowest to highest). The "
        "section of each system lists all policies.",
        markdown_table(header, rows, left=4),
        *notes,
    ]


def policy_section(results: Results, system: str, image: str) -> list[str]:
    """Return the section of one system in paragraphs; nothing if there are no exit policies.

    Args:
      image: Markdown of the plot, or "".
    """
    groups = tradeoffs_by_set(results, system)
    early_exits = [record for run in results.runs_of(system) for record in run.early_exits]
    if not groups and not early_exits:
        return []
    paragraphs = ["### Dynamic exits", image, _INTRODUCTION]
    for records in groups:
        paragraphs += _set_section(records)
    if early_exits:
        shown = {warning for records in groups for warning in _warnings(records)}
        paragraphs += [
            "Decoded with the policy in use, so that layers above the chosen exit are not run; the real-time factor "
            "includes the policy:",
            *(f"**Note:** {warning}." for warning in _warnings(early_exits) if warning not in shown),
            _decoded_table(early_exits),
        ]
    return [*paragraphs, commands([*(record for records in groups for record in records), *early_exits])]


def _set_section(records: Sequence[TradeoffRecord]) -> list[str]:
    """Return the results on one set: of one seed in full, of several the means and each seed folded away."""
    notes = [f"**Note:** {warning}." for warning in _warnings(records)]
    test_set = records[0].test_set
    if len(records) == 1:
        return [f"#### {test_set}, seed {records[0].seed}", *notes, *_one_seed(records[0])]
    seeds = ", ".join(str(record.seed) for record in records)
    paragraphs = [
        f"#### {test_set}, {len(records)} seeds",
        *notes,
        f"Mean over seeds {seeds} (lowest to highest), for each share of errors that calibration allows to add:",
        _means_table(records),
        *_equal_cost(records),
    ]
    for each in records:
        summary = f"<details><summary>{test_set}, seed {each.seed}</summary>"
        paragraphs += [summary, *_one_seed(each), "</details>"]
    return paragraphs


def _warnings(records: Sequence[TradeoffRecord] | Sequence[EarlyExitRecord]) -> list[str]:
    """Return the distinct warnings of the records, without a full stop."""
    return list(dict.fromkeys(record.warning.rstrip(".") for record in records if record.warning))


# ---- savings relative to the last exit


def _one_seed(record: TradeoffRecord) -> list[str]:
    """Return a description, a table for each allowed share of added errors, and the comparison at equal cost."""
    paragraphs = [
        f"Calibrated on {record.calibration_set}, decoded by {record.method}. The last exit without a policy: "
        f"WER {percent(record.last_wer)} ({record.num_utterances} utterances, {record.ref_words} words), "
        f"{record.last_macs_per_second / 1e9:.3f}·10⁹ MACs per s of audio, real-time factor {record.last_rtf:.4f}. "
        f"Commit `{record.commit}`, {record.date[:10]}."
    ]
    header = ["policy", "setting", "WER", "change over the last exit (95 % CI)", "MACs saved", "layers saved"]
    header += ["time saved", "MACs saved, best setting on this set"]
    for allowed in _allowed([record]):
        rows = [
            [
                *(s.policy, s.setting, percent(s.wer)),
                f"{change(s.relative_wer)} ({change(s.relative_wer_low)} to {change(s.relative_wer_high)})",
                *map(share, (s.macs_saved, s.layers_saved, s.time_saved, s.hindsight_macs_saved)),
            ]
            for policy in ordered_policies(s.policy for s in record.savings)
            for s in record.savings
            if (s.policy, s.allowed) == (policy, allowed)
        ]
        limit = f"at most {share(allowed, 0)} to the last exit's errors" if allowed else "no errors"
        paragraphs += [f"Calibrated to add {limit}:", markdown_table(header, rows, left=2)]
    return [*paragraphs, *_equal_cost([record])]


def _means_table(records: Sequence[TradeoffRecord]) -> str:
    """Return a table with a row for each policy, and with WER change and MACs saved for each allowed share."""
    allowed = _allowed(records)
    header = [f"+{share(each, 0)}:<br>{name}" for each in allowed for name in ("WER change", "MACs saved")]
    rows = [
        [policy, *(cell for each in allowed for cell in _mean_cells(records, each, policy))]
        for policy in ordered_policies(s.policy for record in records for s in record.savings)
    ]
    return markdown_table(["policy", *header], rows)


def _mean_cells(records: Sequence[TradeoffRecord], allowed: float, policy: str) -> list[str]:
    """Return the WER change and the MACs saved by one policy, mean and range over seeds."""
    savings = [s for record in records for s in record.savings if (s.policy, s.allowed) == (policy, allowed)]
    return [
        spread([s.relative_wer for s in savings], change, len(records), to=" to "),
        spread([s.macs_saved for s in savings], share, len(records), to=" to "),
    ]


def _allowed(records: Sequence[TradeoffRecord]) -> list[float]:
    return sorted({s.allowed for record in records for s in record.savings})


# ---- at equal cost


def _equal_cost(records: Sequence[TradeoffRecord]) -> list[str]:
    """Return the comparison with the fixed exits, of one seed or as the mean of several."""
    points: dict[str, dict[float, list[BudgetPoint]]] = {}  # {policy: {budget: points by seed}}
    for point in (point for record in records for point in record.budgets if point.policy != FIXED):
        points.setdefault(point.policy, {}).setdefault(point.budget, []).append(point)
    if not points:
        return []
    budgets = sorted({budget for by_budget in points.values() for budget in by_budget})
    fixed = [[p.fixed_wer for own in points.values() for p in own.get(budget, [])] for budget in budgets]
    rows, counts = [["(WER of the fixed exits)", *(percent(mean(wers)) for wers in fixed)]], []
    for policy in ordered_policies(points):
        own = points[policy]
        rows.append([policy, *(_difference_cell(own.get(budget, []), len(records)) for budget in budgets)])
        below = [seeds for seeds in own.values() if mean([point.difference for point in seeds]) < 0]
        bold = sum(_is_clear(seeds, len(records)) for seeds in below)
        counts.append(f"{policy} at {len(below)} of {len(own)} ({bold} in bold)")
    whose = "the 95 % interval" if len(records) == 1 else "the 95 % interval of every seed"
    return [
        "Compared with the fixed exits at equal cost: the WER of the policy minus that of the fixed exits, in percent "
        "absolute. Each column is an average cost, as a share of the last exit's MACs. Differences are in bold if "
        f"{whose} excludes 0.",
        markdown_table(["policy", *(share(budget, 0) for budget in budgets)], rows),
        f"Budgets with a WER below the fixed exits: {', '.join(counts)}.",
    ]


def _difference_cell(points: Sequence[BudgetPoint], seeds: int) -> str:
    if not points:
        return "–"
    text = f"{round(mean([point.difference for point in points]), 2) + 0.0:+.2f}"
    return f"**{text}**" if _is_clear(points, seeds) else text


def _is_clear(points: Sequence[BudgetPoint], seeds: int) -> bool:
    """Return whether the intervals of all seeds are on the same side of 0."""
    one_side = all(p.difference_high < 0 for p in points) or all(p.difference_low > 0 for p in points)
    return len(points) == seeds and one_side


# ---- decoded with a policy


def _decoded_table(records: Sequence[EarlyExitRecord]) -> str:
    """Return a table with a row for each decoding; problems have a column only if there are any."""
    order = ordered_policies(record.policy for record in records)
    records = sorted(records, key=lambda r: (r.test_set, order.index(r.policy), r.target, r.method, r.seed))
    problems = {
        "exits skipped for NaN": [record.nan_exits for record in records],
        "late": [record.late_utterances for record in records],
        "empty lattices": [record.fallback_utterances for record in records],
    }
    problems = {name: counts for name, counts in problems.items() if any(counts)}
    header = ["set", "seed", "policy", "target", "decoding"]
    header += ["WER", "mean layer", "utterances by exit", "MACs saved", "real-time factor", *problems]
    rows = [
        [
            *(r.test_set, str(r.seed), r.policy, r.target, r.method, percent(r.wer), f"{r.layers:.2f}"),
            ", ".join(f"{layer}: {count}" for layer, count in sorted(r.exits.items())),
            share(1 - r.macs_per_second / r.last_exit_macs_per_second),
            f"{r.rtf:.4f}",
            *(str(counts[number]) for counts in problems.values()),
        ]
        for number, r in enumerate(records)
    ]
    return markdown_table(header, rows, left=5)
