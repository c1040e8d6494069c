"""Curves of WER against cost, savings and intervals, against calculations by hand and by numpy."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from splitformer.early_exit.calibration import Target, calibrate, make_family
from splitformer.early_exit.exit_table import Outcome, fixed, oracle, outcome, without_policy
from splitformer.early_exit.policies import check_disjoint
from splitformer.early_exit.tradeoff import ALLOWED, Curve, Sample, Tradeoff, tradeoff
from splitformer.errors import UserError
from tests.tables import LAYERS, make_table

DEV = make_table(40, speakers=5, seed=1)
TEST = make_table(50, speakers=7, seed=2, prefix="test")
NAMES = ("entropy", "patience", "budget", "deadline")
DRAWS = 200


@pytest.fixture(scope="module")
def curves() -> Tradeoff:
    return tradeoff(DEV, TEST, [make_family(name) for name in NAMES], draws=DRAWS)


def fixed_curve(table=TEST) -> Curve:
    return Curve("fixed", [f"layer {layer}" for layer in table.layers], [fixed(table, each) for each in table.layers])


def point_of(sample: Sample, result: Outcome):
    [point] = sample.points(Curve("fixed", [""], [result]))
    return point


def mixed(a: Outcome, b: Outcome, share: float) -> Outcome:
    """Return the average outcome of choosing b with probability `share`, else a."""
    return Outcome(a.taken, *((1 - share) * x + share * y for x, y in zip(a[1:], b[1:])))


# ---- points


def test_points_are_those_of_fixed_exits_oracle_and_policies(curves):
    assert list(dict.fromkeys(point.policy for point in curves.points)) == ["fixed", "oracle", *NAMES]
    audio = float(TEST.audio_seconds.sum())
    for point, layer in zip(curves.points, LAYERS):
        exit_ = fixed(TEST, layer)
        assert (point.policy, point.setting, point.layers) == ("fixed", f"layer {layer}", layer)
        assert point.wer == pytest.approx(100 * float(exit_.errors.sum()) / float(TEST.ref_words.sum()))
        assert point.macs_per_second == pytest.approx(float(exit_.macs.sum()) / audio)
        assert point.rtf == pytest.approx(float(exit_.seconds.sum()) / audio)
    for name in NAMES:
        own = [point for point in curves.points if point.policy == name]
        assert 5 <= len(own) <= 14 and len({point.setting for point in own}) == len(own)
        macs = [point.macs_per_second for point in own]
        if name != "budget":  # which utterances exit changes with the budget, and so do their lengths
            assert macs == sorted(macs, reverse=True)
        assert own[0].layers == LAYERS[-1] and own[0].wer == curves.points[len(LAYERS) - 1].wer
        assert own[0].macs_per_second > curves.points[len(LAYERS) - 1].macs_per_second  # the heads of passed exits


def test_points_of_a_policy_are_fitted_on_the_calibration_set(curves):
    family = make_family("entropy")
    policies = family.fit(DEV)
    by_name = {family.describe(setting): outcome(policies(setting), TEST) for setting in family.settings(DEV)}
    for point in curves.points:
        if point.policy == "entropy":
            expected = by_name[point.setting]
            assert point.layers == pytest.approx(float(expected.layers.mean()))
            assert point.wer == pytest.approx(100 * float(expected.errors.sum() / TEST.ref_words.sum()))


def test_no_point_is_below_the_oracle(curves):
    """For every price, no policy has a lower sum of errors and priced cost."""
    words, audio = float(TEST.ref_words.sum()), float(TEST.audio_seconds.sum())
    whole = float(fixed(TEST, LAYERS[-1]).macs.mean())
    best = [point for point in curves.points if point.policy == "oracle"]
    assert len(best) >= 3 and [p.layers for p in best] == sorted((p.layers for p in best), reverse=True)
    for price in (1e-3, 0.03, 0.3, 3.0, 100.0):

        def paid(point, price=price):
            return point.wer / 100 * words + price * point.macs_per_second * audio / whole

        lowest = oracle(TEST, price)
        lowest = float(lowest.errors.sum() + price * lowest.macs.sum() / whole)
        assert all(paid(point) >= lowest - 1e-6 for point in curves.points)


def test_intervals_contain_the_wer_and_narrow_with_more_utterances(curves):
    assert all(point.wer_low <= point.wer <= point.wer_high for point in curves.points)
    widths = []
    for size in (25, 100, 400, 1600):
        table = make_table(size, seed=6)
        point = point_of(Sample.draw(table, 300, 0), fixed(table, 6))
        widths.append(point.wer_high - point.wer_low)
    for wide, narrow in itertools.pairwise(widths):
        assert 1.4 < wide / narrow < 2.9  # about the square root of four


def test_intervals_cover_the_true_wer():
    """Of many test sets from one source, about 95 % have the WER of the source in their interval."""
    source = make_table(8000, speakers=8000, seed=11)
    truth = Sample.draw(source, 1, 0).wer(fixed(source, 6))
    inside = 0
    for turn in range(80):
        part = source.some(torch.arange(8000) // 100 == turn)
        point = point_of(Sample.draw(part, 200, turn), fixed(part, 6))
        inside += point.wer_low <= truth <= point.wer_high
    assert 68 <= inside <= 80


def test_the_bootstrap_equals_a_loop():
    sample = Sample.draw(TEST, 50, 3)
    assert sample.counts.shape == (50, len(TEST)) and sample.counts.sum(dim=1).tolist() == [len(TEST)] * 50
    assert len(set(map(tuple, sample.counts.tolist()))) == 50
    exit_, expected = fixed(TEST, 4), []
    for counts in sample.counts.int().tolist():
        drawn = [utterance for utterance, count in enumerate(counts) for _ in range(count)]
        errors = sum(float(exit_.errors[utterance]) for utterance in drawn)
        expected.append(100 * errors / sum(float(TEST.ref_words[utterance]) for utterance in drawn))
    assert sample.wers(exit_).tolist() == pytest.approx(expected)
    point = point_of(sample, exit_)
    assert (point.wer_low, point.wer_high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


def test_a_seed_fixes_the_result(curves):
    families = [make_family(name) for name in NAMES]
    assert tradeoff(DEV, TEST, families, draws=DRAWS, seed=0) == curves
    other = tradeoff(DEV, TEST, families[:1], draws=DRAWS, seed=1)
    assert other.points[0].wer == curves.points[0].wer and other.points[0].wer_low != curves.points[0].wer_low


# ---- savings


def test_savings_equal_calculations_by_hand(curves):
    assert [(each.policy, each.allowed) for each in curves.savings] == [(n, a) for n in NAMES for a in ALLOWED]
    last = fixed(TEST, LAYERS[-1])
    for saving in curves.savings:
        [fitted] = calibrate(DEV, make_family(saving.policy), [Target("max_relative_wer", saving.allowed)])
        did = outcome(fitted.policy, TEST)
        more = (did.errors.sum() - last.errors.sum()) / last.errors.sum()
        assert saving.setting == fitted.setting
        assert saving.wer == pytest.approx(100 * float(did.errors.sum() / TEST.ref_words.sum()))
        assert saving.relative_wer == pytest.approx(float(more))
        assert saving.relative_wer_low <= saving.relative_wer <= saving.relative_wer_high
        assert saving.macs_saved == pytest.approx(1 - float(did.macs.sum() / last.macs.sum()))
        assert saving.layers_saved == pytest.approx(1 - float(did.layers.mean()) / LAYERS[-1])
        assert saving.time_saved == pytest.approx(1 - float(did.seconds.sum() / last.seconds.sum()))
    assert any(saving.macs_saved > 0.1 for saving in curves.savings), "nothing is saved: nothing is tested"


def test_hindsight_saves_at_least_as_much(curves):
    last = fixed(TEST, LAYERS[-1])
    for saving in curves.savings:
        points = [point for point in curves.points if point.policy == saving.policy]
        last_wer = 100 * float(last.errors.sum() / TEST.ref_words.sum())
        within = [point for point in points if point.wer <= last_wer * (1 + saving.allowed) + 1e-9]
        saved = [1 - point.layers / LAYERS[-1] for point in within]
        if saving.relative_wer <= saving.allowed + 1e-12:
            assert saving.hindsight_macs_saved >= saving.macs_saved
            saved.append(saving.layers_saved)
        assert saving.hindsight_layers_saved == pytest.approx(max(saved))
    for name in NAMES:
        saved = [each.hindsight_macs_saved for each in curves.savings if each.policy == name]
        assert saved == sorted(saved)
    assert any(each.hindsight_macs_saved > each.macs_saved + 0.02 for each in curves.savings)


def test_hindsight_includes_the_calibrated_setting():
    """It may lie between the settings of the curve."""
    sample, last = Sample.draw(TEST, 20, 0), fixed(TEST, LAYERS[-1])
    good = fixed(TEST, 2)._replace(errors=last.errors)
    saving = sample.saving(0.0, "", good, Curve("good", [""], [last]))
    assert saving.hindsight_macs_saved == saving.macs_saved > 0.5
    assert saving.hindsight_layers_saved == saving.layers_saved == pytest.approx(1 - 2 / 12)


def test_hindsight_is_none_where_no_setting_is_allowed():
    sample, bad = Sample.draw(TEST, 20, 0), fixed(TEST, 2)
    saving = sample.saving(0.05, "", bad, Curve("bad", [""], [bad]))
    assert saving.hindsight_macs_saved is None and saving.hindsight_layers_saved is None
    assert saving.relative_wer_low > 0.05


def test_equal_results_have_no_difference():
    sample, last = Sample.draw(TEST, DRAWS, 0), fixed(TEST, LAYERS[-1])
    saving = sample.saving(0.0, "", last, Curve("same", [""], [last]))
    assert (saving.relative_wer_low, saving.relative_wer, saving.relative_wer_high) == (0.0, 0.0, 0.0)
    assert (saving.macs_saved, saving.layers_saved, saving.time_saved) == (0.0, 0.0, 0.0)


def test_differences_are_taken_within_each_draw():
    """One error more in every second utterance is nearly certain, however uncertain either WER is."""
    more = (torch.arange(len(TEST)) % 2 == 0).double()
    sample, last = Sample.draw(TEST, DRAWS, 0), fixed(TEST, LAYERS[-1])
    worse = last._replace(errors=last.errors + more)
    saving = sample.saving(0.0, "", worse, Curve("worse", [""], [worse]))
    expected = [float(c @ more) / float(c @ last.errors) for c in sample.counts]
    assert saving.relative_wer_low == pytest.approx(np.quantile(expected, 0.025))
    assert saving.relative_wer_high == pytest.approx(np.quantile(expected, 0.975))
    assert saving.relative_wer_low > 0
    apart = point_of(sample, worse)
    assert apart.wer_low < point_of(sample, last).wer_high  # unpaired intervals overlap


# ---- at equal cost


def test_a_mixture_of_fixed_exits_equals_their_interpolation():
    sample, fixed_ = Sample.draw(TEST, DRAWS, 0), fixed_curve()
    outcomes = [mixed(a, b, share) for a, b in itertools.pairwise(fixed_.outcomes) for share in (0.0, 0.3, 0.8)]
    random.Random(0).shuffle(outcomes)
    points = sample.against_fixed(Curve("mixed", [""] * len(outcomes), outcomes), fixed_)
    first = float(fixed_.outcomes[0].macs.sum() / fixed_.outcomes[-1].macs.sum())
    assert [point.budget for point in points] == [tenth / 10 for tenth in range(1, 10) if tenth / 10 > first]
    for point in points:
        assert point.wer == pytest.approx(point.fixed_wer)
        for value in (point.difference, point.difference_low, point.difference_high):
            assert value == pytest.approx(0.0, abs=1e-9)


def test_random_choices_between_exits_come_close_to_the_interpolation():
    table = make_table(3000, seed=12)
    lots = torch.randint(2, (len(LAYERS) - 1, 3000), generator=torch.Generator().manual_seed(0))
    fixed_ = fixed_curve(table)
    # with the exits themselves: random choices alone would cut the corners of the convex curve
    outcomes = [*fixed_.outcomes, *(without_policy(table, exit_ + lot) for exit_, lot in enumerate(lots))]
    points = Sample.draw(table, DRAWS, 0).against_fixed(Curve("lots", [""] * len(outcomes), outcomes), fixed_)
    for point in points:
        assert abs(point.difference) < 0.02 * point.fixed_wer


def test_interpolation_equals_numpy():
    sample, fixed_ = Sample.draw(TEST, 30, 5), fixed_curve()
    policies = make_family("entropy").fit(DEV)
    curve = Curve("entropy", [], [outcome(policies(p), TEST) for p in (0.02, 0.1, 0.3, 0.3, 0.5, 0.9)])
    last = fixed_.outcomes[-1]

    def interpolated(counts, outcomes, budgets):
        words = float(counts @ TEST.ref_words)
        costs = [float(counts @ each.macs) / float(counts @ last.macs) for each in outcomes]
        wers = [100 * float(counts @ each.errors) / words for each in outcomes]
        order = np.argsort(costs, kind="stable")
        return np.interp(budgets, np.array(costs)[order], np.array(wers)[order])

    points = sample.against_fixed(curve, fixed_)
    budgets, ends = [point.budget for point in points], [fixed_.outcomes[0], last]
    whole = torch.ones(len(TEST), dtype=torch.float64)
    own = interpolated(whole, [*ends, *curve.outcomes], budgets)
    others = interpolated(whole, fixed_.outcomes, budgets)
    assert [point.wer for point in points] == pytest.approx(list(own))
    assert [point.fixed_wer for point in points] == pytest.approx(list(others))
    assert [point.difference for point in points] == pytest.approx(list(own - others))
    assert max(abs(own - others)) > 0.1
    drawn = np.array(
        [
            interpolated(counts, [*ends, *curve.outcomes], budgets) - interpolated(counts, fixed_.outcomes, budgets)
            for counts in sample.counts
        ]
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert [point.difference_low for point in points] == pytest.approx(list(low))
    assert [point.difference_high for point in points] == pytest.approx(list(high))


def test_the_oracle_is_better_than_fixed_exits_at_every_budget():
    """Up to its most expensive point, which is far below the last exit; beyond lies a line to the last exit."""
    sample, fixed_ = Sample.draw(TEST, DRAWS, 0), fixed_curve()
    best = [oracle(TEST, price) for price in torch.logspace(-4, 3, 30).tolist()]
    points = sample.against_fixed(Curve("oracle", [""] * len(best), best), fixed_)
    highest = max(float(each.macs.sum() / fixed_.outcomes[-1].macs.sum()) for each in best)
    within = [point for point in points if point.budget <= highest]
    assert len(within) >= 3 and all(point.difference_high < 0 for point in within)
    last = sample.wer(fixed_.outcomes[-1])
    assert all(sample.wer(best[0]) < point.wer < last for point in points if point.budget > highest)


# ---- sets that are refused, and small ones


def disjoint(test=TEST, calibration=DEV) -> str:
    speakers = dict(zip(test.utterances, test.speakers))
    return check_disjoint("dev", calibration.utterances, calibration.speakers, "test", speakers)


def test_sets_that_share_utterances_or_speakers_are_refused():
    assert disjoint() == ""
    same = replace(TEST, utterances=["dev-7", "dev-3", *TEST.utterances[2:]])
    with pytest.raises(UserError, match=r"dev and test share 2 utterances \(dev-3, dev-7\): .*other speakers"):
        disjoint(same)
    speakers = [f"dev-speaker-{place % 4}" for place in range(len(TEST))]  # four of five
    with pytest.raises(UserError, match=r"share 4 speakers \(dev-speaker-0, dev-speaker-1"):
        disjoint(replace(TEST, speakers=speakers))
    with pytest.raises(UserError, match="the calibration set and the test set share 4 speakers"):
        tradeoff(DEV, replace(TEST, speakers=speakers), [])
    # unknown speakers cannot be compared
    unknown = [replace(table, speakers=[""] * len(table)) for table in (TEST, DEV)]
    assert disjoint(*unknown) == ""
    with pytest.raises(UserError, match=r"different exits: \(2, 4\) and \(2, 4, 6"):
        tradeoff(make_table(10, layers=(2, 4)), TEST, [])
    with pytest.raises(UserError, match="the test set has no reference words"):
        tradeoff(DEV, replace(TEST, ref_words=torch.zeros(len(TEST))), [])


@pytest.mark.parametrize("known", [1, 5])
def test_splits_by_utterance_share_all_speakers_and_get_a_warning(known):
    dev, test = (
        replace(table, speakers=[f"speaker-{place % known}" for place in range(len(table))]) for table in (DEV, TEST)
    )
    assert f"test has all {known} speakers of dev, with other utterances" in disjoint(test, dev)
    more = replace(test, speakers=["another", "", *test.speakers[2:]])
    assert f"all {known} speakers" in disjoint(more, dev)
    with pytest.raises(UserError, match=r"share 1 utterances \(dev-3\)"):
        disjoint(replace(test, utterances=["dev-3", *test.utterances[1:]]), dev)
    assert tradeoff(dev, test, [make_family("fixed")], draws=2).points


@pytest.mark.parametrize("kind", ["perfect", "all wrong", "one utterance", "some without words", "two exits"])
def test_no_figure_is_infinite(kind):
    dev, test = DEV.some(torch.arange(len(DEV)) < 20), TEST
    if kind == "perfect":
        errors = test.errors.clone()
        errors[:, -1] = 0.0
        test = replace(test, errors=errors)
        dev = replace(dev, errors=torch.zeros_like(dev.errors))
    elif kind == "all wrong":
        test = replace(test, errors=test.ref_words.unsqueeze(1).expand_as(test.errors).contiguous())
    elif kind == "one utterance":
        test = test.some(torch.arange(len(test)) == 2)
    elif kind == "some without words":
        words = torch.where(torch.arange(len(test)) < 2, test.ref_words, torch.zeros(1, dtype=torch.float64))
        test = replace(test, ref_words=words)  # so that many draws have none
    else:
        dev, test = make_table(20, 5, layers=(2, 4)), make_table(9, 3, layers=(2, 4), prefix="test")
    made = tradeoff(dev, test, [make_family(name) for name in ("entropy", "patience", "budget", "deadline")], draws=40)
    records = [*made.points, *made.savings, *made.budgets]
    json.dumps([asdict(each) for each in records] + [made._replace(points=(), savings=(), budgets=())], allow_nan=False)
    assert len(made.savings) == 12 and made.budgets
