"""Import the weights of the authors' released code (arXiv 2506.18035) as checkpoints of this project.

Their `Splitformer` and `Early_conformer` have one torchaudio Conformer of several layers per exit, the Splitformer one
more per parallel branch. Their `Early_zipformer`, a U-Net with one exit, has one Conformer per block. The arithmetic
equals ours: only names and the shapes of pointwise convolutions differ, and positions are a stored table.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from splitformer.checkpoint import CheckpointError, checkpoint_id, save_checkpoint
from splitformer.config import Config, DataConfig, ModelConfig, load_config
from splitformer.corpora.tokens import import_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import sinusoidal_positions

LAYER_MODULES = {
    "feed_forward1.norm": "ffn1.sequential.0",
    "feed_forward1.up": "ffn1.sequential.1",
    "feed_forward1.down": "ffn1.sequential.4",
    "attention_norm": "self_attn_layer_norm",
    "attention.in_proj": "self_attn.in_proj",
    "attention.out_proj": "self_attn.out_proj",
    "convolution.norm": "conv_module.layer_norm",
    "convolution.pointwise1": "conv_module.sequential.0",
    "convolution.depthwise": "conv_module.sequential.2",
    "convolution.batch_norm": "conv_module.sequential.3",
    "convolution.pointwise2": "conv_module.sequential.5",
    "feed_forward2.norm": "ffn2.sequential.0",
    "feed_forward2.up": "ffn2.sequential.1",
    "feed_forward2.down": "ffn2.sequential.4",
    "final_norm": "final_layer_norm",
}
"""{module of our ConformerLayer: module of torchaudio's}"""
UNET_BLOCKS = (2, 2, 4, 5, 4, 2)
"""Blocks of the U-Net before its stacks, and of each stack: constants in the released code."""
POSITIONS = "positional_encoder.pe"
SILENT_BIAS = -1.0e4
"""Bias of a unit that the released model lacks: its probability is zero in float32, and the bias finite in float16."""


@dataclass(frozen=True)
class ImportOptions:
    """Import the authors' released weights and tokens as a checkpoint of this project.

    The shape of the model is read from the state dict: a Splitformer, an early-exit Conformer, or the U-Net. Units are
    renumbered as this project numbers them. Nothing in the files is executed. See docs/released_weights.md.
    """

    state: tuple[Path, ...]
    """state dicts, of torch.save or *.safetensors; of several, the mean is taken"""
    bpe_model: Path
    """sentencepiece model of the training"""
    output: Path
    """checkpoint to write, such as DIR/averaged.pt"""
    lang_dir: Path | None = None
    """folder for bpe.model and tokens.txt (default: the folder of the checkpoint)"""
    config: Path | None = None
    """a conf that the weights must fit, which becomes the checkpoint's configuration"""
    num_heads: int | None = None
    """attention heads, which a state dict does not show (default: those of --config, or 8)"""
    blank_id: int = 0
    """id of the CTC blank in the released model"""
    case: Literal["keep", "upper", "lower"] = "keep"
    """case of the pieces: choose that of the transcripts"""


def import_released(options: ImportOptions) -> str:
    """Write the checkpoint and the tokens, and return a description of the model.

    Raise a UserError if a file cannot be read or the files do not fit together.
    """
    config = load_config(options.config) if options.config else Config(data=DataConfig(features="linear-mel"))
    state = load_released_states(options.state)
    model = infer_model_config(state, options.num_heads or (config.model.num_heads if options.config else 8))
    if options.config:
        different = [
            f"model.{name} = {wanted} in the conf, {found} in the weights"
            for (name, wanted), found in zip(asdict(config.model).items(), asdict(model).values())
            if wanted != found and name not in ("vocab_size", "dropout")
        ]
        if different:
            raise CheckpointError(f"{options.state[0]} does not fit {options.config}: {'; '.join(different)}")
        model = replace(config.model, vocab_size=model.vocab_size)
    weights = convert_released_state(state, model)

    lang_dir = options.lang_dir or options.output.parent
    units = import_tokenizer(options.bpe_model, lang_dir, model.vocab_size, options.blank_id, options.case)
    save_checkpoint(
        options.output,
        {
            "model": reorder_heads(weights, units),
            "config": replace(config, model=replace(model, vocab_size=len(units))).to_dict(),
            "tokens": Tokenizer(lang_dir).tokens,
            # nothing is known about the training: these are the values of an untrained model
            "progress": {"epoch": 0, "step": 0, "seconds": 0.0},
            "epoch": 0,
            "avg": len(options.state),
            "seed": 0,
            "world_size": 1,
            "device": "none",
            "imported_from": {
                "states": {path.name: checkpoint_id(path) for path in options.state},
                "bpe_model": {options.bpe_model.name: checkpoint_id(options.bpe_model)},
                "blank_id": options.blank_id,
                "units": units,
            },
        },
    )
    kind = "U-Net" if model.encoder == "unet" else f"parallel layers at {list(model.parallel_exits)}"
    size = f"d_model {model.d_model}, {model.num_heads} heads, {len(units)} units"
    return f"{options.output}: exits at {list(model.exit_layers)}, {kind}, {size}; tokens in {lang_dir}"


def load_released_states(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the state dict in a file of torch or safetensors; of several, the mean, as the released code averages
    epochs. Nothing in the files is executed. Raise a CheckpointError if they are not state dicts of one model.
    """
    states = [_load_state(Path(path)) for path in paths]
    for path, state in zip(paths[1:], states[1:]):
        first, other = ({name: tensor.shape for name, tensor in each.items()} for each in (states[0], state))
        if different := sorted({name for name, _ in first.items() ^ other.items()}):
            raise CheckpointError(f"{path} and {paths[0]} are of different models: {_listed(different)}")
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[-1].items()
    }


def _load_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({error}); a pickled model is not loaded, because that would run "
            "code: save its state_dict()"
        ) from error
    if isinstance(state, dict) and {"plain", "tensors"} <= state.keys():
        raise CheckpointError(f"{path} is a checkpoint of this project already: use it as it is")
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        held = _listed(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{path} is not a state dict of tensors: it holds {held}; save the model's state_dict()")
    if all(name.startswith("module.") for name in state):  # saved from DistributedDataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def infer_model_config(state: Mapping[str, Tensor], num_heads: int = 8) -> ModelConfig:
    """Return the shape of the model of a released state dict, which does not show the number of attention heads.

    Raise a CheckpointError if the names are not those of a Splitformer, an Early_conformer or an Early_zipformer.
    """
    unet = "conv_subsample.conv.weight" in state
    first_layer = "conformer.0.conformer_layers.0"
    needed = [
        "conv_subsample.conv.weight" if unet else "conv_subsample.sequential.0.weight",
        f"{first_layer}.ffn1.sequential.1.weight",
        f"{first_layer}.conv_module.sequential.2.weight",
        "linear.weight" if unet else "linears.0.weight",
    ]
    if missing := [name for name in needed if name not in state]:
        what = "not a state dict of the released Splitformer, Early_conformer or Early_zipformer"
        raise CheckpointError(f"{what}: it lacks {', '.join(missing)}, and has {_listed(state)}")
    (d_model, bins, _), feedforward, kernel, head = (tuple(state[name].shape) for name in needed)
    counts = _layer_counts("conformer", state)
    exits = (counts[0] * sum(UNET_BLOCKS),) if unet else tuple(accumulate(counts))
    shape: dict[str, Any] = {
        "num_mel_bins": bins,
        "vocab_size": head[0],
        "d_model": d_model,
        "num_heads": num_heads,
        "feedforward_dim": feedforward[0],
        "conv_kernel": kernel[2],
        "num_layers": exits[-1],
        "exit_layers": exits,
        "parallel_exits": (exits[0], exits[-1]) if _layer_counts("conformer_parallel", state) else (),
    }
    if unet:
        shape |= {"encoder": "unet", "unet_stacks": tuple(size * counts[0] for size in UNET_BLOCKS[1:])}
    return ModelConfig(**shape)


def _layer_counts(part: str, state: Mapping[str, Tensor]) -> list[int]:
    """Return the number of layers of each torchaudio Conformer in the ModuleList `part`."""
    layers = {(int(n.split(".")[1]), n.split(".")[3]) for n in state if n.startswith(f"{part}.")}
    return [count for _, count in sorted(Counter(block for block, _ in layers).items())]


def convert_released_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of `AsrModel(config)` from a released state dict.

    Raise a CheckpointError with the released names of tensors that are missing, unknown or of another shape.
    """
    table = state.get(POSITIONS)  # (max_len, 1, D)
    if table is not None:
        ours = sinusoidal_positions(torch.zeros(1, table.size(0), table.size(-1)))[0]
        if (table.reshape(ours.shape).float() - ours).abs().max() > 1e-3:
            raise CheckpointError(f"{POSITIONS} does not hold interleaved sine and cosine: another version of the code")
    modules = _released_modules(config)
    converted, names, missing, shapes = {}, {POSITIONS}, [], []
    for name, own in AsrModel(config).state_dict().items():
        module, _, kind = name.rpartition(".")
        # MultiheadAttention itself holds in_proj_weight and in_proj_bias
        released = f"{modules.get(module, module)}.{kind}".replace(".in_proj.", ".in_proj_")
        names.add(released)
        tensor = state.get(released)
        if tensor is None:
            missing.append(released)
            continue
        if "pointwise" in name and tensor.dim() == 3:
            tensor = tensor.squeeze(2)  # Conv1d of kernel 1 to Linear
        if tensor.shape != own.shape:
            shapes.append(f"{released} is {tuple(tensor.shape)} instead of {tuple(own.shape)}")
        converted[name] = tensor
    problems = {"unknown": sorted(state.keys() - names), "missing": missing, "other shapes": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{what}: {_listed(which)}" for what, which in problems.items() if which)
        raise CheckpointError(
            f"the released state dict does not fit a model with exit_layers {list(config.exit_layers)}, parallel_exits "
            f"{list(config.parallel_exits)}, d_model {config.d_model} and {config.vocab_size} units: {listed}"
        )
    return converted


def _released_modules(config: ModelConfig) -> dict[str, str]:
    """Return {module of `AsrModel(config)`: module of the released model}."""
    if config.encoder == "unet":
        starts = tuple(range(0, config.num_layers + 1, config.num_layers // sum(UNET_BLOCKS)))
        modules = {"encoder.subsampling": "conv_subsample.conv", f"ctc_heads.{config.num_layers}": "linear"}
    else:
        starts = (0, *config.exit_layers)
        modules = {f"encoder.subsampling.conv{i + 1}": f"conv_subsample.sequential.{i}" for i in range(2)}
        modules |= {f"ctc_heads.{layer}": f"linears.{i}" for i, layer in enumerate(config.exit_layers)}
    layers = {
        f"encoder.layers.{layer}": f"conformer.{block}.conformer_layers.{layer - start}"
        for block, (start, end) in enumerate(pairwise(starts))
        for layer in range(start, end)
    }
    for branch, layer in enumerate(config.parallel_exits):
        layers[f"encoder.parallel.{layer}.layer"] = f"conformer_parallel.{branch}.conformer_layers.0"
    for ours, released in layers.items():
        modules |= {f"{ours}.{ours_in}": f"{released}.{released_in}" for ours_in, released_in in LAYER_MODULES.items()}
    return modules


def reorder_heads(state: Mapping[str, Tensor], rows: Sequence[int | None]) -> dict[str, Tensor]:
    """Return the same model with its units renumbered: unit i is what was unit `rows[i]`.

    None adds a unit that is never emitted. The log-probabilities of the other units do not change.

    Args:
      state: weights of an `AsrModel` with CTC heads.
    """
    taken = torch.tensor([0 if row is None else row for row in rows])
    silent = torch.tensor([row is None for row in rows])
    reordered = dict(state)
    for name, tensor in state.items():
        if name.startswith("ctc_heads."):
            reordered[name] = tensor[taken]
            reordered[name][silent] = SILENT_BIAS if name.endswith("bias") else 0.0
    return reordered


def _listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
