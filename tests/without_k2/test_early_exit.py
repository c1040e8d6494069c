"""Running a batch whose utterances exit early: what exits, what continues, and which layers are not run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections import defaultdict

import pytest
import torch

from splitformer.checkpoint import CheckpointError, checkpoint_id, load_model, save_checkpoint
from splitformer.config import Config, LossConfig, ModelConfig
from splitformer.early_exit.running import exit_early
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.conformer import ConformerLayer
from splitformer.model.subsampling import subsampled_lengths
from tests.models import build

BINS = 20
CTC = ModelConfig(
    num_mel_bins=BINS,
    vocab_size=11,
    d_model=24,
    num_heads=4,
    feedforward_dim=48,
    conv_kernel=7,
    num_layers=6,
    exit_layers=(1, 2, 4, 6),  # blocks of one layer and of two
    parallel_exits=(1, 4, 6),
    decoder_dim=8,
    joiner_dim=8,
)
VARIANTS = {
    "ctc": CTC,
    "baseline": dataclasses.replace(CTC, parallel_exits=()),
    "both_heads_gated_conv2d_normalised": dataclasses.replace(
        CTC,
        heads=("ctc", "transducer"),
        parallel_gate=True,
        subsampling="conv2d",
        subsampling_channels=4,
        cmvn="utterance",
    ),
    "transducer": dataclasses.replace(CTC, heads=("transducer",)),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
FRAMES = [199, 55, 203, 7, 91, 127]  # output frames 49, 13, 50, 1, 22, 31: odd and even; the longest in the middle


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def make_batch(frames, padding=3.0):
    generator = torch.Generator().manual_seed(5)
    x = torch.full((len(frames), max(7, *frames), BINS), padding)
    for row, length in zip(x, frames, strict=True):
        row[:length] = torch.randn(length, BINS, generator=generator)
    return x, torch.tensor(frames)


def alone(model, x, x_lens, row):
    """Return {layer: (valid encoder frames (T', D), their CTC log-probabilities)} of one utterance by itself."""
    length = max(7, int(x_lens[row]))
    outputs = {}
    for exit_output in model.encoder(x[row : row + 1, :length], x_lens[row : row + 1]):
        valid = int(exit_output.lengths)
        log_probs = model.ctc_log_probs(exit_output)[0, :valid] if "ctc" in model.heads else None
        outputs[exit_output.layer] = (exit_output.encoder_out[0, :valid], log_probs)
    return outputs


def assert_close(actual, expected, **more):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, **more)


@contextlib.contextmanager
def counted_layers(model):
    """Yield {name of an encoder layer: [(utterances, frames) of each call]}."""
    calls = defaultdict(list)
    handles = [
        module.register_forward_hook(lambda _, inputs, __, name=name: calls[name].append(tuple(inputs[0].shape[:2])))
        for name, module in model.encoder.named_modules()
        if isinstance(module, ConformerLayer)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def expected_calls(config, frames, exited_at):
    """Return the same from first principles: a layer runs for the utterances that exit at its block or above it."""
    lengths = subsampled_lengths(torch.tensor(frames)).tolist()
    calls, below = {}, 0
    for exit_layer in config.exit_layers:
        here = [i for i, layer in enumerate(exited_at) if layer >= exit_layer]
        if not here:
            break
        longest = max(max(lengths[i] for i in here), 1)
        for layer in range(below, exit_layer):
            calls[f"layers.{layer}"] = [(len(here), longest)]
        if exit_layer in config.parallel_exits:
            calls[f"parallel.{exit_layer}.layer"] = [(len(here), math.ceil(longest / 2))]
        below = exit_layer
    return calls


# ---- the encoder


@each_variant
@pytest.mark.parametrize(
    "active",
    [
        {1: [0, 1, 3, 4, 5]},  # the longest exits, an odd number of frames remains
        {1: [1, 3, 4], 2: [0, 1], 4: [1]},
        {2: [3]},  # a single frame remains, for a branch that takes every second one
        {1: [0, 1, 2, 4, 5], 4: [4, 0]},  # the longest stays; active rows may come in any order
        {1: [0, 1, 2, 3, 4, 5]},
    ],
)
def test_active_utterances_give_the_same_as_in_a_full_run(config, active):
    model = build(config)
    x, x_lens = make_batch(FRAMES)
    full = {each.layer: each for each in model.encoder(x, x_lens)}
    rows, send = list(range(len(FRAMES))), None
    exits = model.encoder(x, x_lens)
    for layer in config.exit_layers:
        output = exits.send(send)
        assert output.layer == layer
        assert output.lengths.tolist() == full[layer].lengths[rows].tolist()
        assert output.encoder_out.shape[:2] == (len(rows), output.lengths.max())
        for place, (row, length) in enumerate(zip(rows, output.lengths.tolist(), strict=True)):
            assert_close(output.encoder_out[place, :length], full[layer].encoder_out[row, :length])
        send = None
        if layer in active:
            send = torch.tensor(active[layer])
            rows = [rows[place] for place in active[layer]]
    with pytest.raises(StopIteration):
        next(exits)


# ---- exit_early


def run(model, x, x_lens, wishes):
    """Stop at `wishes` {(row, layer)}. Return {row: its exit} and {layer: rows that `stops` was asked about}."""
    asked, exits = {}, {}

    def stops(rows, exit_output, log_probs):
        assert exit_output.layer not in asked
        assert exit_output.encoder_out.size(0) == exit_output.lengths.size(0) == len(rows) > 0
        assert (log_probs is None) == ("ctc" not in model.heads)
        asked[exit_output.layer] = rows.tolist()
        return torch.tensor([(row, exit_output.layer) in wishes for row in rows.tolist()])

    for exited in exit_early(model, x, x_lens, stops):
        for place, row in enumerate(exited.rows.tolist()):
            assert row not in exits, f"utterance {row} exits twice"
            lengths = exited.exit_output.lengths
            valid = int(lengths[place])
            exits[row] = (
                exited.exit_output.layer,
                exited.exit_output.encoder_out[place, :valid],
                None if exited.log_probs is None else exited.log_probs[place, :valid],
                int(exited.nan_exits[place]),
            )
            assert lengths.size(0) == exited.exit_output.encoder_out.size(0) == exited.nan_exits.size(0)
            assert valid == int(subsampled_lengths(x_lens[row]))
    return exits, asked


def check(model, x, x_lens, exits, exited_at, nan_exits=None, expected=None):
    """Every utterance exits once, at its layer, with the output that it has there alone (or `expected`[row][layer])."""
    assert sorted(exits) == list(range(len(x)))
    assert [exits[row][0] for row in sorted(exits)] == exited_at
    assert [exits[row][3] for row in sorted(exits)] == (nan_exits or [0] * len(x))
    for row, (layer, encoder_out, log_probs, _) in exits.items():
        expected_out, expected_log_probs = (expected or {}).get(row, alone(model, x, x_lens, row))[layer]
        assert_close(encoder_out, expected_out, msg=lambda text, row=row: f"utterance {row}: {text}")
        if expected_log_probs is None:
            assert log_probs is None
        else:
            assert_close(log_probs, expected_log_probs, msg=lambda text, row=row: f"utterance {row}: {text}")


@each_variant
def test_all_exit_at_the_first_or_at_the_last_layer(config):
    model = build(config)
    x, x_lens = make_batch(FRAMES)
    first, last = config.exit_layers[0], config.exit_layers[-1]
    everyone = list(range(len(FRAMES)))
    for exited_at, wishes, asked_at in (
        (first, {(row, first) for row in everyone}, config.exit_layers[:1]),
        (last, set(), config.exit_layers[:-1]),  # the last exit is not asked
    ):
        with counted_layers(model) as calls:
            exits, asked = run(model, x, x_lens, wishes)
        check(model, x, x_lens, exits, [exited_at] * len(FRAMES))
        assert asked == dict.fromkeys(asked_at, everyone)
        assert calls == expected_calls(config, FRAMES, [exited_at] * len(FRAMES))


@each_variant
@pytest.mark.parametrize("seed", range(6))
def test_random_exits(config, seed):
    rng = random.Random(seed)
    frames = [rng.choice([0, 5, *range(7, 150)]) for _ in range(7)] + [rng.choice([0, 6]), 150]
    rng.shuffle(frames)
    x, x_lens = make_batch(frames)
    layers, empty = config.exit_layers, [t < 7 for t in frames]
    wishes = {(row, layer) for row in range(len(frames)) for layer in layers if rng.random() < 0.4}
    exited_at = [
        layers[0] if empty[row] else next((layer for layer in layers[:-1] if (row, layer) in wishes), layers[-1])
        for row in range(len(frames))
    ]
    model = build(config)
    with counted_layers(model) as calls:
        exits, asked = run(model, x, x_lens, wishes)
    check(model, x, x_lens, exits, exited_at)
    assert calls == expected_calls(config, frames, exited_at)
    for layer in layers:
        there = [row for row in range(len(frames)) if exited_at[row] >= layer and not empty[row]]
        assert asked.get(layer, []) == ([] if layer == layers[-1] else there)


@each_variant
def test_without_frames_one_block_runs_and_stops_is_not_called(config):
    model = build(config)
    x, x_lens = make_batch([0, 6, 5])
    with counted_layers(model) as calls:
        exits, asked = run(model, x, x_lens, set())
    first = config.exit_layers[0]
    assert asked == {}
    assert {row: (layer, nan_exits) for row, (layer, *_, nan_exits) in exits.items()} == dict.fromkeys(
        range(3), (first, 0)
    )
    assert calls == expected_calls(config, [0, 6, 5], [first] * 3)
    assert list(exit_early(model, x[:0], x_lens[:0], None)) == []


def test_an_empty_utterance_in_a_model_with_one_exit():
    config = dataclasses.replace(CTC, exit_layers=(6,), parallel_exits=())
    model = build(config)
    x, x_lens = make_batch([30, 3, 50])
    exits, asked = run(model, x, x_lens, set())
    assert asked == {}
    check(model, x, x_lens, exits, [6, 6, 6])


# ---- NaN


@contextlib.contextmanager
def nan_from(module, places):
    """Put NaN into the output of `module` for the utterances at `places` of its batch."""

    def poison(_, __, output):
        output = output.clone()
        output[places, 0] = math.nan  # of one frame
        return output

    handle = module.register_forward_hook(poison)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("variant", ["ctc", "both_heads_gated_conv2d_normalised"])
@pytest.mark.parametrize("layer", CTC.exit_layers[:-1])
def test_an_utterance_with_nan_at_an_exit_continues(variant, layer):
    model = build(VARIANTS[variant])
    x, x_lens = make_batch(FRAMES)
    wishes = {(row, layer) for row in range(len(FRAMES))}  # all would exit where the NaN is
    with nan_from(model.ctc_heads[str(layer)], [2]):
        exits, asked = run(model, x, x_lens, wishes | {(2, 4)})
    exited_at = [layer] * len(FRAMES)
    exited_at[2] = 4 if layer < 4 else 6
    assert 2 not in asked[layer]
    check(model, x, x_lens, exits, exited_at, nan_exits=[0, 0, 1, 0, 0, 0])


@each_variant
@pytest.mark.parametrize(
    ("encoder_layer", "last_good", "nan_exits"), [(1, 1, 3), (2, 2, 2), (3, 2, 2), (4, 4, 1), (5, 4, 1)]
)
def test_nan_from_a_layer_on_falls_back_to_the_last_exit_without(config, encoder_layer, last_good, nan_exits):
    model = build(config)
    x, x_lens = make_batch(FRAMES)
    expected = {row: alone(model, x, x_lens, row) for row in range(len(FRAMES))}
    # utterance 3 exits first, so that the broken one, number 4, changes its place in the batch
    with nan_from(model.encoder.layers[encoder_layer], [3]):
        exits, asked = run(model, x, x_lens, {(3, 1), *((4, layer) for layer in (2, 4, 6) if layer > last_good)})
    assert all((4 in asked[layer]) == (layer <= last_good) for layer in (1, 2, 4))
    check(model, x, x_lens, exits, [6, 6, 6, 1, last_good, 6], nan_exits=[0, 0, 0, 0, nan_exits, 0], expected=expected)


@each_variant
def test_nan_at_every_exit_goes_to_the_last(config):
    model = build(config)
    x, x_lens = make_batch(FRAMES)
    good = {row: alone(model, x, x_lens, row) for row in range(1, len(FRAMES))}
    with nan_from(model.encoder.layers[0], [0]):
        exits, _ = run(model, x, x_lens, {(0, layer) for layer in config.exit_layers} | {(5, 2)})
    layer, encoder_out, log_probs, nan_exits = exits[0]
    assert (layer, nan_exits) == (6, 4)
    assert (encoder_out if log_probs is None else log_probs).isnan().any()
    exits[0] = (6, encoder_out.nan_to_num(), None if log_probs is None else log_probs.nan_to_num(), 0)
    check(model, x, x_lens, exits, [6, 6, 6, 6, 6, 2], expected={**good, 0: {6: exits[0][1:3]}})


@pytest.mark.parametrize("seed", range(12))
def test_random_nan_in_the_heads(seed):
    rng = random.Random(seed)
    model, layers = build(CTC), CTC.exit_layers
    x, x_lens = make_batch(FRAMES)
    expected = {row: alone(model, x, x_lens, row) for row in range(len(FRAMES))}
    pairs = [(row, layer) for row in range(len(FRAMES)) for layer in layers]
    broken = {pair for pair in pairs if rng.random() < 0.5}
    wishes = {pair for pair in pairs if rng.random() < 0.4}
    # expected for each utterance by itself
    exited_at, nan_exits, reached = [], [], []
    for row in range(len(FRAMES)):
        good, nans = [], 0
        for layer in layers:
            if (row, layer) in broken:
                nans += 1
            else:
                good.append(layer)
                if (row, layer) in wishes:
                    break
        reached.append(layer)
        exited_at.append(good[-1] if good else layer)
        nan_exits.append(nans)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            there = [row for row in range(len(FRAMES)) if reached[row] >= layer]
            places = [place for place, row in enumerate(there) if (row, layer) in broken]
            stack.enter_context(nan_from(model.ctc_heads[str(layer)], places))
        with counted_layers(model) as calls:
            exits, asked = run(model, x, x_lens, wishes)
    assert calls == expected_calls(CTC, FRAMES, reached)
    for layer in layers[:-1]:
        good_here = [row for row in range(len(FRAMES)) if reached[row] >= layer and (row, layer) not in broken]
        assert asked.get(layer, []) == good_here
    for row, (layer, _, log_probs, _) in exits.items():
        if (row, layer) in broken:  # NaN at all exits
            assert nan_exits[row] == len(layers) and log_probs.isnan().any()
            expected[row] = {layer: exits[row][1:3]}
            exits[row][2].nan_to_num_()
    check(model, x, x_lens, exits, exited_at, nan_exits, expected)


# ---- models that end at an exit


def save(path, config, loss=None):
    model = build(config)
    config = Config(model=config, loss=loss or LossConfig())
    save_checkpoint(path, {"model": model.state_dict(), "config": config.to_dict(), "tokens": ["a"]})
    return model, path


@each_variant
def test_a_model_loaded_up_to_an_exit_equals_the_full_one(tmp_path, config):
    full, path = save(tmp_path / "model.pt", config)
    x, x_lens = make_batch(FRAMES)
    outputs = list(full.encoder(x, x_lens))
    for kept, layer in enumerate(config.exit_layers, 1):
        model, loaded, contents = load_model(path, exit_layer=layer)
        assert not model.training
        assert loaded.model.exit_layers == model.encoder.exit_layers == config.exit_layers[:kept]
        ended = list(model.encoder(x, x_lens))
        assert len(ended) == kept
        for ours, theirs in zip(ended, outputs, strict=False):
            assert ours.layer == theirs.layer and torch.equal(ours.encoder_out, theirs.encoder_out)
            if "ctc" in config.heads:
                assert torch.equal(model.ctc_log_probs(ours), full.ctc_log_probs(theirs))
            if "transducer" in config.heads:
                joiners = (each.joiner(ours.layer).state_dict() for each in (model, full))
                for a, b in zip(*(joiner.values() for joiner in joiners), strict=True):
                    assert torch.equal(a, b)

        # layers are counted from 0 in these names, exits from 1
        beyond = (
            *(f"encoder.layers.{number}." for number in range(layer, config.num_layers)),
            *(
                f"{where}.{number}."
                for where in ("encoder.parallel", "ctc_heads", "joiners")
                for number in range(layer + 1, config.num_layers + 1)
            ),
        )
        kept_names = {name for name in full.state_dict() if not name.startswith(beyond)}
        assert set(contents["model"]) == set(model.state_dict()) == kept_names
    assert load_model(path)[1].model == config


def test_a_model_cannot_end_where_it_has_no_exit(tmp_path):
    _, path = save(tmp_path / "model.pt", CTC)
    for layer in (0, 3, 7):
        with pytest.raises(CheckpointError, match=rf"no exit after layer {layer}; choose one of 1, 2, 4, 6"):
            load_model(path, exit_layer=layer)


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ((), (1 / 2, 1 / 2)),
        ((1.0, 3.0, 2.0, 2.0), (1 / 4, 3 / 4)),
        ((0.0, 0.0, 0.0, 1.0), (1 / 2, 1 / 2)),  # all remaining weights are 0: equal weights
    ],
)
def test_exit_weights_of_the_remaining_exits(tmp_path, weights, kept):
    _, path = save(tmp_path / "model.pt", CTC, LossConfig(exit_weights=weights))
    model, config, _ = load_model(path, exit_layer=2)
    loss = MultiExitLoss(model, config.loss)
    assert loss.exit_weights.tolist() == pytest.approx(list(kept))
    x, x_lens = make_batch([40, 60])
    losses = loss(x, x_lens, torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2]))
    assert float(losses.total) == pytest.approx(float((losses.per_exit * torch.tensor(kept)).sum()), rel=1e-5)


def test_the_id_of_a_checkpoint_depends_on_its_bytes(tmp_path):
    model, first = save(tmp_path / "first.pt", CTC)
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(first.read_bytes())
    assert checkpoint_id(copy) == checkpoint_id(first)
    assert len(checkpoint_id(first)) == 16
    changed = bytearray(first.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert checkpoint_id(copy) != checkpoint_id(first)
    next(model.parameters()).add_(1.0)
    second = tmp_path / "second.pt"
    save_checkpoint(second, {"model": model.state_dict(), "config": Config(model=CTC).to_dict()})
    assert checkpoint_id(second) != checkpoint_id(first)


# ---- time


def test_layers_that_are_skipped_take_no_time():
    """Two of twelve layers take less than half of the time of twelve (benchmarks/skipping.md has measurements)."""
    layers = (2, 4, 6, 8, 10, 12)
    shape = {"num_layers": 12, "exit_layers": layers, "parallel_exits": (2, 12)}
    model = build(dataclasses.replace(CTC, d_model=64, feedforward_dim=256, **shape))
    x, x_lens = make_batch([400, 300])
    seconds = {2: [], 12: []}
    for _ in range(5):  # alternating, so that other processes slow down both
        for layer in seconds:
            started = time.perf_counter()
            run(model, x, x_lens, {(0, layer), (1, layer)})
            seconds[layer].append(time.perf_counter() - started)
    assert min(seconds[2]) < 0.5 * min(seconds[12])
