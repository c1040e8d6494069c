"""Convert the state dicts of the authors' released code, so that published weights run in our model.

Their `Splitformer` and `Early_conformer` hold one torchaudio Conformer of several layers per exit, and the Splitformer
one more per parallel branch; their `Early_zipformer`, a U-Net, holds one per block and has one exit. The arithmetic is
the same as ours; only names and the shapes of pointwise convolutions differ. Their positions are a stored table, ours
are computed.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from splitformer.checkpoint import CheckpointError
from splitformer.config import ModelConfig
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import sinusoidal_positions

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
UNET_BLOCKS = (2, 2, 4, 5, 4, 2)
"""Blocks of the U-Net before its stacks, and of each stack: fixed in the released code."""
POSITIONS = "positional_encoder.pe"
SILENT_BIAS = -1.0e4
"""Of a unit that the released model lacks: its probability is zero in float32, and the bias finite in float16."""


def load_reference_states(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """The state dict in the one file, or the mean of several: what the released code calls an average of epochs.

    Nothing in the files is executed.

    Raises:
      CheckpointError: a file that is missing, cannot be read or is no state dict; files of different models.
    """
    states = [_load_state(Path(path)) for path in paths]
    for path, state in zip(paths[1:], states[1:]):
        shapes, others = ({k: v.shape for k, v in each.items()} for each in (states[0], state))
        if different := sorted(k for k in shapes.keys() | others.keys() if shapes.get(k) != others.get(k)):
            raise CheckpointError(
                f"{path} is of another model than {paths[0]}, they cannot be averaged: {_some(different)}"
            )
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }


def _load_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({error}); a model that was pickled whole is not read, because "
            "that would run code: save its state_dict()"
        ) from error
    if isinstance(state, dict) and {"plain", "tensors"} <= state.keys():
        raise CheckpointError(f"{path} is a checkpoint of this project already: decode with it as it is")
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        held = f"{_some(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"{path} is no plain state dict, whose values are tensors (it holds {held}); save the model's state_dict()"
        )
    prefix = "module."  # DistributedDataParallel's
    if all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def infer_model_config(state: Mapping[str, Tensor], num_heads: int = 8) -> ModelConfig:
    """The shape of model that a released state dict is of. The number of heads leaves no trace in it.

    Raises:
      ValueError: names that are neither a Splitformer's, an Early_conformer's nor an Early_zipformer's.
    """
    unet = "conv_subsample.conv.weight" in state
    subsampling = "conv_subsample.conv" if unet else "conv_subsample.sequential.0"
    first_layer = "conformer.0.conformer_layers.0"
    needed = [
        f"{subsampling}.weight",
        f"{first_layer}.ffn1.sequential.1.weight",
        f"{first_layer}.conv_module.sequential.2.weight",
        "linear.weight" if unet else "linears.0.weight",
    ]
    if missing := [name for name in needed if name not in state]:
        raise ValueError(
            f"this is no state dict of the released Splitformer, Early_conformer or Early_zipformer: it lacks "
            f"{', '.join(missing)}, and has {_some(state)}"
        )
    (d_model, bins, _), feedforward, kernel, head = (tuple(state[name].shape) for name in needed)
    layers = _layers_of("conformer", state)
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"the state dict has the parts {', '.join(f'conformer.{i}' for i in sorted(layers))} alone")
    counts = [layers[i] for i in range(len(layers))]
    parallel = _layers_of("conformer_parallel", state)
    shape = {
        "num_mel_bins": bins,
        "vocab_size": head[0],
        "d_model": d_model,
        "num_heads": num_heads,
        "feedforward_dim": feedforward[0],
        "conv_kernel": kernel[2],
        "num_layers": sum(counts),
    }
    if unet:
        if len(counts) != sum(UNET_BLOCKS) or len(set(counts)) > 1:
            raise ValueError(
                f"an Early_zipformer has {sum(UNET_BLOCKS)} blocks of as many layers each, this state dict has "
                f"{len(counts)}, of {', '.join(map(str, counts))} layers"
            )
        stacks = tuple(size * counts[0] for size in UNET_BLOCKS[1:])
        return ModelConfig(
            **shape, encoder="unet", unet_stacks=stacks, exit_layers=(sum(counts),), parallel_exits=()
        )
    exits = tuple(accumulate(counts))
    if parallel and (len(parallel) != 2 or set(parallel.values()) != {1}):
        raise ValueError(
            f"a Splitformer has one parallel layer beside its first exit and one beside its last; this state dict has "
            f"conformer_parallel of {', '.join(map(str, parallel.values()))} layers"
        )
    return ModelConfig(**shape, exit_layers=exits, parallel_exits=(exits[0], exits[-1]) if parallel else ())


def _layers_of(part: str, state: Mapping[str, Tensor]) -> dict[int, int]:
    """{number of the torchaudio Conformer: its layers}."""
    found = {(int(n.split(".")[1]), n.split(".")[3]) for n in state if n.startswith(f"{part}.")}
    return dict(Counter(block for block, _ in found))


def convert_reference_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The released code's `state` under the names of `AsrModel(config)`.

    Raises:
      ValueError: a name that the converter does not know, or a shape of model that `config` does not describe; the
        message has the released code's names.
    """
    blocks = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("conformer.")), default=-1)
    if config.encoder == "unet":
        if config.num_layers % blocks:
            raise ValueError(f"the released state dict has {blocks} blocks, model.num_layers = {config.num_layers}")
        starts = tuple(range(0, config.num_layers, config.num_layers // blocks))
    else:
        if blocks != len(config.exit_layers):
            raise ValueError(
                f"the released state dict has {blocks} exits, model.exit_layers = {list(config.exit_layers)} has "
                f"{len(config.exit_layers)}"
            )
        starts = (0, *config.exit_layers[:-1])
    converted: dict[str, Tensor] = {}
    named: dict[str, str] = {}
    for name, tensor in state.items():
        if name == POSITIONS:
            _check_positions(tensor)
            continue
        new_name = _convert_name(name, config, starts)
        if "pointwise" in new_name and tensor.dim() == 3:
            tensor = tensor.squeeze(2)  # Conv1d of kernel 1 to Linear
        if new_name in converted:
            raise ValueError(f"{named[new_name]} and {name} are both {new_name} of model.exit_layers' shape")
        converted[new_name], named[new_name] = tensor, name
    _check_complete(converted, named, config)
    return converted


def reorder_heads(state: Mapping[str, Tensor], rows: Sequence[int | None]) -> dict[str, Tensor]:
    """The same model with other numbers for its units: unit i is what was unit `rows[i]`.

    None makes a unit that is never said. Log-probabilities of the others stay as they are.

    Args:
      state: of an `AsrModel` with CTC heads.
    """
    taken = torch.tensor([0 if row is None else row for row in rows])
    silent = torch.tensor([row is None for row in rows])
    reordered = dict(state)
    for name, tensor in state.items():
        if name.startswith("ctc_heads."):
            tensor = tensor[taken]
            tensor[silent] = SILENT_BIAS if name.endswith("bias") else 0.0
            reordered[name] = tensor
    return reordered


def _check_positions(table: Tensor) -> None:
    """`table` (max_len, 1, D) holds what we compute."""
    ours = sinusoidal_positions(torch.zeros(1, table.size(0), table.size(-1)))[0]
    if (table.reshape(ours.shape).float() - ours).abs().max() > 1e-3:
        raise ValueError(
            f"{POSITIONS} holds other positions than sine and cosine interleaved: this is another version of the code"
        )


def _check_complete(converted: Mapping[str, Tensor], named: Mapping[str, str], config: ModelConfig) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in AsrModel(config).state_dict().items()}
    strangers = sorted(named[name] for name in converted.keys() - wanted.keys())
    missing = sorted(wanted.keys() - converted.keys())
    shapes = [
        f"{named[name]} is {tuple(converted[name].shape)} instead of {wanted[name]}"
        for name in converted
        if name in wanted and tuple(converted[name].shape) != wanted[name]
    ]
    faults = [f"unknown: {_some(strangers)}"] * bool(strangers)
    faults += [f"missing (by our names): {_some(missing)}"] * bool(missing) + [_some(shapes)] * bool(shapes)
    if faults:
        raise ValueError(f"the released state dict does not fit model {_shape_of(config)}: {'; '.join(faults)}")


def _shape_of(config: ModelConfig) -> str:
    return (
        f"of exit_layers {list(config.exit_layers)}, parallel_exits {list(config.parallel_exits)}, d_model "
        f"{config.d_model}, {config.vocab_size} units"
    )


def _convert_name(name: str, config: ModelConfig, starts: tuple[int, ...]) -> str:
    """Our name for `name`."""
    parts = name.split(".")
    unet = config.encoder == "unet"
    try:
        if parts[0] == "conv_subsample" and unet == (parts[1] == "conv"):
            # conv_subsample.conv.{weight,bias}, or conv_subsample.sequential.{0,1}.{weight,bias}
            return f"encoder.subsampling.{parts[2] if unet else f'conv{int(parts[2]) + 1}.{parts[3]}'}"
        if parts[0] == "linear" and unet:
            return f"ctc_heads.{config.exit_layers[-1]}.{parts[1]}"
        if parts[0] == "linears" and not unet:
            return f"ctc_heads.{config.exit_layers[int(parts[1])]}.{parts[2]}"
        if parts[0] == "conformer":  # conformer.<block>.conformer_layers.<layer in it>.<rest>
            layer = starts[int(parts[1])] + int(parts[3])
            return f"encoder.layers.{layer}.{_convert_layer_name(parts[4:], name)}"
        if parts[0] == "conformer_parallel" and not unet:
            if int(parts[1]) >= len(config.parallel_exits):
                raise ValueError(f"{name}: model.parallel_exits = {list(config.parallel_exits)} has no such branch")
            exit_layer = config.parallel_exits[int(parts[1])]
            return f"encoder.parallel.{exit_layer}.layer.{_convert_layer_name(parts[4:], name)}"
    except IndexError:
        pass
    raise ValueError(f"{name} is no parameter of the released Splitformer, Early_conformer or Early_zipformer")


def _convert_layer_name(parts: list[str], full_name: str) -> str:
    stem, kind = ".".join(parts[:-1]), parts[-1]
    if kind.startswith("in_proj_"):  # MultiheadAttention keeps in_proj_weight and in_proj_bias itself
        stem, kind = stem + ".in_proj", kind.removeprefix("in_proj_")
    if stem not in LAYER_NAMES:
        raise ValueError(f"{full_name} is no parameter of torchaudio's ConformerLayer")
    return f"{LAYER_NAMES[stem]}.{kind}"


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first few, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
