"""Convert the state dicts of the authors' released code, so that published weights run in our model.

Their `Splitformer` and `Early_conformer` hold one torchaudio Conformer of several layers per exit, and the Splitformer
one more per parallel branch. The arithmetic is the same as ours; only names and the shapes of pointwise convolutions
differ. Their positions are a stored table, ours are computed.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from splitformer.config import ModelConfig

LAYER_NAMES = {
    "ffn1.sequential.0": "feed_forward1.norm",
    "ffn1.sequential.1": "feed_forward1.up",
    "ffn1.sequential.4": "feed_forward1.down",
    "self_attn_layer_norm": "attention_norm",
    "self_attn.in_proj": "attention.in_proj",
    "self_attn.out_proj": "attention.out_proj",
    "conv_module.layer_norm": "convolution.norm",
    "conv_module.sequential.0": "convolution.pointwise1",
    "conv_module.sequential.2": "convolution.depthwise",
    "conv_module.sequential.3": "convolution.batch_norm",
    "conv_module.sequential.5": "convolution.pointwise2",
    "ffn2.sequential.0": "feed_forward2.norm",
    "ffn2.sequential.1": "feed_forward2.up",
    "ffn2.sequential.4": "feed_forward2.down",
    "final_layer_norm": "final_norm",
}


def convert_reference_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The released code's `state` under the names of `AsrModel(config)`.

    Raises:
      ValueError: a name that the converter does not know, or a shape of model that `config` does not describe.
    """
    blocks = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("conformer.")), default=-1)
    if blocks != len(config.exit_layers):
        raise ValueError(
            f"the released state dict has {blocks} exits, model.exit_layers = {list(config.exit_layers)} has "
            f"{len(config.exit_layers)}"
        )
    starts = (0, *config.exit_layers[:-1])
    converted = {}
    for name, tensor in state.items():
        new_name = _convert_name(name, config, starts)
        if new_name is None:
            continue
        if "pointwise" in new_name and tensor.dim() == 3:
            tensor = tensor.squeeze(2)  # Conv1d of kernel 1 to Linear
        converted[new_name] = tensor
    return converted


def _convert_name(name: str, config: ModelConfig, starts: tuple[int, ...]) -> str | None:
    """Our name for `name`; None for what we compute instead of storing."""
    if name == "positional_encoder.pe":
        return None
    parts = name.split(".")
    if parts[0] == "conv_subsample":  # conv_subsample.sequential.{0,1}.{weight,bias}
        return f"encoder.subsampling.conv{int(parts[2]) + 1}.{parts[3]}"
    if parts[0] == "linears":
        return f"ctc_heads.{config.exit_layers[int(parts[1])]}.{parts[2]}"
    if parts[0] == "conformer":  # conformer.<exit>.conformer_layers.<layer in it>.<rest>
        layer = starts[int(parts[1])] + int(parts[3])
        return f"encoder.layers.{layer}.{_convert_layer_name(parts[4:], name)}"
    if parts[0] == "conformer_parallel":
        if int(parts[1]) >= len(config.parallel_exits):
            raise ValueError(f"{name}: model.parallel_exits = {list(config.parallel_exits)} has no such branch")
        exit_layer = config.parallel_exits[int(parts[1])]
        return f"encoder.parallel.{exit_layer}.layer.{_convert_layer_name(parts[4:], name)}"
    raise ValueError(f"{name} is no parameter of the released Splitformer or Early_conformer")


def _convert_layer_name(parts: list[str], full_name: str) -> str:
    stem, kind = ".".join(parts[:-1]), parts[-1]
    if kind.startswith("in_proj_"):  # MultiheadAttention keeps in_proj_weight and in_proj_bias itself
        stem, kind = stem + ".in_proj", kind.removeprefix("in_proj_")
    if stem not in LAYER_NAMES:
        raise ValueError(f"{full_name} is no parameter of torchaudio's ConformerLayer")
    return f"{LAYER_NAMES[stem]}.{kind}"
