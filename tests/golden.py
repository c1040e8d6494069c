"""Reference outputs of the authors' released code."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from splitformer.export.reference import (
    convert_reference_state,
    infer_model_config,
)
from splitformer.model.asr import AsrModel

KINDS = ("splitformer", "early_conformer", "early_zipformer")


def load_reference(shared, kind):
    golden = shared / "data" / "golden"
    sizes = json.loads((golden / "reference_tiny.json").read_text())[kind]
    tensors = load_file(golden / f"reference_{kind}_tiny.safetensors")
    state = _conformers(tensors)
    config = infer_model_config(state, num_heads=sizes["n_head"])
    assert (config.num_mel_bins, config.vocab_size) == (sizes["features_length"], sizes["dec_voc_size"])
    assert (config.d_model, config.feedforward_dim) == (sizes["d_model"], sizes["d_feed_forward"])
    assert config.conv_kernel == sizes["depthwise_kernel_size"]
    assert config.num_layers == sizes["n_enc_exits"] * sizes["n_enc_layers"]
    model = AsrModel(config)
    model.load_state_dict(convert_reference_state(state, config), strict=True)
    return model.eval(), tensors, sizes["parameters"]


def _conformers(tensors):
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
