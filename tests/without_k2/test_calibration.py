"""Tables of exits, the regressions on them, and policies fitted to a target, against loops and other optimisers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from splitformer.early_exit.calibration import (
    Family,
    Target,
    calibrate,
    exponential_weights,
    fit_regression,
    folds,
    log_loss,
    logistic_regression,
    make_family,
    rising_line,
    thresholds,
)
from splitformer.early_exit.exit_table import ExitTable, Outcome, fixed, oracle, outcome, without_policy
from splitformer.early_exit.names import POLICIES, WITHOUT_CTC
from splitformer.early_exit.policies import Deadline, Fixed, Learned, Patience, Regression, Threshold, feature
from splitformer.errors import UserError
from tests.tables import LAYERS, UNCERTAINTIES, make_table

BY_PROBABILITY = (*UNCERTAINTIES, "patience", "learned")


def with_statistic(table: ExitTable, name: str, values: torch.Tensor) -> ExitTable:
    return replace(table, statistics={**table.statistics, name: values})


def fit_one(table: ExitTable, family: Family, kind: str, value: float):
    [fitted] = calibrate(table, family, [Target(kind, value)])
    return fitted


# ---- tables


def equal(a: ExitTable, b: ExitTable) -> bool:
    def same(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        return x == y and type(x) is type(y)

    return all(same(value, getattr(b, name)) for name, value in vars(a).items())


def test_a_saved_table_loads_unchanged(tmp_path):
    path = tmp_path / "new" / "dev.json"
    table = make_table(7, speakers=3)
    table = replace(table, speakers=["äöü", *table.speakers[1:-1], ""])
    assert table.statistics["disagreement"].isnan().sum() == 7
    table.save(path)
    assert equal(ExitTable.load(path), table)
    # other readers of JSON know no NaN
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_some_of_the_utterances():
    table = make_table(9, speakers=4)
    which = torch.tensor([True, False, False, True, True, False, False, False, True])
    some = table.some(which)
    assert len(some) == 4 and some.layers == table.layers
    assert some.utterances == ["dev-0", "dev-3", "dev-4", "dev-8"]
    assert some.speakers == [table.speakers[place] for place in (0, 3, 4, 8)]
    assert torch.equal(some.errors, table.errors[[0, 3, 4, 8]])
    assert torch.equal(some.statistics["entropy"], table.statistics["entropy"][which])
    assert torch.equal(some.statistic_seconds["posterior"], table.statistic_seconds["posterior"][which])
    assert torch.equal(some.ref_words, table.ref_words[which])
    assert equal(table.some(torch.ones(9, dtype=torch.bool)), table)


def _without(name):
    return lambda values: {key: value for key, value in values.items() if key != name}


def _with(name, change):
    return lambda values: {**values, name: change(values[name])}


@pytest.mark.parametrize(
    "change",
    [
        *(_without(name) for name in ("layers", "errors", "statistics", "speakers")),
        lambda values: {**values, "mood": 1},
        lambda values: [values],
        lambda values: None,
        _with("errors", lambda rows: rows[:-1]),
        _with("errors", lambda rows: [row[:-1] for row in rows]),
        _with("errors", lambda rows: [rows[0][:-1], *rows[1:]]),
        _with("errors", lambda rows: "many"),
        _with("errors", lambda rows: 3),
        _with("errors", lambda rows: None),
        _with("errors", lambda rows: [["many"] * len(rows[0])] * len(rows)),
        _with("errors", lambda rows: {"entropy": rows[1:]}),
        _with("ref_words", lambda words: words[:-1]),
        _with("audio_seconds", lambda seconds: [None, *seconds[1:]]),
        _with("audio_seconds", lambda seconds: [[each] for each in seconds]),
        _with("statistics", lambda columns: {**columns, "entropy": columns["entropy"][1:]}),
        _with("statistic_seconds", lambda columns: {**columns, "entropy": [[0.0]]}),
        _with("layers", lambda layers: layers[:-1]),
        _with("layers", lambda layers: 12),
        _with("speakers", lambda speakers: speakers[:-1]),
        _with("utterances", lambda utterances: [*utterances, "one more"]),
    ],
)
def test_other_json_is_refused(change, tmp_path):
    path = tmp_path / "dev.json"
    make_table(5).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=r"dev\.json is not a table of exits .*make it again"):
        ExitTable.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", None])
def test_damaged_files_are_refused(content, tmp_path):
    path = tmp_path / "dev.json"
    make_table(5).save(path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(UserError, match=r"dev\.json .*make it again"):
        ExitTable.load(path)


# ---- the result of a policy


def walk(policy, table: ExitTable, utterance: int) -> tuple[int, float, float, float, float]:
    """Return exit, errors, layers, multiply-accumulates and seconds of one utterance, exit by exit."""
    last = len(table.layers) - 1
    macs = seconds = 0.0
    for place, layer in enumerate(table.layers):
        macs += float(table.head_macs[utterance, place])
        seconds += float(table.head_seconds[utterance, place])
        if place < last:
            for name in policy.needs:
                if name in table.statistic_seconds:
                    seconds += float(table.statistic_seconds[name][utterance, place])
            history = {name: table.statistics[name][utterance : utterance + 1, : place + 1] for name in policy.needs}
            [stops] = policy.stops(layer, history).tolist()
        if place == last or stops:
            break
    macs += float(table.encoder_macs[utterance, place] + table.search_macs[utterance, place])
    seconds += float(table.encoder_seconds[utterance, place])
    if "nbest_posterior" not in policy.needs or place == last:  # else the search gave the statistic
        seconds += float(table.search_seconds[utterance, place])
    return place, float(table.errors[utterance, place]), table.layers[place], macs, seconds


TABLE = make_table(40, seed=3)
LEARNED = make_family("learned").fit(TABLE)(0.3)
FITTED = (
    *(Fixed(layer) for layer in (2, 8, 12)),
    *(Threshold(name, {2: 0.1, 4: 0.2, 8: 0.3, 10: 0.1}) for name in UNCERTAINTIES),
    Threshold("entropy", {}),
    Patience({2: 1.0, 4: 0.1, 6: 0.2, 8: 0.2, 10: 0.3}),
    Patience({6: 0.2, 8: 0.3, 10: 0.4}, 2),
    LEARNED,
    replace(LEARNED, weights={name: LEARNED.weights[name] for name in ("entropy", "disagreement", "frames")}),
    make_family("budget").fit(TABLE)(0.6),
    make_family("deadline").fit(TABLE)(0.03),
)


@pytest.mark.parametrize("policy", FITTED, ids=lambda policy: "-".join([policy.kind, *policy.needs]))
def test_the_outcome_of_a_table_is_that_of_each_utterance(policy):
    result = outcome(policy, TABLE)
    expected = [walk(policy, TABLE, utterance) for utterance in range(len(TABLE))]
    for values, column in zip(zip(*expected), result):
        assert column.tolist() == pytest.approx(values, rel=1e-12)
    if policy.kind != "fixed" and policy != Threshold("entropy", {}):
        assert len(set(result.taken.tolist())) >= 3, "the policy hardly chooses: nothing is tested"


def test_without_a_policy_one_head_is_read_and_no_statistics():
    for place, layer in enumerate(LAYERS):
        result = fixed(TABLE, layer)
        assert result.taken.tolist() == [place] * len(TABLE)
        assert torch.equal(result.errors, TABLE.errors[:, place])
        assert result.layers.tolist() == [layer] * len(TABLE)
        macs = TABLE.encoder_macs + TABLE.head_macs + TABLE.search_macs
        seconds = TABLE.encoder_seconds + TABLE.head_seconds + TABLE.search_seconds
        assert torch.equal(result.macs, macs[:, place]) and torch.equal(result.seconds, seconds[:, place])
        with_policy = outcome(Fixed(layer), TABLE)
        assert torch.equal(with_policy.errors, result.errors)
        assert (with_policy.macs > result.macs).all() if place else torch.equal(with_policy.macs, result.macs)
    mixed = torch.arange(len(TABLE)) % len(LAYERS)
    result = without_policy(TABLE, mixed)
    assert result.errors.tolist() == [row[place] for row, place in zip(TABLE.errors.tolist(), mixed.tolist())]


@pytest.mark.parametrize("price", [0.0, 1e-3, 0.3, 2.0, 1e4])
def test_no_policy_is_below_the_oracle(price):
    macs = (TABLE.encoder_macs + TABLE.head_macs + TABLE.search_macs).tolist()
    mean = sum(row[-1] for row in macs) / len(TABLE)
    best = oracle(TABLE, price)
    for utterance, place in enumerate(best.taken.tolist()):
        paid = [e + price * m / mean for e, m in zip(TABLE.errors[utterance].tolist(), macs[utterance])]
        assert paid[place] == pytest.approx(min(paid))

    def paid(result: Outcome) -> float:
        return float(result.errors.sum() + price * result.macs.sum() / mean)

    others = [outcome(policy, TABLE) for policy in FITTED] + [fixed(TABLE, layer) for layer in LAYERS]
    assert all(paid(best) <= paid(each) + 1e-9 for each in others)
    if price == 1e4:
        assert not best.taken.any()


# ---- the regression


def design(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x[:, 0] = 1.0
    b = torch.randn(columns, generator=generator, dtype=torch.float64)
    return x, (torch.rand(rows, generator=generator, dtype=torch.float64) < torch.sigmoid(x @ b)).double()


def objective(x, target, penalties, b) -> torch.Tensor:
    return binary_cross_entropy_with_logits(x @ b, target, reduction="sum") + 0.5 * (penalties * b.square()).sum()


def assert_minimum(x, target, penalties) -> torch.Tensor:
    b = logistic_regression(x, target, penalties)
    assert b.isfinite().all()
    gradient = x.T @ (torch.sigmoid(x @ b) - target) + penalties * b
    assert gradient.abs().max() < 1e-4
    # another optimiser, from another start, finds nothing lower
    other = torch.ones(x.size(1), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([other], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(x, target, penalties, other)
        loss.backward()
        return loss

    optimizer.step(closure)
    lowest = float(objective(x, target, penalties, other.detach()))
    assert float(objective(x, target, penalties, b)) <= lowest + 1e-6 * max(1.0, lowest)
    return b


@pytest.mark.parametrize(("rows", "columns", "penalty"), [(400, 6, 1.0), (400, 6, 1e-6), (12, 6, 30.0), (3, 9, 0.3)])
def test_the_regression_is_at_its_minimum(rows, columns, penalty):
    x, target = design(rows, columns)
    penalties = torch.full((columns,), penalty, dtype=torch.float64)
    penalties[0] = 1e-6
    assert_minimum(x, target, penalties)


@pytest.mark.parametrize("kind", ["separable", "far apart", "never", "always", "constant", "one row", "twice"])
def test_the_regression_converges_where_the_likelihood_has_no_maximum(kind):
    x, target = design(60, 4)
    penalties = torch.tensor([1e-6, 1.0, 1.0, 1.0], dtype=torch.float64)
    if kind in ("separable", "far apart"):
        target = (x[:, 1] > 0.3).double()
        x[:, 1] *= 1e4 if kind == "far apart" else 1.0
    elif kind in ("never", "always"):
        target = torch.full_like(target, float(kind == "always"))
    elif kind == "constant":
        x[:, 2] = 0.0
    elif kind == "one row":
        x, target = x[:1], target[:1]
    else:
        x[:, 2] = x[:, 1]
    b = assert_minimum(x, target, penalties)
    assert b[1:].abs().max() < 20.0
    if kind == "constant":
        assert b[2] == 0.0
    if kind == "twice":
        assert b[1] == pytest.approx(float(b[2]))


def synthetic(utterances: int, seed: int = 0) -> tuple[ExitTable, dict[int, float], dict[str, float]]:
    """Return a table whose errors are drawn from a regression, with its intercepts and weights."""
    generator = torch.Generator().manual_seed(seed)
    layers, shape = (2, 4, 6), (utterances, 3)
    intercepts, weights = {2: 2.0, 4: 0.5}, {"entropy": 1.5, "disagreement": 3.0, "frames": -0.4}
    entropy = torch.randn(*shape, generator=generator, dtype=torch.float64).exp()
    frames = (torch.rand(*shape, generator=generator, dtype=torch.float64)[:, :1] * 500 + 10).expand(shape)
    disagreement = torch.rand(*shape, generator=generator, dtype=torch.float64)
    table = make_table(utterances, layers=layers)
    statistics = {"entropy": entropy, "frames": frames, "disagreement": disagreement}
    logit = sum(weight * feature(name, statistics[name]) for name, weight in weights.items())
    logit = logit + torch.tensor([2.0, 0.5, 0.0])
    better = torch.rand(*shape, generator=generator, dtype=torch.float64) < torch.sigmoid(logit)
    # an exit has one error more than the best deeper one where that is better
    errors = torch.ones(shape, dtype=torch.float64)
    errors[:, 1] = errors[:, 2] + better[:, 1]
    errors[:, 0] = torch.where(better[:, 0], errors[:, 1:].amin(dim=1) + 1, errors[:, 1:].amin(dim=1))
    return replace(table, statistics=statistics, errors=errors), intercepts, weights


def test_the_fit_recovers_the_coefficients():
    table, intercepts, weights = synthetic(20000)
    regression = fit_regression(table, list(weights))
    for name, weight in weights.items():
        assert regression.weights[name] == pytest.approx(weight, abs=0.12), name
    assert regression.intercepts[2] - regression.intercepts[4] == pytest.approx(1.5, abs=0.1)
    assert regression.intercepts == pytest.approx(intercepts, abs=0.4)
    true = replace(regression, weights=weights, intercepts=intercepts)
    assert log_loss(regression, table) < log_loss(true, table) < log_loss(regression, table) + 15
    for change in (0.8, 1.2):
        worse = replace(regression, weights={name: change * weight for name, weight in regression.weights.items()})
        assert log_loss(worse, table) > log_loss(regression, table) + 15


def probability(regression: Regression, table: ExitTable, place: int) -> torch.Tensor:
    logit = regression.intercepts[table.layers[place]]
    for name, weight in regression.weights.items():
        value = feature(name, table.statistics[name][:, place])
        logit = logit + weight * value.nan_to_num(nan=regression.means[name])
    return torch.sigmoid(logit)


def test_log_loss_equals_a_loop():
    regression, other = fit_regression(TABLE, ["entropy", "disagreement"]), make_table(20, seed=9)
    expected = 0.0
    for place in range(len(LAYERS) - 1):
        for utterance, p in enumerate(probability(regression, other, place).tolist()):
            errors = other.errors[utterance].tolist()
            expected -= math.log(p if min(errors[place + 1 :]) < errors[place] else 1 - p)
    assert log_loss(regression, other) == pytest.approx(expected)


def test_a_penalty_draws_towards_one_intercept_and_no_slope():
    fits = [fit_regression(TABLE, ["entropy", "frames"], penalty) for penalty in (1e-3, 1.0, 1e3, 1e9)]
    spreads = [max(fit.intercepts.values()) - min(fit.intercepts.values()) for fit in fits]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1e-4 < spreads[0]
    assert fits[0].weights["entropy"] > fits[2].weights["entropy"] > 0
    assert fits[-1].weights["entropy"] == pytest.approx(0.0, abs=1e-4)
    better = (TABLE.errors.flip(1).cummin(dim=1).values.flip(1)[:, 1:] < TABLE.errors[:, :-1]).double().mean()
    assert probability(fits[-1], TABLE, 0) == pytest.approx(float(better), abs=1e-3)


@pytest.mark.parametrize("name", ["entropy", "posterior", "nbest_posterior", "disagreement"])
def test_thresholds_decide_as_the_probability_does(name):
    regression = fit_regression(TABLE, [name])
    assert regression.weights[name] > 0
    other = make_table(300, seed=8)
    decisions = set()
    for p in (0.0, 1e-6, 0.003, 0.05, 0.2, 0.5, 0.8, 0.97, 1 - 1e-9):
        policy = Threshold(name, thresholds(regression, p))
        for place, layer in enumerate(LAYERS[:-1]):
            stops = policy.stops(layer, {name: other.statistics[name][:, : place + 1]})
            if name == "disagreement" and place == 0:
                assert layer not in regression.intercepts and not stops.any()
                continue
            assert stops.tolist() == (probability(regression, other, place) <= p).tolist()
            decisions |= set(stops.tolist())
    assert decisions == {True, False}


def test_a_statistic_that_falls_with_the_errors_stops_nothing():
    upside_down = with_statistic(TABLE, "entropy", 1.0 / TABLE.statistics["entropy"])
    regression = fit_regression(upside_down, ["entropy"])
    assert regression.weights["entropy"] < 0 and thresholds(regression, 0.9) == {}
    policies = make_family("entropy").fit(upside_down)
    assert outcome(policies(0.9), upside_down).taken.tolist() == [len(LAYERS) - 1] * len(TABLE)


@pytest.mark.parametrize(
    "kind",
    ["constant", "zero", "no errors", "equal errors", "always better", "one utterance", "two exits", "one exit"],
)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_fitted_to_degenerate_tables(name, kind):
    table = make_table(12, speakers=4)
    if kind in ("constant", "zero"):
        value = 0.3 if kind == "constant" else 0.0
        statistics = {key: torch.full_like(each, value) for key, each in table.statistics.items()}
        statistics["disagreement"][:, 0] = math.nan
        table = replace(table, statistics=statistics)
    elif kind in ("no errors", "equal errors"):
        table = replace(table, errors=torch.full_like(table.errors, 2.0 * (kind == "equal errors")))
    elif kind == "always better":
        table = replace(table, errors=torch.arange(len(LAYERS), 0, -1).double().expand_as(table.errors))
    elif kind == "one utterance":
        table = table.some(torch.arange(12) == 0)
    elif kind == "two exits":
        table = make_table(12, speakers=4, layers=(2, 4))
    elif kind == "one exit":
        table = make_table(12, speakers=4, layers=(4,))
    family = make_family(name)
    policies = family.fit(table)
    settings = family.settings(table)
    for setting in {*settings[::9], settings[-1]}:
        assert family.describe(setting)
        policy = policies(setting)
        numbers = [each for each in vars(policy).values() if isinstance(each, dict)]
        flat = torch.tensor([each for some in numbers for each in some.values()], dtype=torch.float64)
        assert not flat.isnan().any()
        if name == "learned":
            assert flat.isfinite().all()
        assert all(column.isfinite().all() for column in outcome(policy, table))
    if len(table) > 1 and kind != "one exit":
        some = family._replace(settings=lambda table: settings[::9])
        fitted = fit_one(table, some, "max_relative_wer", 0.0)
        assert all(math.isfinite(number) for number in fitted[2:])


def test_policies_without_ctc_need_costs_and_lengths_alone():
    statistics = {key: TABLE.statistics[key] for key in ("frames", "batch_frames", "elapsed")}
    table = replace(TABLE, statistics=statistics, statistic_seconds={}).some(torch.arange(len(TABLE)) < 6)
    for name in WITHOUT_CTC:
        assert fit_one(table, make_family(name), "max_relative_wer", 0.05).policy.kind == name


def test_every_named_policy_has_a_family():
    assert [make_family(name).name for name in POLICIES] == list(POLICIES)
    with pytest.raises(UserError, match=r"unknown policy 'oracle'; choose among fixed, entropy, .*deadline"):
        make_family("oracle")


# ---- families


def curve(family: Family, table: ExitTable) -> list[Outcome]:
    policies = family.fit(table)
    return [outcome(policies(setting), table) for setting in family.settings(table)]


@pytest.mark.parametrize("name", [*BY_PROBABILITY, "deadline", "fixed"])
def test_each_setting_exits_no_later_than_the_one_before(name):
    outcomes = curve(make_family(name), TABLE)
    assert outcomes[0].taken.tolist() == [len(LAYERS) - 1] * len(TABLE)
    for deep, shallow in itertools.pairwise(outcomes):
        assert (shallow.taken <= deep.taken).all()
        assert float(shallow.macs.sum()) <= float(deep.macs.sum())
    costs = {round(float(each.layers.mean()), 9) for each in outcomes}
    assert len(costs) >= (6 if name == "fixed" else 15)
    assert outcomes[-1].layers.mean() < (7 if name == "patience" else 4)  # patience never stops at the first exit


@pytest.mark.parametrize("cost", ["layers", "macs"])
def test_a_smaller_budget_costs_less(cost):
    # for utterances of one length: otherwise the lengths of those that stay differ
    table = replace(TABLE, encoder_macs=TABLE.encoder_macs[:1].expand_as(TABLE.errors).contiguous())
    table = replace(table, head_macs=table.head_macs[:1].expand_as(table.errors).contiguous())
    table = replace(table, search_macs=table.search_macs[:1].expand_as(table.errors).contiguous())
    outcomes = curve(make_family("budget", cost), table)
    for what in ("layers", "macs"):
        costs = [float(getattr(each, what).mean()) for each in outcomes]
        assert costs == sorted(costs, reverse=True)
    assert not outcomes[-1].taken.any()
    assert outcomes[0].taken.tolist() == [len(LAYERS) - 1] * len(table)


@pytest.mark.parametrize("cost", ["layers", "macs"])
def test_a_budget_is_met_up_to_rounding(cost):
    policies, family = make_family("budget", cost).fit(TABLE), make_family("budget", cost)
    by_exit = torch.stack([getattr(fixed(TABLE, layer), cost).mean() for layer in LAYERS])
    by_exit = by_exit / by_exit[-1]
    settings = family.settings(TABLE)
    assert settings[0] == 1.0 and settings[-1] == pytest.approx(float(by_exit[0]))
    for budget in settings:
        taken = outcome(policies(budget), TABLE).taken
        # each exit's cumulative share is rounded to whole utterances
        assert float(by_exit[taken].mean()) == pytest.approx(budget, abs=0.5 / len(TABLE) + 1e-9)
        shares = torch.bincount(taken, minlength=len(LAYERS)) / len(TABLE)
        expected = exponential_weights(by_exit, budget)
        assert (shares.cumsum(0) - expected.cumsum(0)).abs().max() <= 0.5 / len(TABLE) + 1e-9


def test_with_a_budget_the_most_certain_exit():
    taken = outcome(make_family("budget").fit(TABLE)(0.6), TABLE).taken
    for place in range(len(LAYERS) - 1):
        uncertainty = TABLE.statistics["nbest_posterior"][:, place]
        assert uncertainty[taken == place].max() < uncertainty[taken > place].min()


def test_a_budget_does_not_depend_on_errors():
    shuffled = replace(TABLE, errors=TABLE.errors[torch.randperm(len(TABLE), generator=torch.Generator())].flip(1))
    for budget in (0.3, 0.6, 0.9):
        assert make_family("budget").fit(shuffled)(budget) == make_family("budget").fit(TABLE)(budget)


def test_a_budget_without_nbest_lists_reads_posteriors():
    statistics = {key: value for key, value in TABLE.statistics.items() if key != "nbest_posterior"}
    assert make_family("budget").fit(replace(TABLE, statistics=statistics))(0.5).needs == ("posterior",)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_equally_certain_utterances_exit_together(levels):
    """So ties may undercut a budget; it is exceeded by no more than the rounding."""
    ranks = TABLE.statistics["nbest_posterior"].argsort(dim=0).argsort(dim=0)
    uncertainty = (ranks * levels // len(TABLE)).double()
    table = with_statistic(TABLE, "nbest_posterior", uncertainty)
    by_exit = torch.stack([fixed(table, layer).macs.mean() for layer in LAYERS])
    by_exit = by_exit / by_exit[-1]
    policies = make_family("budget").fit(table)
    for budget in make_family("budget").settings(table):
        taken = outcome(policies(budget), table).taken
        assert float(by_exit[taken].mean()) <= budget + 0.5 / len(table) + 1e-9
        for place in range(len(LAYERS) - 1):
            here, later = (set(uncertainty[which, place].tolist()) for which in (taken == place, taken > place))
            assert not here & later
    if levels == 1:  # all exit where one has to
        assert {len(set(outcome(policies(b), table).taken.tolist())) for b in (1.0, 0.7, 0.4)} == {1}


@pytest.mark.parametrize("costs", [[0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.11, 0.95, 1.0], [0.5, 1.0]])
def test_exponential_weights_meet_the_mean(costs):
    costs = torch.tensor(costs, dtype=torch.float64)
    for budget in torch.linspace(float(costs[0]) + 1e-4, 1.0 - 1e-4, 25, dtype=torch.float64).tolist():
        shares = exponential_weights(costs, budget)
        assert float(shares.sum()) == pytest.approx(1.0) and (shares >= 0).all()
        assert float((shares * costs).sum()) == pytest.approx(budget, abs=1e-9)
        # they are log-linear in the cost, which maximises the entropy
        slopes = (shares.log().diff() / costs.diff())[(shares[1:] > 1e-12) & (shares[:-1] > 1e-12)]
        assert slopes.tolist() == pytest.approx([float(slopes[0])] * len(slopes), rel=1e-6)
    even = exponential_weights(costs, float(costs.mean()))
    assert even.tolist() == pytest.approx([1 / len(costs)] * len(costs))


def test_deadlines_predict_more_for_deeper_exits():
    table = make_table(40, seed=5, search=0.0)
    policy = make_family("deadline").fit(table)(1.0)
    frames = torch.tensor([0.0, 1.0, 50.0, 1000.0, 1e6], dtype=torch.float64)
    assert all(a >= 0 and b >= 0 for line in (*policy.encoder.values(), *policy.answer.values()) for a, b in [line])
    predicted = torch.stack([policy.predicted(layer, frames) for layer in LAYERS], dim=1)
    assert (predicted.diff(dim=1) >= 0).all() and (predicted[1:].diff(dim=1) > 0).all()
    measured = TABLE.encoder_seconds + TABLE.head_seconds.cumsum(dim=1) + TABLE.search_seconds
    policy = make_family("deadline").fit(TABLE)(1.0)
    expected = torch.stack([policy.predicted(layer, TABLE.statistics["frames"][:, 0]) for layer in LAYERS], dim=1)
    assert float((expected.sum(dim=0) / measured.sum(dim=0) - 1).abs().max()) < 0.1


def test_a_line_is_the_best_that_does_not_fall():
    x = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    assert rising_line(x, 3 + 2 * x) == pytest.approx((3, 2))
    assert rising_line(x, 9 - x) == pytest.approx((5.5, 0))
    assert rising_line(x, 2 * x - 1) == pytest.approx((0, float((x * (2 * x - 1)).sum() / x.square().sum())))
    assert rising_line(torch.full((3,), 5.0), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2, 0))
    noise = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = rising_line(x, 3 + 2 * x + noise)

    def squares(a, b):
        return float((3 + 2 * x + noise - a - b * x).square().sum())

    assert all(squares(a, b) < squares(a + da, b + db) for da, db in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)))


# ---- folds, and targets


@pytest.mark.parametrize(("speakers", "count"), [(3, 3), (7, 7), (10, 10), (23, 10)])
def test_folds_share_no_speaker(speakers, count):
    table = make_table(50, speakers=speakers)
    masks = folds(table)
    assert len(masks) == count
    assert torch.stack(masks).sum(dim=0).tolist() == [1] * 50
    for fold in masks:
        assert fold.any() and not set(table.some(fold).speakers) & set(table.some(~fold).speakers)


@pytest.mark.parametrize("known", [["a", "b"], ["a"], [""], ["a", "b", "c", ""]])
def test_folds_are_by_utterance_where_speakers_are_unknown_or_too_few(known):
    table = make_table(23)
    table = replace(table, speakers=[known[number % len(known)] for number in range(23)])
    masks = torch.stack(folds(table))
    assert masks.shape == (10, 23) and masks.sum(dim=0).tolist() == [1] * 23
    assert all(fold.nonzero().flatten().tolist() == list(range(turn, 23, 10)) for turn, fold in enumerate(masks))
    assert len(folds(table.some(torch.arange(23) < 4))) == 4


@pytest.mark.parametrize("name", ["entropy", "learned"])
def test_a_speaker_is_judged_by_a_fit_without_it(name):
    table, fits = make_table(40, speakers=5), []
    family = make_family(name)

    def fit(table: ExitTable):
        policies = family.fit(table)
        fits.append(set(table.speakers))
        return policies

    fit_one(table, family._replace(fit=fit), "max_relative_wer", 0.1)
    everyone = set(table.speakers)
    left_out = [everyone - speakers for speakers in fits]
    assert sorted(map(sorted, left_out)) == [[], *([speaker] for speaker in sorted(everyone))]


def test_the_reported_result_is_that_of_unseen_speakers():
    """One speaker is wrong at exits that are right for all others, so that a fit with it would stop later."""
    table = make_table(48, speakers=6, seed=2)
    odd = torch.tensor([speaker == table.speakers[0] for speaker in table.speakers])
    uncertainty = torch.where(odd.unsqueeze(1), 0.3 * table.statistics["entropy"], table.statistics["entropy"])
    errors = table.errors.clone()
    errors[odd] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 0.0], dtype=torch.float64)
    table = replace(with_statistic(table, "entropy", uncertainty), errors=errors)
    family = make_family("entropy")
    fitted = fit_one(table, family, "layers", 7.0)
    setting = next(each for each in family.settings(table) if family.fit(table)(each) == fitted.policy)
    errors = layers = 0.0
    for fold in folds(table):
        rest = table.some(fold)
        result = outcome(family.fit(table.some(~fold))(setting), rest)
        errors, layers = errors + float(result.errors.sum()), layers + float(result.layers.sum())
    assert fitted.wer == pytest.approx(100 * errors / float(table.ref_words.sum()))
    assert fitted.layers == pytest.approx(layers / len(table))
    assert float(outcome(fitted.policy, table).errors.sum()) < errors


def cross_validated(table: ExitTable, family: Family) -> list[tuple[float, Outcome]]:
    """Return the errors added and the outcome of each setting."""
    fits = [(family.fit(table.some(~fold)), table.some(fold)) for fold in folds(table)]
    last = torch.cat([fixed(rest, table.layers[-1]).errors for _, rest in fits])
    results = []
    for setting in family.settings(table):
        by_fold = [outcome(policies(setting), rest) for policies, rest in fits]
        together = Outcome(*(torch.cat(values) for values in zip(*by_fold)))
        results.append((sum(max(0.0, a - b) for a, b in zip(together.errors.tolist(), last.tolist())), together))
    return results


SMALL = make_table(30, speakers=4, seed=4)
UNSEEN = {
    name: cross_validated(SMALL, make_family(name)) for name in ("entropy", "patience", "budget", "deadline", "fixed")
}


@pytest.mark.parametrize("name", UNSEEN)
def test_errors_added_are_within_the_allowance(name):
    family, results, settings = make_family(name), UNSEEN[name], make_family(name).settings(SMALL)
    added = [each[0] for each in results]
    assert added[0] == 0.0, "the deepest setting adds nothing"
    words, audio = float(SMALL.ref_words.sum()), float(SMALL.audio_seconds.sum())
    last = fixed(SMALL, LAYERS[-1])
    shares = (0.0, 0.1, 0.5, 100.0)
    for allowed, fitted in zip(shares, calibrate(SMALL, family, [Target("max_relative_wer", each) for each in shares])):
        limit = allowed * float(SMALL.errors[:, -1].sum()) + 1e-9
        expected = 0
        while expected + 1 < len(added) and added[expected + 1] <= limit:
            expected += 1
        assert fitted.setting == family.describe(settings[expected])
        assert fitted.policy == family.fit(SMALL)(settings[expected])
        result = results[expected][1]
        assert fitted[2:] == pytest.approx(
            (
                100 * float(result.errors.sum()) / words,
                100 * float(last.errors.sum()) / words,
                float(result.layers.mean()),
                float(result.macs.sum() / last.macs.sum()),
                float(result.seconds.sum()) / audio,
            )
        )
        assert (expected == len(settings) - 1) == (allowed == 100.0)


@pytest.mark.parametrize("name", [each for each in POLICIES if each != "fixed"])
def test_no_errors_are_added_where_none_may_be(name):
    """One speaker needs the last exit, which nothing about the other speakers predicts."""
    table = make_table(60, speakers=6)
    odd = torch.tensor([speaker == table.speakers[0] for speaker in table.speakers])
    errors = torch.zeros_like(table.errors)
    errors[odd, :-1] = 3.0
    errors[0, -1] = 1.0
    table = replace(table, errors=errors)
    for statistic in (*UNCERTAINTIES, "disagreement"):
        table.statistics[statistic][odd] = 0.0
    # its first block was slow once, so that a deadline expects the others to be slow as well
    for seconds in (table.encoder_seconds, table.statistics["elapsed"]):
        seconds[0] += 50 * table.encoder_seconds[0, 0]
    family = make_family(name)
    some = family._replace(settings=lambda table: family.settings(table)[:6])
    fitted = fit_one(table, some, "max_relative_wer", 0.0)
    assert fitted.wer == fitted.last_exit_wer > 0


def test_errors_removed_do_not_make_up_for_those_added():
    """At the first exit half of the utterances lose an error and the others gain one; the sum is the last exit's."""
    errors = torch.full_like(SMALL.errors, 2.0)
    errors[::2, 0], errors[1::2, 0] = 1.0, 3.0
    table = replace(SMALL, errors=errors)
    assert fit_one(table, make_family("fixed"), "max_relative_wer", 0.2).setting == "layer 4"
    assert fit_one(table, make_family("fixed"), "max_relative_wer", 0.26).setting == "layer 2"


@pytest.mark.parametrize("kind", ["layers", "macs", "rtf"])
@pytest.mark.parametrize("name", ["entropy", "budget", "deadline", "fixed"])
def test_costs_are_within_the_target(name, kind):
    family, last, results = make_family(name), fixed(SMALL, LAYERS[-1]), UNSEEN[name]
    costs = {
        "layers": [float(each.layers.mean()) for _, each in results],
        "macs": [float(each.macs.sum() / last.macs.sum()) for _, each in results],
        "rtf": [float(each.seconds.sum() / SMALL.audio_seconds.sum()) for _, each in results],
    }[kind]
    settings = family.settings(SMALL)
    for target in (0.5 * (max(costs) + min(costs)), min(costs)):
        fitted = fit_one(SMALL, family, kind, target)
        chosen = min(place for place, cost in enumerate(costs) if cost <= target + 1e-9)
        assert fitted.setting == family.describe(settings[chosen])
        assert {"layers": fitted.layers, "macs": fitted.macs_share, "rtf": fitted.rtf}[kind] <= target + 1e-9
        assert chosen == 0 or costs[chosen - 1] > target
    message = rf"no setting of {name} costs at most {kind} .*; the cheapest costs {min(costs):.3g}: raise"
    with pytest.raises(UserError, match=message):
        fit_one(SMALL, family, kind, 0.99 * min(costs))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("max_relative_wer", -0.05, "max_relative_wer -0.05 must be 0 or above"),
        ("max_relative_wer", math.nan, "max_relative_wer nan must be 0 or above"),
        ("layers", -2.0, "layers -2 must be above 0"),
        ("layers", math.nan, "layers nan must be above 0"),
        ("rtf", -0.1, "rtf -0.1 must be above 0"),
        ("rtf", math.inf, "rtf inf must be above 0"),
        ("macs", 0.0, "macs 0 must be a share above 0 and at most 1"),
        ("macs", 1.5, "macs 1.5 must be a share above 0 and at most 1"),
        ("deadline_ms", 0.0, "deadline_ms 0 must be above 0"),
    ],
)
def test_impossible_targets_are_refused(kind, value, message):
    with pytest.raises(UserError, match=message):
        Target(kind, value)


def test_too_little_to_calibrate_on():
    family, target = make_family("entropy"), [Target("max_relative_wer", 0.05)]
    with pytest.raises(UserError, match="1 utterance"):
        calibrate(TABLE.some(torch.arange(len(TABLE)) == 3), family, target)
    with pytest.raises(UserError, match="0 utterance"):
        calibrate(TABLE.some(torch.zeros(len(TABLE), dtype=torch.bool)), family, target)
    with pytest.raises(UserError, match="no reference words"):
        calibrate(replace(TABLE, ref_words=torch.zeros(len(TABLE))), family, target)


@pytest.mark.parametrize("name", POLICIES)
def test_two_utterances_are_enough_to_fit(name):
    targets = [Target("max_relative_wer", 0.05), Target("layers", 12.0)]
    for fitted in calibrate(make_table(2, speakers=2), make_family(name), targets):
        assert all(math.isfinite(number) for number in fitted[2:])


@pytest.mark.parametrize("name", POLICIES)
def test_a_last_exit_without_errors(name):
    """No share of no errors may be added; utterances that are right earlier may still exit earlier."""
    table = make_table(12, speakers=4)
    errors = table.errors.clone()
    errors[:, -1] = 0.0
    table = replace(table, errors=errors)
    for fitted in calibrate(table, make_family(name), [Target("max_relative_wer", each) for each in (0.0, 5.0)]):
        assert fitted.wer == fitted.last_exit_wer == 0.0


def test_families_make_policies_of_every_kind():
    kinds = {type(make_family(name).fit(TABLE)(make_family(name).settings(TABLE)[3])) for name in POLICIES}
    assert kinds == {Fixed, Threshold, Patience, Learned, Deadline}
