"""Our encoder against what the authors' released implementation computes (arXiv 2506.18035)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from splitformer.config import ModelConfig
from splitformer.export.reference import convert_reference_state
from splitformer.model.asr import AsrModel


def load_reference(shared, kind):
    golden = shared / "data" / "golden"
    sizes = json.loads((golden / "reference_tiny.json").read_text())[kind]
    tensors = load_file(golden / f"reference_{kind}_tiny.safetensors")
    layers = sizes["n_enc_exits"] * sizes["n_enc_layers"]
    exits = tuple(range(sizes["n_enc_layers"], layers + 1, sizes["n_enc_layers"]))
    config = ModelConfig(
        num_mel_bins=sizes["features_length"],
        vocab_size=sizes["dec_voc_size"],
        d_model=sizes["d_model"],
        num_heads=sizes["n_head"],
        feedforward_dim=sizes["d_feed_forward"],
        conv_kernel=sizes["depthwise_kernel_size"],
        num_layers=layers,
        exit_layers=exits,
        parallel_exits=(exits[0], exits[-1]) if kind == "splitformer" else (),
    )
    state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model = AsrModel(config)
    model.load_state_dict(convert_reference_state(state, config), strict=True)
    return model.eval(), tensors, sizes["parameters"]


@pytest.mark.parametrize("kind", ["splitformer", "early_conformer"])
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


def test_unknown_names_and_other_shapes_are_refused(shared):
    _, tensors, _ = load_reference(shared, "early_conformer")
    config = ModelConfig(num_layers=6, exit_layers=(2, 4, 6), parallel_exits=())
    with pytest.raises(ValueError, match="no parameter of the released"):
        convert_reference_state({**_conformers(tensors), "decoder.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="has 3 exits"):
        convert_reference_state(_conformers(tensors), ModelConfig())


def _conformers(tensors):
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
