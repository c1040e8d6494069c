"""Searching a batch with an exit policy, against searching every exit for the whole batch."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from splitformer.config import ModelConfig
from splitformer.corpora.ngram import estimate_arpa
from splitformer.decoding.graphs import compile_hlg, save_graph
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.searches import exit_view, make_methods
from splitformer.early_exit.policies import Deadline, Fixed, Learned, Patience, Threshold, feature
from splitformer.early_exit.search import search_early
from splitformer.early_exit.statistics import STATISTICS, Meter, disagreement
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from tests.with_k2.enumeration import TOKENS, make_small_lang

LAYERS = (1, 2, 3, 4, 5)
LENGTHS = (60, 91, 33, 6, 75, 21, 7, 48)
EMPTY = 3  # six frames give no output frame
NOT_EMPTY = [row for row in range(len(LENGTHS)) if row != EMPTY]
CONFIG = ModelConfig(
    num_mel_bins=20,
    vocab_size=len(TOKENS),
    d_model=24,
    num_heads=4,
    feedforward_dim=48,
    conv_kernel=7,
    num_layers=5,
    exit_layers=LAYERS,
    parallel_exits=(1, 5),
    decoder_dim=8,
    joiner_dim=8,
)


def make_model(*heads: str) -> AsrModel:
    """Return a model with random weights whose exits are as certain as trained ones, of words of the lexicon."""
    torch.manual_seed(3)
    model = AsrModel(replace(CONFIG, heads=heads)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ctc_heads" in name or "output_linear" in name:
                parameter.mul_(6.0)
                if name.endswith("bias"):
                    parameter += torch.tensor([1.0, -9.0, -9.0, 0.0, 0.0])
    return model


@pytest.fixture(scope="module")
def model():
    return make_model("ctc")


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(5)
    x = 3 * torch.randn(len(LENGTHS), max(LENGTHS), CONFIG.num_mel_bins, generator=generator)
    return x, torch.tensor(LENGTHS)


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    """Return the method of a name, with a real HLG."""
    folder = make_small_lang(tmp_path_factory.mktemp("lang"))
    estimate_arpa(folder / "text", folder / "2.arpa", 2)
    save_graph(compile_hlg(folder, folder / "2.arpa", report=lambda line: None), folder / "HLG.pt")
    names = ("greedy_search", "1best", "nbest", "prefix_beam_search")
    names += ("transducer-greedy_search", "modified_beam_search")
    made = make_methods(names, folder, len(TOKENS), torch.device("cpu"))
    return dict(zip(names, made)).__getitem__


OPTIONS = {
    "1best": {layer: (("hlg_scale", 0.3 + 0.2 * layer), ("blank_penalty", 0.5)) for layer in LAYERS[:-1]},
    "prefix_beam_search": {2: (("blank_penalty", 1.0),)},
}


def whole_exits(model, batch, method):
    """Return {layer: (hypotheses, fallbacks)} of every exit, searched for the whole batch."""
    with torch.no_grad():
        exits = list(model.encoder(*batch))
        return {
            each.layer: method.run(
                exit_view(model, each, model.ctc_log_probs(each) if "ctc" in model.heads else None),
                OPTIONS.get(method.name, {}).get(each.layer, method.default),
            )
            for each in exits
        }


def check(results, model, batch, method, layers):
    """Each utterance exits after its layer of `layers`, with the result of searching that exit."""
    expected_of = whole_exits(model, batch, method)
    assert [result.layer for result in results] == list(layers)
    for row, result in enumerate(results):
        expected = expected_of[result.layer][0][row]
        hypothesis = result.hypothesis
        assert (hypothesis.words, hypothesis.tokens) == (expected.words, expected.tokens)
        assert hypothesis.timestamps == expected.timestamps
        assert hypothesis.score == pytest.approx(expected.score, abs=1e-2)
        assert result.fallback == (row in expected_of[result.layer][1])


def early(model, batch, policy, method, **options):
    return search_early(model, *batch, policy, method, OPTIONS.get(method.name, {}), **options)


def exits_after(layer: int) -> list[int]:
    """Return `layer` for each utterance, and the first for the empty one."""
    return [layer if row in NOT_EMPTY else LAYERS[0] for row in range(len(LENGTHS))]


# ---- policies that split the batch


@pytest.fixture(scope="module")
def table(model, batch, method):
    return measured(model, batch, method("1best"))


def measured(model, batch, method):
    """Return {statistic: (N, exits)} of the whole batch, with the `nbest_posterior` of the method."""

    def nbest(rows, exit_output, log_probs):
        options = OPTIONS.get(method.name, {}).get(exit_output.layer, method.default)
        return method.run_with_uncertainty(exit_view(model, exit_output, log_probs), options)[-1]

    meter = Meter(len(LENGTHS), LAYERS, set(STATISTICS) - {"elapsed"}, nbest)
    with torch.no_grad():
        for exit_output in model.encoder(*batch):
            if exit_output.layer < LAYERS[-1]:
                log_probs = model.ctc_log_probs(exit_output)
                statistics = meter.measure(torch.arange(len(LENGTHS)), exit_output, log_probs)
    return statistics


def answers_of(values: list[torch.Tensor], thresholds: dict[int, float]) -> torch.Tensor:
    """Return (N, exits), true where the value is at most the exit's threshold."""
    return torch.stack([each <= thresholds.get(layer, -math.inf) for layer, each in zip(LAYERS, values)], dim=1)


def split(values: torch.Tensor) -> float:
    """Return a threshold above the few lowest values that is not close to any: rounding does not matter."""
    ordered = values[torch.tensor(NOT_EMPTY)].sort().values
    gap = next(place for place in range(1, len(ordered) - 2) if ordered[place + 1] - ordered[place] > 1e-3)
    return float(ordered[gap : gap + 2].mean())


def policy_of(name: str, table):
    """Return a policy that splits the batch, and the (N, exits) answers that it must give."""
    if name == "patience":
        policy = Patience({2: 0.26, 3: 0.41, 4: 0.61})
        values, thresholds = table["disagreement"], policy.thresholds
    elif name == "learned":
        weights = {"entropy": 1.0, "disagreement": 2.0, "frames": -0.3}
        means = {"entropy": 0.0, "disagreement": 0.5, "frames": 3.0}
        values = sum(weight * feature(each, table[each]).nan_to_num(means[each]) for each, weight in weights.items())
        thresholds = {layer: split(values[:, place]) for place, layer in enumerate(LAYERS[:-1]) if layer != 3}
        # logit 0 is probability 0.5
        policy = Learned(weights, means, {layer: -logit for layer, logit in thresholds.items()}, 0.5)
    else:
        values = table[name]
        thresholds = {layer: split(values[:, place]) for place, layer in enumerate(LAYERS[:-1])}
        policy = Threshold(name, thresholds)
    return policy, answers_of(values.unbind(dim=1), thresholds)


SPLITTING = ("entropy", "entropy_non_blank", "posterior", "nbest_posterior", "patience", "learned")


@pytest.mark.parametrize("name", SPLITTING)
def test_each_utterance_has_the_words_of_the_exit_that_the_policy_chooses(name, model, batch, method, table):
    policy, answers = policy_of(name, table)
    layers = [
        next((layer for layer, stops in zip(LAYERS, answers[row]) if stops), LAYERS[-1]) if row in NOT_EMPTY else 1
        for row in range(len(LENGTHS))
    ]
    assert len(set(layers)) >= 3  # the batch shrinks more than once
    results = early(model, batch, policy, method("1best"))
    check(results, model, batch, method("1best"), layers)
    assert len({tuple(result.hypothesis.words or ()) for result in results}) >= 4
    for result in results:
        assert result.nan_exits == 0 and not result.late and result.seconds >= 0.0


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("search", ["1best", "greedy_search", "prefix_beam_search"])
def test_batch_equals_single(name, search, model, batch, method, table):
    policy, _ = policy_of(name, table)
    together = early(model, batch, policy, method(search))
    order = torch.tensor([4, 0, 7, 1, 5, 3, 6, 2])
    shuffled = early(model, (batch[0][order], batch[1][order]), policy, method(search))
    for row, length in enumerate(LENGTHS):
        x = batch[0][row : row + 1, : max(length, 7)]
        [alone] = early(model, (x, torch.tensor([length])), policy, method(search))
        for other in (together[row], shuffled[order.tolist().index(row)]):
            assert (alone.layer, alone.fallback, alone.nan_exits) == (other.layer, other.fallback, other.nan_exits)
            assert alone.hypothesis.words == other.hypothesis.words
            assert alone.hypothesis.tokens == other.hypothesis.tokens
            assert alone.hypothesis.timestamps == other.hypothesis.timestamps


@pytest.mark.parametrize("search", ["1best", "greedy_search", "prefix_beam_search"])
def test_fixed_is_ordinary_decoding(search, model, batch, method):
    for layer in LAYERS:
        check(early(model, batch, Fixed(layer), method(search)), model, batch, method(search), exits_after(layer))
    # beyond the last exit: the last
    check(early(model, batch, Fixed(9), method(search)), model, batch, method(search), exits_after(5))


@pytest.mark.parametrize("search", ["1best", "nbest", "greedy_search", "prefix_beam_search"])
def test_a_search_with_uncertainty_gives_the_result_of_the_method(search, model, batch, method):
    policy, _ = policy_of("nbest_posterior", measured(model, batch, method(search)))
    results = early(model, batch, policy, method(search))
    assert len({result.layer for result in results}) >= 3
    check(results, model, batch, method(search), [result.layer for result in results])


def test_an_empty_batch_gives_nothing(model, method):
    assert early(model, (torch.zeros(0, 50, 20), torch.zeros(0, dtype=torch.int64)), Fixed(2), method("1best")) == []


def test_utterances_without_frames_exit_first_without_tokens(model, batch, method):
    for policy in (Fixed(5), Threshold("nbest_posterior", {}), Patience({}), Threshold("entropy", {1: 9.0})):
        for search in ("1best", "greedy_search", "prefix_beam_search"):
            for result in early(model, (batch[0][:3, :7], torch.tensor([6, 0, 3])), policy, method(search)):
                assert (result.layer, result.hypothesis.tokens, result.fallback) == (1, [], False)


# ---- number of searches


def counting(method):
    """Return the method, and the batch sizes of its searches without and with uncertainty."""
    runs, uncertain = [], []

    def run(view, options):
        runs.append(len(view.lengths))
        return method.run(view, options)

    def lattice_uncertainty(view, options):
        uncertain.append(len(view.lengths))
        return method.lattice_uncertainty(view, options)

    return replace(method, run=run, lattice_uncertainty=lattice_uncertainty), runs, uncertain


@pytest.mark.parametrize("name", [*SPLITTING, "fixed", "deadline"])
def test_only_policies_that_read_nbest_posteriors_search_before_the_exit(name, model, batch, method, table):
    if name == "fixed":
        policy = Fixed(3)
    elif name == "deadline":
        policy = Deadline(100.0, dict.fromkeys(LAYERS, (0.0, 0.0)), dict.fromkeys(LAYERS, (0.0, 0.0)))
    else:
        policy, _ = policy_of(name, table)
    method, runs, uncertain = counting(method("1best"))
    results = early(model, batch, policy, method)
    layers = [result.layer for result in results]
    if name == "nbest_posterior":
        asked = [sum(layers[row] >= layer for row in NOT_EMPTY) for layer in LAYERS[:-1]]
        assert uncertain == [size for size in asked if size]
        # exits without a question: the last one, and the first one for the empty utterance
        last = layers.count(LAYERS[-1])
        assert runs == [layers.count(1), *([last] if last else [])]
    else:
        assert uncertain == []
        assert runs == [layers.count(layer) for layer in LAYERS if layer in layers]


# ---- NaN


@contextmanager
def nan_at(model, *layers, row=None):
    """Let the CTC heads of these exits give NaN for one row of the batch, or for all."""

    def spoil(module, inputs, output):
        spoiled = output.clone()
        spoiled[slice(None) if row is None else row] = math.nan
        return spoiled

    hooks = [model.ctc_heads[str(layer)].register_forward_hook(spoil) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("search", ["1best", "greedy_search", "prefix_beam_search"])
@pytest.mark.parametrize(
    ("policy", "broken", "layer", "nan_exits"),
    [
        (Fixed(1), (1,), 2, 1),
        (Fixed(2), (2,), 3, 1),
        (Fixed(2), (1, 2, 3), 4, 3),
        (Fixed(3), (1,), 3, 1),
        (Fixed(5), (5,), 4, 1),  # none follows: the last exit without NaN
        (Fixed(4), (2, 4, 5), 3, 3),
        (Threshold("nbest_posterior", {2: 1e9, 4: 1e9}), (2,), 4, 1),
        (Threshold("nbest_posterior", {4: 1e9}), (4, 5), 3, 2),
        (Threshold("entropy", {1: 9.0, 2: 9.0}), (1,), 2, 1),
    ],
)
def test_utterances_with_nan_continue(search, policy, broken, layer, nan_exits, model, batch, method):
    with nan_at(model, *broken):
        results = early(model, batch, policy, method(search))
    check(results, model, batch, method(search), exits_after(layer))
    assert all(results[row].nan_exits == nan_exits for row in NOT_EMPTY) and results[EMPTY].nan_exits == 0


@pytest.mark.parametrize("search", ["1best", "greedy_search"])
def test_nan_of_one_utterance_does_not_affect_others(search, model, batch, method):
    with nan_at(model, 1, row=4):
        results = early(model, batch, Threshold("nbest_posterior", {1: 1e9, 2: 1e9}), method(search))
    check(results, model, batch, method(search), [2 if row == 4 else 1 for row in range(len(LENGTHS))])
    assert [result.nan_exits for result in results] == [int(row == 4) for row in range(len(LENGTHS))]


def test_an_exit_with_nan_interrupts_patience(model, batch, method):
    x, lengths = batch[0][:1, : LENGTHS[0]], batch[1][:1]
    policy = Patience({3: 1.0, 4: 1.0}, consecutive=2)
    assert [result.layer for result in early(model, (x, lengths), policy, method("greedy_search"))] == [3]
    with nan_at(model, 3):
        assert [result.layer for result in early(model, (x, lengths), policy, method("greedy_search"))] == [5]


@pytest.mark.parametrize("search", ["1best", "greedy_search", "prefix_beam_search"])
@pytest.mark.parametrize("policy", [Fixed(2), Fixed(5), Threshold("nbest_posterior", {}), Patience({2: 1.0})])
@pytest.mark.parametrize("row", [None, 4])
def test_nan_at_all_exits_is_an_error(search, policy, row, model, batch, method):
    """For the whole batch, and for one utterance of a batch that does not shrink."""
    x, lengths = (batch[0][NOT_EMPTY], batch[1][NOT_EMPTY]) if row else batch
    policy = policy if row is None else Fixed(5)
    with nan_at(model, *LAYERS, row=row), pytest.raises(ValueError, match=r"NaN: has the training diverged\?"):
        early(model, (x, lengths), policy, method(search))


@pytest.mark.parametrize(
    ("head", "search"), [("ctc", "1best"), ("ctc", "greedy_search"), ("transducer", "transducer-greedy_search")]
)
def test_features_with_nan_are_refused(head, search, batch, method):
    x = batch[0].clone()
    x[4, 10] = math.nan
    for policy in (Fixed(1), Fixed(5)):
        with pytest.raises(ValueError, match="all exits of an utterance hold NaN"):
            early(make_model(head), (x, batch[1]), policy, method(search))


# ---- deadlines


@contextmanager
def clock_of(model, seconds_per_layer):
    """Yield a clock that advances with each layer of the encoder alone."""
    now = [0.0]

    def tick(module, inputs, output):
        now[0] += seconds_per_layer

    hooks = [layer.register_forward_hook(tick) for layer in model.encoder.layers]
    try:
        yield lambda: now[0]
    finally:
        for hook in hooks:
            hook.remove()


PLAN = Deadline(0.0, {layer: (0.1 * layer, 0.0) for layer in LAYERS}, dict.fromkeys(LAYERS, (0.05, 0.0)))


@pytest.mark.parametrize(
    ("seconds", "slowness", "layer", "late"),
    [
        (1.0, 1.0, 5, False),
        (0.36, 1.0, 3, False),
        (0.34, 1.0, 2, False),
        (0.05, 1.0, 1, True),  # too short for the first exit, whose words come late
        (0.0, 1.0, 1, True),
        (1.0, 2.0, 4, False),  # twice as slow: 0.2 s per layer, 0.1 s for the search
        (0.3, 2.0, 1, False),
        (1.0, 20.0, 1, True),
    ],
)
@pytest.mark.parametrize("search", ["1best", "greedy_search"])
def test_a_deadline_chooses_the_deepest_exit_in_time(search, seconds, slowness, layer, late, model, batch, method):
    policy = replace(PLAN, seconds=seconds)
    with clock_of(model, 0.1 * slowness) as clock:
        results = early(model, batch, policy, method(search), clock=clock)
    check(results, model, batch, method(search), exits_after(layer))
    for row in NOT_EMPTY:
        assert results[row].seconds == pytest.approx(0.1 * slowness * layer) and results[row].late == late


def test_without_a_deadline_no_utterance_is_late(model, batch, method):
    with clock_of(model, 1000.0) as clock:
        assert not any(result.late for result in early(model, batch, Fixed(2), method("1best"), clock=clock))


# ---- the transducer


def test_a_transducer_without_ctc(batch, method):
    model = make_model("transducer")
    for search in ("transducer-greedy_search", "modified_beam_search"):
        for layer in (1, 3, 5):
            check(early(model, batch, Fixed(layer), method(search)), model, batch, method(search), exits_after(layer))
        with clock_of(model, 0.1) as clock:
            results = early(model, batch, replace(PLAN, seconds=0.3), method(search), clock=clock)
        check(results, model, batch, method(search), exits_after(2))
        assert sum(len(result.hypothesis.tokens) for result in results) > 10
    for policy in (Threshold("entropy", {1: 9.0}), Patience({1: 1.0}), Threshold("nbest_posterior", {1: 9.0})):
        with pytest.raises(UserError, match="no CTC head; use fixed or deadline"):
            early(model, batch, policy, method("modified_beam_search"))


@pytest.mark.parametrize("search", ["transducer-greedy_search", "modified_beam_search", "1best"])
def test_with_both_heads_a_transducer_follows_the_uncertainty_of_ctc(search, batch, method):
    model = make_model("ctc", "transducer")
    with torch.no_grad():
        log_probs = [model.ctc_log_probs(each) for each in model.encoder(*batch)]
        lengths = next(model.encoder(*batch)).lengths
    for policy in (Threshold("entropy", {3: 9.0}), Threshold("nbest_posterior", {3: 1e9})):
        check(early(model, batch, policy, method(search)), model, batch, method(search), exits_after(3))
    tokens = [[hypothesis.tokens for hypothesis in ctc_greedy_search(each, lengths)] for each in log_probs]
    distances = torch.tensor([disagreement(*pair) for pair in zip(*tokens[:2])])
    limit = split(distances)
    results = early(model, batch, Patience({2: limit}), method(search))
    stopped = [2 if distance <= limit else 5 for distance in distances.tolist()]
    stopped[EMPTY] = 1
    check(results, model, batch, method(search), stopped)
