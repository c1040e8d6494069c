"""Our encoder against what the authors' released implementation computes (arXiv 2506.18035)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch

from splitformer.checkpoint import CheckpointError
from splitformer.config import ModelConfig
from splitformer.export.reference import (
    convert_reference_state,
    infer_model_config,
    load_reference_states,
    reorder_heads,
)
from splitformer.model.asr import AsrModel
from splitformer.model.unet import UNetEncoder
from tests.golden import KINDS, _conformers, load_reference


def test_the_shape_is_read_from_the_state_dict(shared):
    splitformer, baseline, unet = (load_reference(shared, kind)[0].encoder for kind in KINDS)
    assert splitformer.exit_layers == baseline.exit_layers == (2, 4, 6)
    assert set(splitformer.parallel) == {"2", "6"} and not baseline.parallel
    assert unet.exit_layers == (19,) and isinstance(unet, UNetEncoder)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_at_every_exit_equal_the_released_code(shared, kind):
    model, tensors, parameters = load_reference(shared, kind)
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
def test_a_checkpoint_of_another_version_is_refused_by_name(shared, kind):
    _, tensors, _ = load_reference(shared, kind)
    state = _conformers(tensors)
    config = infer_model_config(state, num_heads=4)
    name = "conformer.0.conformer_layers.0.ffn1.sequential.0.weight"
    faults = {
        r"decoder\.weight is no parameter of the released": {**state, "decoder.weight": torch.zeros(1)},
        r"conformer\.0.*mhsa.* is no parameter of torchaudio's": {
            **state, "conformer.0.conformer_layers.0.mhsa.weight": torch.zeros(1)
        },
        r"missing .*encoder\.layers\.0\.feed_forward1\.norm\.weight": {
            k: v for k, v in state.items() if k != name
        },
        rf"{name} is \(7,\) instead of \(32,\)": {**state, name: torch.zeros(7)},
        "other positions than sine and cosine": {**state, "positional_encoder.pe": torch.ones(2000, 1, 32)},
    }
    for message, faulty in faults.items():
        with pytest.raises(ValueError, match=message):
            convert_reference_state(faulty, config)


def test_what_is_no_released_model_at_all_is_refused(shared):
    _, tensors, _ = load_reference(shared, "early_conformer")
    state = _conformers(tensors)
    with pytest.raises(ValueError, match="has 3 exits"):
        convert_reference_state(state, ModelConfig())
    with pytest.raises(ValueError, match=r"lacks conv_subsample\.sequential\.0\.weight, .*and has a\.weight"):
        infer_model_config({"a.weight": torch.zeros(1)})
    unet = _conformers(load_reference(shared, "early_zipformer")[1])
    with pytest.raises(ValueError, match="has 19 blocks of as many layers each, this state dict has 18"):
        infer_model_config({k: v for k, v in unet.items() if not k.startswith("conformer.18.")})
    parallel = {f"conformer_parallel.0.{k[12:]}": v for k, v in state.items() if k.startswith("conformer.0.")}
    with pytest.raises(ValueError, match="one parallel layer beside its first exit and one beside its last"):
        infer_model_config(state | parallel)


def test_files_are_read_without_running_them_and_averaged(shared, tmp_path):
    state = _conformers(load_reference(shared, "splitformer")[1])
    files = [tmp_path / "a", tmp_path / "b"]
    torch.save(OrderedDict(state), files[0])
    torch.save({f"module.{k}": 3 * v for k, v in state.items()}, files[1])  # as DistributedDataParallel saves it
    assert all(torch.equal(v, state[k]) for k, v in load_reference_states(files[:1]).items())
    averaged = load_reference_states(files)
    assert averaged.keys() == state.keys()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (2 if tensor.is_floating_point() else 3) * state[name])

    other = tmp_path / "other"
    torch.save(_conformers(load_reference(shared, "early_conformer")[1]), other)
    with pytest.raises(CheckpointError, match=r"other is of another model than .*conformer_parallel\.0"):
        load_reference_states([files[0], other])
    contents = {
        "pickled": (torch.nn.Linear(1, 1), "cannot be read as a state dict"),
        "wrapped": ({"model": state, "epoch": torch.zeros(1)}, "no plain state dict.*it holds model, epoch"),
        "ours": ({"plain": {}, "tensors": {}}, "a checkpoint of this project already"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            load_reference_states([tmp_path / name])
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_reference_states([tmp_path / "text"])
    with pytest.raises(CheckpointError, match="no file"):
        load_reference_states([tmp_path / "absent"])


def test_units_change_their_numbers_and_nothing_else(shared):
    model, tensors, _ = load_reference(shared, "splitformer")
    rows = [5, None, *range(5), *range(6, 24)]
    config = replace(infer_model_config(_conformers(tensors), num_heads=4), vocab_size=len(rows))
    other = AsrModel(config).eval()
    other.load_state_dict(reorder_heads(model.state_dict(), rows))
    x = tensors["in.mel"].transpose(1, 2)
    with torch.no_grad():
        for (_, log_probs), reference in zip(other(x, torch.tensor([209])), tensors["out.mel"]):
            kept = [i for i, row in enumerate(rows) if row is not None]
            expected = reference[:, :, [row for row in rows if row is not None]]
            torch.testing.assert_close(log_probs[:, :, kept], expected, atol=1e-4, rtol=0)
            assert log_probs[:, :, 1].max() < -5000
