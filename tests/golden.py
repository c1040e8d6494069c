"""Outputs of the authors' released code for small models with random weights, from the folder of `--shared`."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from splitformer.export.released import convert_released_state, infer_model_config
from splitformer.model.asr import AsrModel

KINDS = ("splitformer", "early_conformer", "early_zipformer")


def load_golden(shared, kind):
    """(state dict of the released model, {name: input or output}) of one kind."""
    tensors = load_file(shared / "data" / "golden" / f"reference_{kind}_tiny.safetensors")
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return state, {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}


def load_released_model(shared, kind):
    """(our model with the released weights, {name: input or output}, number of parameters of the released model)."""
    state, tensors = load_golden(shared, kind)
    sizes = json.loads((shared / "data" / "golden" / "reference_tiny.json").read_text())[kind]
    config = infer_model_config(state, num_heads=sizes["n_head"])
    assert (config.num_mel_bins, config.vocab_size) == (sizes["features_length"], sizes["dec_voc_size"])
    assert (config.d_model, config.feedforward_dim) == (sizes["d_model"], sizes["d_feed_forward"])
    assert config.conv_kernel == sizes["depthwise_kernel_size"]
    assert config.num_layers == sizes["n_enc_exits"] * sizes["n_enc_layers"]
    model = AsrModel(config)
    model.load_state_dict(convert_released_state(state, config), strict=True)
    return model.eval(), tensors, sizes["parameters"]
