"""Uncertainty statistics, the meter, and every policy, against plain Python and calculations by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import kaldialign
import pytest
import torch

from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.early_exit.policies import (
    FLOOR,
    Deadline,
    FittedPolicy,
    Fixed,
    Learned,
    Patience,
    PolicyError,
    Threshold,
)
from splitformer.early_exit.statistics import (
    STATISTICS,
    Meter,
    disagreement,
    mean_entropy,
    mean_entropy_non_blank,
    mean_posterior_uncertainty,
)
from splitformer.model.encoder import ExitOutput

NAN = math.nan
MEANS = (mean_entropy, mean_entropy_non_blank, mean_posterior_uncertainty)


def random_log_probs(batch: int, frames: int, vocab_size: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, frames, vocab_size, generator=generator)
    logits[..., 0] += 1.5  # as in CTC, about half of the frames are blank
    return logits.log_softmax(dim=2)


def column(*values: float) -> torch.Tensor:
    """(n, 1): statistics of utterances that have passed one exit."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


# ---- disagreement


def test_disagreement_is_the_edit_distance_over_the_longer_length():
    rng = random.Random(0)
    for _ in range(200):
        letters = rng.choice((1, 2, 5, 40))
        a, b = ([rng.randrange(letters) for _ in range(rng.choice((0, 1, 2, 7, 64, 130)))] for _ in range(2))
        if rng.random() < 0.5:  # close to each other, as consecutive exits are
            b = [token for token in a if rng.random() < 0.9]
            b.insert(rng.randint(0, len(b)), letters)
        errors = kaldialign.edit_distance(list(map(str, a)), list(map(str, b)))["total"]
        assert disagreement(a, b) == disagreement(b, a) == errors / max(len(a), len(b), 1)


def test_disagreement_is_0_for_equal_and_1_for_unrelated_hypotheses():
    assert disagreement([], []) == disagreement([3, 4, 3], [3, 4, 3]) == 0.0
    assert disagreement([], [1]) == disagreement([1, 2], [3, 4]) == disagreement([1, 1, 1], [2]) == 1.0


# ---- statistics of one exit


def plain(statistic, frames: list[list[float]]) -> float:
    """Return the statistic of one utterance's frames of log-probabilities, by a loop."""
    if statistic is mean_posterior_uncertainty:
        values = [1.0 - math.exp(max(frame)) for frame in frames]
    else:
        values = [-sum(math.exp(p) * p for p in frame if p > -math.inf) for frame in frames]
    if statistic is mean_entropy_non_blank:
        non_blank = [value for value, frame in zip(values, frames) if frame[0] < max(frame)]
        values = non_blank or values
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("statistic", MEANS)
@pytest.mark.parametrize("padding", [None, 0.0, -math.inf, math.inf, NAN])
def test_means_equal_a_loop_over_the_valid_frames(statistic, padding):
    log_probs, lengths = random_log_probs(7, 23), torch.tensor([23, 1, 0, 9, 22, 2, 15])
    if padding is not None:
        for utterance, length in enumerate(lengths.tolist()):
            log_probs[utterance, length:] = padding
    found = statistic(log_probs, lengths)
    for utterance, length in enumerate(lengths.tolist()):
        expected = plain(statistic, log_probs[utterance, :length].double().tolist())
        assert found[utterance].item() == pytest.approx(expected, abs=1e-5)
    assert found[2] == 0.0
    assert (found[torch.tensor([0, 3, 4, 6])] > 0.01).all()


@pytest.mark.parametrize("statistic", MEANS)
def test_impossible_symbols_add_nothing(statistic):
    log_probs = random_log_probs(3, 8)
    log_probs[:, :, 4:] = -math.inf
    log_probs = log_probs.log_softmax(dim=2)
    log_probs[1] = -math.inf  # certain
    log_probs[1, :, 2] = 0.0
    found = statistic(log_probs, torch.full((3,), 8))
    assert found.tolist() == pytest.approx([plain(statistic, each.double().tolist()) for each in log_probs], abs=1e-5)
    assert found[1] == 0.0 < found[0]


def test_if_all_frames_are_blank_all_count():
    log_probs = random_log_probs(2, 9)
    log_probs[0, :, 0] += 8.0
    log_probs[1, :3, 0] += 8.0
    log_probs = log_probs.log_softmax(dim=2)
    assert (log_probs.argmax(dim=2) == 0).sum(dim=1).tolist() == [9, 3]
    lengths = torch.tensor([9, 9])
    among, over = mean_entropy_non_blank(log_probs, lengths), mean_entropy(log_probs, lengths)
    assert among[0] == over[0] and among[1] != over[1]


@pytest.mark.parametrize("statistic", MEANS)
def test_without_frames_the_uncertainty_is_0(statistic):
    assert statistic(torch.zeros(2, 0, 5), torch.zeros(2, dtype=torch.int64)).tolist() == [0.0, 0.0]
    assert statistic(torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("statistic", MEANS)
def test_a_sharper_distribution_is_less_uncertain(statistic):
    lengths = torch.tensor([6])
    values = [statistic((x * random_log_probs(1, 6)).log_softmax(dim=2), lengths).item() for x in (8, 4, 2, 1, 0)]
    assert values == sorted(values) and values[0] < values[-1]
    assert values[-1] == pytest.approx(1 - 1 / 6 if statistic is mean_posterior_uncertainty else math.log(6), abs=1e-5)


# ---- the meter


class Clock:
    """A clock that advances only when it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def exit_of(layer: int, log_probs: torch.Tensor | None, lengths: torch.Tensor) -> ExitOutput:
    return ExitOutput(layer, torch.zeros(len(lengths), max(1, int(lengths.max())), 3), lengths)


def test_each_utterance_keeps_its_history():
    """Four utterances; the batch shrinks and is shuffled, and one of them is not measured at the second exit."""
    lengths = torch.tensor([12, 7, 9, 4])
    exits = [random_log_probs(4, 12, seed=seed) for seed in range(3)]
    asked = [[0, 1, 2, 3], [3, 0, 1], [2, 0, 3]]
    clock = Clock()

    def nbest(rows, exit_output, log_probs):
        return 1000.0 * exit_output.layer + rows

    meter = Meter(4, (1, 2, 3), STATISTICS, nbest, clock)
    seen = {name: {} for name in STATISTICS}  # name -> (row, exit) -> value
    tokens_of = {}
    for number, (log_probs, rows) in enumerate(zip(exits, asked)):
        clock.now += 0.5
        index = torch.tensor(rows)
        frames = int(lengths[index].max())
        log_probs, here = log_probs[index, :frames], lengths[index]
        measured = meter.measure(index, exit_of(number + 1, log_probs, here), log_probs)
        assert set(measured) == set(STATISTICS)
        tokens = [hypothesis.tokens for hypothesis in ctc_greedy_search(log_probs, here)]
        disagreed = [disagreement(tokens_of[row], said) if row in tokens_of else NAN for row, said in zip(rows, tokens)]
        now = {
            "entropy": mean_entropy(log_probs, here),
            "entropy_non_blank": mean_entropy_non_blank(log_probs, here),
            "posterior": mean_posterior_uncertainty(log_probs, here),
            "nbest_posterior": 1000.0 * (number + 1) + index,
            "disagreement": disagreed,
            "frames": here,
            "batch_frames": [len(rows) * frames] * len(rows),
            "elapsed": [0.5 * (number + 1)] * len(rows),
        }
        tokens_of |= dict(zip(rows, tokens))
        for name, values in now.items():
            seen[name] |= {(row, number): float(value) for row, value in zip(rows, values)}
            assert measured[name].shape == (len(rows), number + 1)
            for found, row in zip(measured[name].tolist(), rows):
                expected = [seen[name].get((row, each), NAN) for each in range(number + 1)]
                assert found == pytest.approx(expected, abs=1e-6, nan_ok=True), name
    assert math.isnan(seen["disagreement"][2, 0]) and not math.isnan(seen["disagreement"][2, 2])
    assert math.isnan(measured["entropy"][0, 1]) and not measured["entropy"][1:].isnan().any()


def test_an_exit_that_was_not_measured_is_in_the_history():
    """The history of an utterance does not depend on whether others of its batch were measured at that exit."""
    log_probs, lengths = random_log_probs(2, 10), torch.tensor([10, 8])
    alone, together = (Meter(2, (2, 4, 6), ("posterior",)) for _ in range(2))
    for layer, rows in ((2, [0, 1]), (4, [1]), (6, [0, 1])):
        index = torch.tensor(rows)
        found = together.measure(index, exit_of(layer, log_probs, lengths[index]), log_probs[index])["posterior"]
        if layer != 4:
            expected = alone.measure(index[:1], exit_of(layer, log_probs, lengths[:1]), log_probs[:1])["posterior"]
    assert found.shape == (2, 3) and expected.shape == (1, 3)
    assert expected[0].tolist() == pytest.approx(found[0].tolist(), nan_ok=True)
    assert expected.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", ["entropy", "entropy_non_blank", "posterior", "disagreement"])
def test_statistics_of_ctc_need_its_head(name):
    meter = Meter(2, (1,), (name,))
    with pytest.raises(ValueError, match="no CTC head; use fixed or deadline"):
        meter.measure(torch.arange(2), exit_of(1, None, torch.tensor([3, 4])), None)


def test_other_statistics_need_no_head():
    meter = Meter(2, (1,), ("frames", "batch_frames", "elapsed"))
    measured = meter.measure(torch.arange(2), exit_of(1, None, torch.tensor([3, 4])), None)
    assert measured["frames"].tolist() == [[3], [4]] and measured["batch_frames"].tolist() == [[8], [8]]


def test_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match=r"unknown statistics \['age', 'mood'\]; choose among entropy, .*elapsed"):
        Meter(1, (1,), ("mood", "entropy", "age"))
    log_probs, lengths = random_log_probs(1, 5), torch.tensor([5])
    with pytest.raises(ValueError, match="needs a search that returns n-best lists"):
        Meter(1, (1,), ("nbest_posterior",)).measure(torch.arange(1), exit_of(1, log_probs, lengths), log_probs)


# ---- policies


def test_fixed():
    statistics = {"frames": column(5, 6, 7)}
    for layer in (2, 4, 6, 8):
        assert Fixed(4).stops(layer, statistics).tolist() == [layer >= 4] * 3
    assert Fixed(4).needs == ("frames",)


def test_threshold():
    policy = Threshold("entropy", {2: 0.1, 6: 0.0})
    history = torch.tensor([[0.0, 0.1], [0.0, 0.1001], [9.0, 0.0], [0.0, NAN], [0.0, -math.inf]])
    assert policy.needs == ("entropy",)
    # only the last column counts
    assert policy.stops(2, {"entropy": history}).tolist() == [True, False, True, False, True]
    assert policy.stops(6, {"entropy": history}).tolist() == [False, False, True, False, True]
    # an exit without a threshold stops nothing, however certain it is
    assert policy.stops(4, {"entropy": history[:-1]}).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("consecutive", "expected"),
    [
        # {exit: which of the rows below exit}
        (1, {1: [], 2: [0, 1], 3: [0, 3], 4: [0, 1, 3, 4]}),
        (2, {1: [], 2: [], 3: [0], 4: [0, 3]}),
        (3, {1: [], 2: [], 3: [], 4: [0]}),
    ],
)
def test_patience(consecutive, expected):
    history = torch.tensor(
        [
            [NAN, 0.0, 0.1, 0.2],
            [NAN, 0.2, 0.3, 0.1],
            [NAN, 0.3, 0.3, 0.3],
            [NAN, 0.3, 0.2, 0.2],
            [NAN, 0.3, NAN, 0.0],  # not measured at the third exit
        ]
    )
    policy = Patience({1: 1.0, 2: 0.2, 3: 0.2, 4: 0.2}, consecutive)
    for layer, rows in expected.items():
        stops = policy.stops(layer, {"disagreement": history[:, :layer]})
        assert stops.nonzero().flatten().tolist() == rows, layer
    # the present exit's threshold applies to all comparisons; without one none exits
    assert policy.stops(5, {"disagreement": history}).tolist() == [False] * 5
    if consecutive == 2:
        wider = Patience({4: 0.3}, 2)
        assert wider.stops(4, {"disagreement": history}).tolist() == [True, True, True, True, False]


def test_learned_is_a_logistic_regression():
    policy = Learned(
        weights={"entropy": 1.5, "disagreement": 4.0, "frames": -0.5},
        means={"entropy": -2.0, "disagreement": 0.3, "frames": 4.0},
        intercepts={2: 3.0, 6: 1.0},
        probability=0.4,
    )
    assert set(policy.needs) == {"entropy", "disagreement", "frames"}
    rows = [(0.5, 0.2, 50), (0.01, 0.0, 200), (0.0, NAN, 30), (NAN, 1.0, 80), (-1e-9, 0.1, 60)]
    statistics = {
        name: torch.tensor([[-1.0, row[place]] for row in rows], dtype=torch.float64)
        for place, name in enumerate(("entropy", "disagreement", "frames"))
    }

    def probability(intercept, entropy, disagreed, frames):
        logit = intercept + 1.5 * (-2.0 if math.isnan(entropy) else math.log(max(entropy, 0.0) + FLOOR))
        logit += 4.0 * (0.3 if math.isnan(disagreed) else disagreed) - 0.5 * math.log(frames + FLOOR)
        return 1 / (1 + math.exp(-logit))

    for layer in (2, 6):
        expected = [probability(policy.intercepts[layer], *row) for row in rows]
        for limit in (*(p * 1.001 for p in expected), *(p * 0.999 for p in expected)):
            stops = replace(policy, probability=limit).stops(layer, statistics)
            assert stops.tolist() == [p <= limit for p in expected]
    # an exit that was not fitted stops nothing
    assert replace(policy, probability=1.0).stops(4, statistics).tolist() == [False] * 5


LAYERS = (2, 4, 6, 8)
# seconds at a thousand frames: 0.2, 0.4, 0.6, 0.8 for the encoder, 0.1 for the answer
ON_TIME = Deadline(1.0, {layer: (0.0, layer * 1e-4) for layer in LAYERS}, dict.fromkeys(LAYERS, (0.05, 5e-5)))


def exit_of_deadline(policy: Deadline, frames: float, slowness: float = 1.0) -> int:
    """Return the exit of a batch of `frames` if the encoder takes `slowness` times what was measured."""
    for layer in LAYERS[:-1]:
        a, b = policy.encoder[layer]
        elapsed = slowness * (a + b * frames)
        stops = policy.stops(layer, {"elapsed": column(elapsed, elapsed), "batch_frames": column(frames, frames)})
        assert stops[0] == stops[1]
        if stops.all():
            return layer
    return LAYERS[-1]


@pytest.mark.parametrize(
    ("seconds", "slowness", "layer"),
    [
        (1.0, 1.0, 8),  # due after 0.9 s
        (0.91, 1.0, 8),
        (0.89, 1.0, 6),
        (0.69, 1.0, 4),
        (0.49, 1.0, 2),
        (0.31, 1.0, 2),
        (0.1, 1.0, 2),  # too short even for the first exit
        (0.0, 1.0, 2),
        # twice as slow: encoder 0.4, 0.8, 1.2, 1.6 s, answers 0.2 s
        (1.81, 2.0, 8),
        (1.79, 2.0, 6),
        (1.39, 2.0, 4),
        (0.91, 2.0, 2),
        # faster than measured: the time gained is used, but the rest is expected to take what was measured
        (0.81, 0.5, 8),  # 0.3 s at exit 6, then 0.2 s and the answer's 0.1 s by the plan
        (0.61, 0.5, 8),
        (0.41, 0.5, 4),  # 0.1 s at exit 2, then 0.2 s and the answer's 0.1 s; from exit 4 on it would be 0.5 s
        (0.39, 0.5, 2),
    ],
)
def test_a_deadline_takes_the_deepest_exit_in_time(seconds, slowness, layer):
    assert exit_of_deadline(replace(ON_TIME, seconds=seconds), 1000, slowness) == layer


def test_deadlines_are_monotone():
    limits, frames = [0.02 * i for i in range(60)], [10 * 2**i for i in range(10)]
    by_limit = [exit_of_deadline(replace(ON_TIME, seconds=limit), 1000) for limit in limits]
    assert by_limit == sorted(by_limit) and set(by_limit) == set(LAYERS)
    by_slowness = [exit_of_deadline(ON_TIME, 1000, slowness) for slowness in (1, 1.1, 1.3, 1.6, 2, 3, 5, 9)]
    assert by_slowness == sorted(by_slowness, reverse=True) and set(by_slowness) == set(LAYERS)
    by_frames = [exit_of_deadline(ON_TIME, each) for each in frames]
    assert by_frames == sorted(by_frames, reverse=True) and {2, 8} <= set(by_frames)


def test_a_deadline_looks_beyond_an_exit_with_a_slow_search():
    """The lattice of a shallow exit may be the slowest to search, so that a deeper exit is in time and it is not."""
    policy = replace(ON_TIME, answer={**ON_TIME.answer, 4: (2.0, 0.0)})
    assert exit_of_deadline(replace(policy, seconds=0.71), 1000) == 6
    assert exit_of_deadline(replace(policy, seconds=0.69), 1000) == 2
    assert policy.predicted(4, column(1000)).item() == pytest.approx(2.4)


# ---- policy.json

KINDS = (
    Fixed(4),
    Threshold("entropy", {2: 0.25, 4: -math.inf}),
    Threshold("nbest_posterior", {}),
    Patience({2: 0.5, 4: 0.0}, 2),
    Learned({"entropy": 0.1, "disagreement": 2.0}, {"entropy": -1.0, "disagreement": 0.2}, {2: 0.5, 4: -0.5}, 0.3),
    Deadline(0.5, {2: (0.1, 1e-5), 4: (0.2, 2e-5)}, {2: (0.0, 0.0), 4: (0.1, 0.0)}),
)


def fitted(policy=KINDS[1]) -> FittedPolicy:
    return FittedPolicy(
        title="entropy äöü",
        policy=policy,
        exit_layers=(2, 4, 6),
        checkpoint="0123abcd",
        method="1best",
        options={2: {"hlg_scale": 0.5, "blank_penalty": 1.0}, 4: {}},
        fitted_on={"set": "dev", "speakers": 7, "target": {"layer": 6, "wer": 4.5}},
    )


@pytest.mark.parametrize("policy", KINDS, ids=lambda policy: policy.kind)
def test_a_saved_policy_loads_unchanged(policy, tmp_path):
    path = tmp_path / "new" / "policy.json"
    fitted(policy).save(path)
    assert FittedPolicy.load(path) == fitted(policy)
    fitted(Fixed(2)).save(path)
    assert FittedPolicy.load(path) == fitted(Fixed(2))


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "policy.json"
    fitted().save(path)
    with pytest.raises(TypeError):
        replace(fitted(), fitted_on={"set": object()}).save(path)
    assert FittedPolicy.load(path) == fitted()
    assert [each.name for each in tmp_path.iterdir()] == ["policy.json"]


def _changed(**changes):
    def change(values):
        return {**values, **changes}

    return change


def _without(name):
    def change(values):
        return {key: value for key, value in values.items() if key != name}

    return change


def _policy(change):
    return lambda values: {**values, "policy": change(values["policy"])}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((_without(name), name) for name in ("title", "policy", "exit_layers", "checkpoint", "method", "options")),
        (_policy(_without("kind")), "kind"),
        (_policy(_without("thresholds")), "thresholds"),
        (_policy(_changed(kind="oracle")), "its kind 'oracle' is none of fixed, threshold, .*deadline"),
        (_policy(_changed(kind="patience")), "statistic"),  # a field of another kind
        (_policy(_changed(kind=["fixed"])), ""),
        (_policy(_changed(temperature=1.0)), "temperature"),
        (_policy(lambda policy: [1, 2]), ""),
        (_policy(lambda policy: "fixed"), ""),
        (_changed(mood="good"), "mood"),
        (_changed(exit_layers=6), ""),
        (_changed(exit_layers=None), ""),
        (lambda values: [values], ""),
        (lambda values: "fixed", ""),
        (lambda values: None, ""),
    ],
)
def test_other_json_is_refused(change, reason, tmp_path):
    path = tmp_path / "policy.json"
    fitted().save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(PolicyError, match=rf"policy\.json is not an exit policy .*{reason}.*bin/calibrate"):
        FittedPolicy.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"entropy 0.3", b"\xff\xfe{}", None])
def test_damaged_files_are_refused(content, tmp_path):
    path = tmp_path / "policy.json"
    fitted().save(path)
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    with pytest.raises(PolicyError, match=r"policy\.json is not an exit policy .*bin/calibrate"):
        FittedPolicy.load(path)


def test_a_policy_of_another_model_is_refused():
    policy = fitted()
    policy.check([2, 4, 6], "0123abcd")
    with pytest.raises(
        PolicyError, match=r"^dev/policy\.json was fitted for exits after layers 2, 4, 6, and the model .* 2, 4; fit"
    ):
        policy.check((2, 4), "0123abcd", "dev/policy.json")
    with pytest.raises(PolicyError, match=r"^the policy was fitted for checkpoint 0123abcd, and this one is 4567: .*"):
        policy.check((2, 4, 6), "4567")
