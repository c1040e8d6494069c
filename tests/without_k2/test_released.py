"""Our encoder with released weights against what the authors' code computes (arXiv 2506.18035)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from splitformer.checkpoint import CheckpointError
from splitformer.config import ModelConfig
from splitformer.export.released import (
    convert_released_state,
    infer_model_config,
    load_released_states,
    reorder_heads,
)
from splitformer.model.asr import AsrModel
from splitformer.model.unet import UNetEncoder
from tests.golden import KINDS, load_golden, load_released_model


def test_the_shape_is_read_from_the_state_dict(shared):
    splitformer, baseline, unet = (load_released_model(shared, kind)[0].encoder for kind in KINDS)
    assert splitformer.exit_layers == baseline.exit_layers == (2, 4, 6)
    assert set(splitformer.parallel) == {"2", "6"} and not baseline.parallel
    assert unet.exit_layers == (19,) and isinstance(unet, UNetEncoder)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_at_every_exit_equal_the_released_code(shared, kind):
    model, tensors, parameters = load_released_model(shared, kind)
    assert sum(p.numel() for p in model.parameters()) == parameters
    cases = [name.removeprefix("in.") for name in tensors if name.startswith("in.") and name != "in.wav"]
    assert len(cases) == 6
    for case in cases:
        features, expected = tensors[f"in.{case}"].transpose(1, 2), tensors[f"out.{case}"]
        with torch.no_grad():
            exits = list(model(features, torch.tensor([features.size(1)])))
        assert [e.layer for e, _ in exits] == list(model.encoder.exit_layers)
        for (exit_output, log_probs), reference in zip(exits, expected, strict=True):
            assert exit_output.lengths.tolist() == [reference.size(1)]
            torch.testing.assert_close(log_probs, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_do_not_fit_are_listed_by_their_released_names(shared, kind):
    state, _ = load_golden(shared, kind)
    config = infer_model_config(state, num_heads=4)
    name = "conformer.0.conformer_layers.0.ffn1.sequential.0.weight"
    wrong = {
        r"unknown: decoder\.weight": {**state, "decoder.weight": torch.zeros(1)},
        r"missing: conformer\.0\.conformer_layers\.0\.ffn1\.sequential\.0\.weight": {
            k: v for k, v in state.items() if k != name
        },
        rf"{name} is \(7,\) instead of \(32,\)": {**state, name: torch.zeros(7)},
        "interleaved sine and cosine": {**state, "positional_encoder.pe": torch.ones(2000, 1, 32)},
    }
    for message, changed in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            convert_released_state(changed, config)


def test_a_state_dict_of_another_model_is_refused(shared):
    state, _ = load_golden(shared, "early_conformer")
    with pytest.raises(CheckpointError, match=r"exit_layers \[2, 4, 6, 8, 10, 12\].*missing: .* other shapes: "):
        convert_released_state(state, ModelConfig())
    gated = replace(infer_model_config(state, 4), parallel_exits=(2,), parallel_gate=True)
    with pytest.raises(CheckpointError, match=r"missing: .*encoder\.parallel\.2\.gate"):
        convert_released_state(state, gated)
    with pytest.raises(CheckpointError, match=r"lacks conv_subsample\.sequential\.0\.weight, .*and has a\.weight"):
        infer_model_config({"a.weight": torch.zeros(1)})
    unet, _ = load_golden(shared, "early_zipformer")
    shorter = {name: tensor for name, tensor in unet.items() if not name.startswith("conformer.18.")}
    with pytest.raises(CheckpointError, match=r"missing: conformer\.18\."):
        convert_released_state(shorter, infer_model_config(shorter, 4))
    # a parallel branch of two layers, and none beside the last exit
    parallel = {f"conformer_parallel.0.{k[12:]}": v for k, v in state.items() if k.startswith("conformer.0.")}
    with pytest.raises(CheckpointError, match=r"unknown: conformer_parallel\.0\.conformer_layers\.1.*missing: "):
        convert_released_state(state | parallel, infer_model_config(state | parallel, 4))


def test_files_are_read_without_running_them_and_averaged(shared, tmp_path):
    state, _ = load_golden(shared, "splitformer")
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c.safetensors"]
    torch.save(OrderedDict(state), files[0])
    torch.save({f"module.{k}": 3 * v for k, v in state.items()}, files[1])  # as DistributedDataParallel saves it
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, files[2])
    for file in (files[0], files[2]):
        loaded = load_released_states([file])
        assert loaded.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in loaded.items())
    averaged = load_released_states(files[:2])
    assert averaged.keys() == state.keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (2 if tensor.is_floating_point() else 3) * state[name])

    other = tmp_path / "other"
    torch.save(load_golden(shared, "early_conformer")[0], other)
    with pytest.raises(CheckpointError, match=r"other and .*a are of different models: conformer_parallel\.0"):
        load_released_states([files[0], other])


def test_files_that_hold_something_else_are_refused(tmp_path):
    contents = {
        "pickled": (torch.nn.Linear(1, 1), "cannot be read as a state dict"),
        "wrapped": ({"model": {}, "epoch": torch.zeros(1)}, "not a state dict of tensors: it holds model, epoch"),
        "ours": ({"plain": {}, "tensors": {}}, "a checkpoint of this project already"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            load_released_states([tmp_path / name])
    for name in ("text", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_released_states([tmp_path / name])
    with pytest.raises(CheckpointError, match="there is no file"):
        load_released_states([tmp_path / "absent"])


def test_renumbering_units_changes_nothing_else(shared):
    model, tensors, _ = load_released_model(shared, "splitformer")
    rows = [5, None, *range(5), *range(6, 24)]
    config = replace(infer_model_config(load_golden(shared, "splitformer")[0], num_heads=4), vocab_size=len(rows))
    other = AsrModel(config).eval()
    other.load_state_dict(reorder_heads(model.state_dict(), rows))
    x = tensors["in.mel"].transpose(1, 2)
    with torch.no_grad():
        for (_, log_probs), reference in zip(other(x, torch.tensor([209])), tensors["out.mel"]):
            kept = [i for i, row in enumerate(rows) if row is not None]
            expected = reference[:, :, [row for row in rows if row is not None]]
            torch.testing.assert_close(log_probs[:, :, kept], expected, atol=1e-4, rtol=0)
            assert log_probs[:, :, 1].max() < -5000
