"""Exit policies in the report: their records in results files, tables and plots."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from splitformer.errors import UserError
from splitformer.report.early_exit import ordered_policies
from splitformer.report.plots import plot_all
from splitformer.report.records import BudgetPoint, DecodeRecord, EarlyExitRecord, Saving, TradeoffPoint, TradeoffRecord
from splitformer.report.render import render
from splitformer.report.results import Results, load_published
from splitformer.report.runs import Run, gather, load_run, load_runs, save_run

EXITS = (2, 4, 6, 8)
LAST = {"wer": 10.0, "macs": 8e7, "rtf": 0.008}
POLICIES = ("deadline", "learned", "patience", "posterior", "entropy")  # not in the order of tables
ALLOWED = (0.0, 0.05, 0.10)
BUDGETS = (0.4, 0.6, 0.8)


def decode_record(system: str, seed: int, test_set: str, layer: int) -> DecodeRecord:
    return DecodeRecord(
        corpus="toy", system=system, seed=seed, test_set=test_set, exit_layer=layer, num_layers=8,
        method="greedy_search", wer=80 / layer, errors=160 // layer, insertions=0, deletions=160 // layer,
        substitutions=0, ref_words=200, num_utterances=40, fallback_utterances=0, audio_seconds=120.0,
        rtf=layer / 1000, parameters=layer * 10**6, macs_per_second=layer * 1e7, epoch=20, avg=5,
        training_seconds=60.0, world_size=1, device="cpu", config={"optim": {"base_lr": 0.1}}, commit="0123abc",
        command=f"python -m decode --checkpoint exp/{system}-seed{seed}/averaged.pt", date="2026-01-02T03:04:05",
    )  # fmt: skip


def point(policy: str, setting: str, wer: float, layers: float) -> TradeoffPoint:
    return TradeoffPoint(policy, setting, wer, wer - 1.0, wer + 1.0, layers, layers * 1e7, layers / 1000)


def saving(policy: str, allowed: float, change: float, saved: float, hindsight: float | None) -> Saving:
    return Saving(
        policy, allowed, f"threshold {allowed}", 10 * (1 + change), change, change - 0.04, change + 0.04,
        saved, saved + 0.01, saved - 0.02, hindsight, hindsight,
    )  # fmt: skip


def budget(policy: str, share: float, difference: float, half_width: float) -> BudgetPoint:
    low, high = difference - half_width, difference + half_width
    return BudgetPoint(policy, share, 12 + difference, 12.0, difference, low, high)


def tradeoff(system: str = "split", seed: int = 1, test_set: str = "test", settings: int = 4) -> TradeoffRecord:
    """Policies in random order; only the figures of `learned` differ between seeds."""
    points = [point("fixed", f"layer {layer}", 80 / layer, layer) for layer in EXITS]
    for place, policy in enumerate(POLICIES):
        # from deep to shallow: not in the order of cost
        points += [
            point(policy, f"threshold {n / 7:.4f}", 9.0 + place + n, 8 - 6.1234567 * n / settings)
            for n in range(settings)
        ]
    points.append(point("oracle", "", 6.0, 2.5))
    savings = [saving(policy, allowed, 0.02, 0.1, None) for allowed in ALLOWED for policy in POLICIES[2:]]
    savings += [saving("deadline", allowed, 0.5, -0.125, None) for allowed in ALLOWED]
    savings += [saving("learned", each, each - 0.01 * seed, 0.2 + each + 0.1 * seed, 0.6) for each in ALLOWED]
    budgets = [budget(policy, share, 0.0, 0.5) for policy in POLICIES[2:] for share in BUDGETS]
    # an interval that touches 0 does not exclude it
    budgets += [budget("learned", 0.4, -1.0 * seed, 0.5), budget("learned", 0.6, -0.5, 0.5)]
    budgets += [budget("learned", 0.8, 0.25, 2.0)]
    budgets += [budget("deadline", 0.8, 3.0, 0.5)]
    return TradeoffRecord(
        corpus="toy", system=system, seed=seed, test_set=test_set, calibration_set="dev", method="greedy_search",
        exit_layers=EXITS, num_utterances=40, ref_words=200, audio_seconds=120.0, last_wer=LAST["wer"],
        last_macs_per_second=LAST["macs"], last_rtf=LAST["rtf"], points=tuple(points), savings=tuple(savings),
        budgets=tuple(budgets), commit="0123abc", command=f"python -m tradeoff --seed {seed}",
        date="2026-01-03T03:04:05",
    )  # fmt: skip


def early_exit(system: str = "split", seed: int = 1, **changes) -> EarlyExitRecord:
    record = EarlyExitRecord(
        corpus="toy", system=system, seed=seed, test_set="test", method="greedy_search", policy="learned",
        target="max_relative_wer 0.05", wer=10.5, errors=21, insertions=1, deletions=10, substitutions=10,
        ref_words=200, num_utterances=40, fallback_utterances=0, nan_exits=0, late_utterances=0,
        exits={2: 10, 4: 20, 8: 10}, layers=4.5, macs_per_second=5e7, last_exit_macs_per_second=8e7,
        audio_seconds=120.0, rtf=0.0051234567, commit="0123abc", command="python -m decode --policy learned.json",
        date="2026-01-04T03:04:05",
    )  # fmt: skip
    return dataclasses.replace(record, **changes)


def run(
    system: str, seed: int, tradeoffs: tuple[TradeoffRecord, ...] = (), early_exits: tuple[EarlyExitRecord, ...] = ()
) -> Run:
    decode = tuple(decode_record(system, seed, name, layer) for name in ("dev", "test") for layer in EXITS)
    return Run(decode, (), tradeoffs, early_exits)


def rendered(*runs: Run) -> str:
    return render(Results("toy", runs, ("dev",)), [], {}, "command")


def with_policies(seed: int = 1, **changes) -> Run:
    return run("split", seed, (tradeoff(seed=seed),), (early_exit(seed=seed, **changes),))


def rows_after(text: str, lead_in: str) -> list[dict[str, str]]:
    """Return the first table after a line with this beginning, as rows of {column: cell}."""
    found = re.search(rf"^{re.escape(lead_in)}.*?\n\n(\|.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no table after {lead_in!r}"
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[1].strip().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


# ---- files


def write_experiment(exp_dir: Path, own: Run) -> None:
    for each in own.decode:
        each.save(exp_dir / "decode" / f"{each.test_set}-exit-{each.exit_layer:02d}.json")
    for each in own.tradeoffs:
        each.save(exp_dir / "early_exit" / f"tradeoff-{each.test_set}.json")
    for each in own.early_exits:
        each.save(exp_dir / "early_exit" / f"{each.test_set}-{each.policy}.json")


def assert_near(found: object, expected: object) -> None:
    """Check equality up to rounded floats."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(found[name], value)
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert_near(ours, theirs)
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-12)
    else:
        assert found == expected


def test_records_of_policies_are_gathered_and_load_again(tmp_path: Path) -> None:
    write_experiment(tmp_path / "exp" / "split-seed1", with_policies())
    write_experiment(tmp_path / "exp" / "plain-seed1", run("plain", 1))
    tradeoff(system="undecoded").save(tmp_path / "exp" / "undecoded-seed1" / "early_exit" / "tradeoff-test.json")
    written = gather(tmp_path / "exp", tmp_path / "results", "toy")
    assert [path.name for path in written] == ["plain-seed1.json", "split-seed1.json"]
    plain, split = load_runs(tmp_path / "results", "toy")
    assert (plain.tradeoffs, plain.early_exits) == ((), ())

    assert len(split.tradeoffs) == 1
    assert_near(dataclasses.asdict(split.tradeoffs[0]), dataclasses.asdict(tradeoff()))
    assert split.tradeoffs[0].points[-2].layers == 3.4074  # 5 digits of 8 - 6.1234567 * 3 / 4
    assert split.early_exits == (early_exit(rtf=0.0051235),)

    before = written[1].read_bytes()
    save_run(split, written[1])  # rounded values stay
    assert written[1].read_bytes() == before


def test_a_results_file_is_small_and_has_one_point_a_line(tmp_path: Path) -> None:
    large = tradeoff(settings=24)
    assert len(large.points) >= 120
    save_run(run("split", 1, (large,), (early_exit(),)), tmp_path / "split-seed1.json")
    text = (tmp_path / "split-seed1.json").read_text()
    assert len(text) < 30_000
    assert sum(line.strip().startswith('["') for line in text.splitlines()) >= sum(
        map(len, (large.points, large.savings, large.budgets))
    )
    assert load_run(tmp_path / "split-seed1.json").tradeoffs[0].budgets == large.budgets


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v.update(tradeoff=[]), "is not a results file"),
        (lambda v: v["tradeoffs"][0].update(wer=1.0), r"unknown keys \['wer'\]"),
        (lambda v: v["tradeoffs"][0].pop("savings"), r"missing keys \['savings'\]"),
        (lambda v: v["tradeoffs"][0]["points"]["columns"].__setitem__(0, "name"), r"unknown keys \['name'\]"),
        (lambda v: v["tradeoffs"][0]["points"]["rows"][3].pop(), "points: not a table"),
        (lambda v: v["tradeoffs"][0]["points"].clear(), "points: not a table"),
        (lambda v: v["early_exits"][0].update(cer=1.0), r"unknown keys \['cer'\]"),
        (lambda v: v["early_exits"][0].pop("exits"), r"missing keys \['exits'\]"),
    ],
)
def test_a_results_file_with_other_keys_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict], object], named: str
) -> None:
    path = tmp_path / "split-seed1.json"
    save_run(with_policies(), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=named) as raised:
        load_run(path)
    assert "split-seed1.json" in str(raised.value)


@pytest.mark.parametrize("stray", [{"corpus": "other"}, {"system": "baseline"}, {"seed": 7}])
@pytest.mark.parametrize("kind", ["tradeoffs", "early_exits"])
def test_records_of_another_model_are_refused(tmp_path: Path, kind: str, stray: dict) -> None:
    own = with_policies()
    record = dataclasses.replace(getattr(own, kind)[0], **stray)
    write_experiment(tmp_path / "exp" / "split-seed1", dataclasses.replace(own, **{kind: (record,)}))
    with pytest.raises(UserError, match=f"holds records of {next(iter(stray))}"):
        gather(tmp_path / "exp", tmp_path / "results", "toy")


# ---- tables


def test_savings_of_one_seed() -> None:
    text = rendered(with_policies())
    section = text[text.index("### Dynamic exits\n") :]
    assert "#### test, seed 1\n" in section
    assert "Calibrated on dev, decoded by greedy_search. The last exit without a policy: WER 10.00 (40 " in section
    rows = rows_after(section, "Calibrated to add at most 5 % to the last exit's errors:")
    assert [row["policy"] for row in rows] == ["entropy", "posterior", "patience", "learned", "deadline"]
    assert rows[3] == {
        "policy": "learned", "setting": "threshold 0.05", "WER": "10.40",
        "change over the last exit (95 % CI)": "+4.0 % (+0.0 % to +8.0 %)", "MACs saved": "35.0 %",
        "layers saved": "36.0 %", "time saved": "33.0 %", "MACs saved, best setting on this set": "60.0 %",
    }  # fmt: skip
    assert rows[4]["MACs saved"] == "-12.5 %"  # it costs more than the last exit
    assert rows[4]["MACs saved, best setting on this set"] == "–"
    strict = rows_after(section, "Calibrated to add no errors:")
    assert strict[3]["change over the last exit (95 % CI)"] == "-1.0 % (-5.0 % to +3.0 %)"
    assert rows_after(section, "Calibrated to add at most 10 %")[3]["MACs saved"] == "40.0 %"


def test_policies_at_equal_cost() -> None:
    text = rendered(with_policies())
    rows = rows_after(text, "Compared with the fixed exits at equal cost")
    assert rows[0] == {"policy": "(WER of the fixed exits)", "40 %": "12.00", "60 %": "12.00", "80 %": "12.00"}
    learned, deadline = rows[4:]
    assert learned == {"policy": "learned", "40 %": "**-1.00**", "60 %": "-0.50", "80 %": "+0.25"}
    assert deadline == {"policy": "deadline", "40 %": "–", "60 %": "–", "80 %": "**+3.00**"}  # bold: worse
    assert "learned at 2 of 3 (1 in bold), deadline at 0 of 1 (0 in bold)." in text


def test_several_seeds_have_a_table_of_means_and_their_own_tables() -> None:
    text = rendered(with_policies(1), with_policies(2))
    rows = rows_after(text, "Mean over seeds 1, 2")
    assert list(rows[3])[:3] == ["policy", "+0 %:<br>WER change", "+0 %:<br>MACs saved"]
    # changes 0.04 and 0.03, savings 0.35 and 0.45
    assert rows[3]["+5 %:<br>WER change"] == "+3.5 % (+3.0 % to +4.0 %)"
    assert rows[3]["+5 %:<br>MACs saved"] == "40.0 % (35.0 % to 45.0 %)"
    equal = rows_after(text, "Compared with the fixed exits at equal cost")
    assert equal[4] == {"policy": "learned", "40 %": "**-1.50**", "60 %": "-0.50", "80 %": "+0.25"}
    assert text.count("<details><summary>test, seed ") == 2
    second = text[text.index("<details><summary>test, seed 2") :]
    assert rows_after(second, "Calibrated to add at most 5 %")[3]["MACs saved"] == "45.0 %"


def test_bold_needs_all_seeds_and_missing_seeds_are_counted() -> None:
    other = tradeoff(seed=2)
    worse = budget("learned", 0.4, 0.1, 0.5)
    budgets = tuple(worse if (b.policy, b.budget) == ("learned", 0.4) else b for b in other.budgets)
    fewer = tuple(s for s in other.savings if s.policy != "learned")
    other = dataclasses.replace(other, budgets=budgets, savings=fewer)
    text = rendered(with_policies(1), run("split", 2, (other,)))
    assert rows_after(text, "Compared with the fixed exits at equal cost")[4]["40 %"] == "-0.45"
    assert rows_after(text, "Mean over seeds 1, 2")[3]["+5 %:<br>MACs saved"] == "35.0 % [1 of 2 seeds]"


def test_decodings_with_a_policy() -> None:
    rows = rows_after(rendered(with_policies()), "Decoded with the policy in use")
    assert rows == [
        {
            "set": "test", "seed": "1", "policy": "learned", "target": "max_relative_wer 0.05",
            "decoding": "greedy_search", "WER": "10.50", "mean layer": "4.50",
            "utterances by exit": "2: 10, 4: 20, 8: 10", "MACs saved": "37.5 %", "real-time factor": "0.0051",
        }
    ]  # fmt: skip
    problems = rows_after(rendered(with_policies(nan_exits=3, late_utterances=5)), "Decoded with the policy in use")
    assert (problems[0]["exits skipped for NaN"], problems[0]["late"]) == ("3", "5")
    assert "empty lattices" not in problems[0]


def test_the_summary_has_a_row_per_system_with_policies() -> None:
    text = rendered(run("baseline", 1), with_policies(1), with_policies(2))
    assert rows_after(text, "### Savings of dynamic exits") == [
        {
            "system": "split", "set": "test", "seeds": "1, 2", "policy": "learned",
            "WER change over the last exit": "+3.5 % (+3.0 % to +4.0 %)", "MACs saved": "40.0 % (35.0 % to 45.0 %)",
        }
    ]  # fmt: skip
    assert text.index("### Savings of dynamic exits") < text.index("## Side by side")
    unlearned = tradeoff()
    unlearned = dataclasses.replace(unlearned, savings=tuple(s for s in unlearned.savings if s.policy != "learned"))
    text = rendered(run("split", 1, (unlearned,), (early_exit(policy="patience"),)))
    assert rows_after(text, "### Savings of dynamic exits")[0]["policy"] == "patience"
    assert "### Savings" not in rendered(run("split", 1, (tradeoff(test_set="dev"),)))  # only tests are results


def test_commands_of_policies_are_listed() -> None:
    text = rendered(with_policies())
    assert "# seed 1; test; greedy_search\npython -m tradeoff --seed 1\n" in text
    assert "python -m decode --policy learned.json\n" in text


def test_variants_follow_their_policy_and_unknown_names_precede_the_oracle() -> None:
    names = ["oracle", "unknown", "entropy_non_blank", "patience_2", "patience", "entropy", "fixed", "budget"]
    assert ordered_policies([*names, "budget"]) == [
        "fixed", "entropy", "entropy_non_blank", "patience", "patience_2", "budget", "unknown", "oracle",
    ]  # fmt: skip


def test_a_warning_stands_above_the_tables_of_its_set_and_below_the_summary() -> None:
    warned = dataclasses.replace(tradeoff(), warning="dev and test share all speakers")
    text = rendered(run("split", 1, (warned,), (early_exit(warning="dev and test share all speakers"),)))
    summary, section = text.split("## Side by side")
    assert rows_after(summary, "### Savings of dynamic exits")[0]["system"] == "split †"
    assert "\n\n† split, test: dev and test share all speakers.\n\n" in summary
    assert section.index("#### test") < section.index("**Note:** dev and test share") < section.index("Calibrated on")
    assert section.count("**Note:**") == 1  # the same warning of the decoding is not repeated
    other = rendered(run("split", 1, (tradeoff(),), (early_exit(warning="something else."),)))
    assert "**Note:** something else.\n\n| set |" in other and "†" not in other


def test_policies_with_a_single_exit_and_no_comparison() -> None:
    points = (point("fixed", "layer 2", 40.0, 2), point("oracle", "", 40.0, 2))
    single = dataclasses.replace(tradeoff(), exit_layers=(2,), points=points, savings=(), budgets=(), num_utterances=1)
    text = rendered(run("split", 1, (single,)))
    assert "### Dynamic exits" in text and "### Savings" not in text and "equal cost" not in text


def test_policies_add_sections_and_change_nothing_else() -> None:
    text = rendered(run("baseline", 1), run("split", 1))
    assert "ynamic" not in text
    both = rendered(run("baseline", 1), with_policies())
    kept = re.sub(r"### Savings of dynamic exits\n.*?(?=## Side by side)", "", both, flags=re.DOTALL)
    assert kept.partition("\n### Dynamic exits\n")[0].rstrip() == text.rstrip()


@pytest.mark.parametrize("corpus", ["an4", "mini"])
def test_the_committed_reports_are_what_the_committed_results_make(repo_root: Path, corpus: str) -> None:
    text = (repo_root / "egs" / corpus / "RESULTS.md").read_text()
    command = re.search(r"Generated by `([^`]+)`", text)[1]
    words = shlex.split(command)
    dev_sets = [words[words.index("--dev-sets") + 1]]
    published = []
    if "--published" in words:
        published = load_published(repo_root / words[words.index("--published") + 1])
    plots = dict(re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text))
    results = Results(corpus, load_runs(repo_root / "egs" / corpus / "results", corpus), dev_sets)
    assert render(results, published, plots, command) == text


# ---- plots


def test_a_plot_per_system_with_policies(tmp_path: Path) -> None:
    results = Results("toy", [run("baseline", 1), with_policies()], ("dev",))
    plots = plot_all(results, [], tmp_path / "a")
    assert plots["Dynamic exits of split"] == "early-exit-split.png"
    assert not (tmp_path / "a" / "early-exit-baseline.png").exists()
    image = (tmp_path / "a" / "early-exit-split.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and 5_000 < len(image) < 80_000
    text = render(results, [], plots, "command")
    assert text.count("early-exit-split.png") == 1
    assert "### Dynamic exits\n\n![Dynamic exits of split](early-exit-split.png)\n" in text

    # the order in which points stand in the record is of no consequence: lines go by cost
    own = results.runs[1]
    points = own.tradeoffs[0].points
    mixed = dataclasses.replace(own.tradeoffs[0], points=points[::2] + points[1::2])
    plot_all(Results("toy", [dataclasses.replace(own, tradeoffs=(mixed,))], ("dev",)), [], tmp_path / "b")
    assert (tmp_path / "b" / "early-exit-split.png").read_bytes() == image


def test_the_interval_of_the_recipes_policy_is_a_band(tmp_path: Path) -> None:
    """Another interval gives another picture."""
    own = tradeoff()
    named = dataclasses.replace(own, points=tuple(
        dataclasses.replace(p, policy="learned_nbest") if p.policy == "learned" else p for p in own.points
    ))  # fmt: skip
    images = []
    for width in (0.0, 3.0):
        points = tuple(dataclasses.replace(p, wer_low=p.wer - width) if p.policy == "learned_nbest" else p
                       for p in named.points)  # fmt: skip
        runs = [run("split", 1, (dataclasses.replace(named, points=points),))]
        plot_all(Results("toy", runs, ("dev",)), [], tmp_path)
        images.append((tmp_path / "early-exit-split.png").read_bytes())
    assert images[0] != images[1]
