"""Fine-tuning: weights of another checkpoint to start from, and frozen layers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from splitformer.checkpoint import CheckpointError, checkpoint_id, load_checkpoint
from splitformer.config import Config, ConfigError
from splitformer.files import atomic_write, read_json
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import Encoder
from splitformer.training.options import RunOptions

log = logging.getLogger(__name__)
RECORD = "initial.json"
VOCABULARY_MODULES = ("ctc_heads.", "decoder.", "joiners.")
"""Modules whose weights belong to a vocabulary."""


@dataclass(frozen=True)
class Initial:
    """The weights that a run started from; kept in `exp_dir/initial.json`."""

    checkpoint: str | None = None
    """`checkpoint_id`; None if the weights were random"""
    frozen_layers: int = 0
    """encoder layers, counted from the first; the front end is frozen with them"""

    def __str__(self) -> str:
        source = f"--init-from a checkpoint {self.checkpoint}" if self.checkpoint else "no --init-from"
        return f"{source} and --freeze-encoder-layers {self.frozen_layers}"


def start_from(
    model: AsrModel, config: Config, tokens: list[str], options: RunOptions, resuming: bool, is_main: bool
) -> None:
    """Give a new model the weights of another, and freeze layers. Every rank calls it after creating the model.

    A resumed run has its own weights and is frozen as before. CTC heads, decoder and joiners are taken only from a
    model with the same `tokens`. With N frozen layers, the front end and parallel layers of exits up to N are frozen.

    Raises:
      CheckpointError: the checkpoint cannot be read, or its encoder differs; the message names the keys.
      ConfigError: the layers cannot be frozen, or a resumed run started otherwise.
    """
    exp_dir, init_from, freeze_encoder_layers = options.exp_dir, options.init_from, options.freeze_encoder_layers
    if init_from is not None and not init_from.is_file():
        raise CheckpointError(f"--init-from: there is no {init_from}; give a checkpoint, such as EXP/averaged.pt")
    asked = Initial(checkpoint_id(init_from) if init_from else None, freeze_encoder_layers)
    record = exp_dir / RECORD
    if resuming:
        found = Initial(**read_json(record)) if record.is_file() else Initial()
        if asked.checkpoint not in (None, found.checkpoint) or asked.frozen_layers not in (0, found.frozen_layers):
            raise ConfigError(
                f"{exp_dir} was started with {found}, and cannot resume with {asked}: give the same options as before, "
                "or none, or another --exp-dir"
            )
        _freeze(model, found.frozen_layers)
        return
    if freeze_encoder_layers and init_from is None:
        raise ConfigError(
            f"--freeze-encoder-layers {freeze_encoder_layers} would freeze random weights: give trained ones by "
            "--init-from CHECKPOINT"
        )
    _freeze(model, freeze_encoder_layers)
    if init_from is None:
        return
    summary = take_weights(model, config, tokens, init_from)
    if is_main:
        log.info("%s", summary)
        if freeze_encoder_layers:
            frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            log.info("frozen: the front end and encoder layers 1 to %d, %d parameters", freeze_encoder_layers, frozen)
        with atomic_write(record) as file:
            json.dump(asdict(asked), file, indent=1)


def take_weights(model: AsrModel, config: Config, tokens: list[str], path: Path) -> str:
    """Copy those weights of the checkpoint at `path` that fit into the model, and return a summary."""
    contents = load_checkpoint(path)
    theirs = Config.from_dict(contents["config"], source=str(path))
    if theirs.data.features != config.data.features:
        raise CheckpointError(
            f"{path} was trained on data.features = {theirs.data.features}, and the conf has {config.data.features}: "
            f"--set data.features={theirs.data.features}"
        )
    state, own = contents["model"], model.state_dict()
    same_tokens = contents.get("tokens") == tokens
    other_shape = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    misfits = sorted(name for name in other_shape if not name.startswith(VOCABULARY_MODULES))
    usable = {
        name: tensor
        for name, tensor in state.items()
        if name in own and name not in other_shape and (same_tokens or not name.startswith(VOCABULARY_MODULES))
    }
    if misfits or not any(name.startswith("encoder.layers.") for name in usable):
        ours, their = config.to_dict()["model"], theirs.to_dict()["model"]
        keys = [
            f"model.{key} = {their[key]}, here {value}"
            for key, value in ours.items()
            if their[key] != value and key not in ("vocab_size", "dropout")
        ]
        raise CheckpointError(
            f"{path} has another encoder: {'; '.join(keys) or ', '.join(misfits[:3])}. Give a conf with its shape, or "
            "--set these keys"
        )
    with torch.no_grad():
        for name, tensor in usable.items():
            own[name].copy_(tensor)
    new, unused = own.keys() - usable.keys(), state.keys() - usable.keys()
    summary = f"weights from {path}: {_modules(usable)}; new: {_modules(new) or 'none'}"
    if not same_tokens:
        summary += f" (another vocabulary: {len(contents.get('tokens') or [])} tokens there, {len(tokens)} here)"
    return summary + (f"; not used: {_modules(unused)}" if unused else "")


def _modules(names: Iterable[str]) -> str:
    """Return tensors by module, such as `encoder.layers 1 2 3 (110 tensors), ctc_heads 1 3 (4 tensors)`."""
    modules: dict[str, tuple[set[int], int]] = {}
    for name in sorted(names):
        module, number = re.match(r"(encoder\.\w+|\w+)\.?(\d*)", name).groups()  # type: ignore[union-attr]
        numbers, count = modules.get(module, (set(), 0))
        if number:  # lists count from 0, layers from 1; modules of exits have the number of the exit's layer
            numbers.add(int(number) + (module == "encoder.layers"))
        modules[module] = numbers, count + 1
    return ", ".join(
        f"{' '.join([module, *map(str, sorted(numbers))])} ({count} tensors)"
        for module, (numbers, count) in modules.items()
    )


def _freeze(model: AsrModel, count: int) -> None:
    """Freeze the modules up to encoder layer `count`: no gradients, no dropout, and constant batch statistics."""
    if count == 0:
        return
    encoder = model.encoder
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"--freeze-encoder-layers {count}: the layers of this encoder are in stacks; leave it out")
    if not 0 < count <= len(encoder.layers):
        raise ConfigError(f"--freeze-encoder-layers {count}: the encoder has 1 to {len(encoder.layers)} layers")
    frozen: list[nn.Module] = [encoder.cmvn, encoder.subsampling, *encoder.layers[:count]]
    frozen += [branch for layer, branch in encoder.parallel.items() if int(layer) <= count]
    for module in frozen:
        module.requires_grad_(False)
        # before each call, because train() of the whole model would undo it
        module.register_forward_pre_hook(lambda module, _: module.eval() and None)
