"""Where a run starts from: a model that was trained elsewhere, and layers that stay as they came."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from splitformer.checkpoint import CheckpointError, checkpoint_id, load_checkpoint
from splitformer.config import Config, ConfigError
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import Encoder

log = logging.getLogger(__name__)

RECORD = "initial.json"
VOCABULARY_MODULES = ("ctc_heads.", "decoder.", "joiners.")
"""What belongs to a vocabulary: its shapes, or what its rows stand for."""


@dataclass(frozen=True)
class Initial:
    """From where a run has started; kept in `exp_dir/initial.json`.

    checkpoint: its first 16 digits of SHA-256; None for a run that starts from nothing.
    frozen_layers: of the encoder, counted from the first, with everything below.
    """

    checkpoint: str | None = None
    frozen_layers: int = 0


def start_from(
    model: AsrModel,
    config: Config,
    tokens: list[str],
    exp_dir: Path,
    *,
    init_from: Path | None = None,
    freeze_encoder_layers: int = 0,
    resuming: bool = False,
    is_main: bool = True,
) -> None:
    """Give a new model the weights of another, and freeze layers. Call after the model was made, on every rank.

    A run that goes on takes its weights from its own checkpoint, and is frozen as it was.

    Args:
      tokens: of this run. Heads, and a transducer's decoder and joiners, are taken where the other model has the same
        tokens, and are new where it has others.
      init_from: a checkpoint of this project; None: the model stays as it is.
      freeze_encoder_layers: 0 freezes nothing; N the front end, layers 1 to N and the parallel layers of their exits.
    Raises:
      CheckpointError: the checkpoint cannot be read, or its encoder is another one; the message names the keys.
      ConfigError: there are not so many layers; a run that goes on was started otherwise.
    """
    asked = Initial(None if init_from is None else checkpoint_id(_existing(init_from)), freeze_encoder_layers)
    record = exp_dir / RECORD
    if resuming:
        found = Initial(**json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else Initial()
        if asked not in (found, Initial()):
            raise ConfigError(
                f"{exp_dir} was started with {_told(found)}, and is to go on with {_told(asked)}: give what it was "
                "started with or nothing, or another --exp-dir"
            )
        _freeze(model, found.frozen_layers)
        return
    _freeze(model, freeze_encoder_layers)
    if init_from is not None:
        taken = take_weights(model, config, tokens, init_from)
        if is_main:
            log.info("%s", taken)
    if is_main and asked != Initial():
        with atomic_write(record) as file:
            json.dump(asdict(asked), file, indent=1)
    if freeze_encoder_layers and is_main:
        frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
        log.info("frozen: the front end and encoder layers 1 to %d, %d parameters", freeze_encoder_layers, frozen)


def take_weights(model: AsrModel, config: Config, tokens: list[str], path: Path) -> str:
    """Put the weights of the checkpoint at `path` into the model, as far as they are of the same things.

    Returns what was taken and what is new, in a sentence.
    """
    contents = load_checkpoint(path)
    theirs = Config.from_dict(contents["config"], source=str(path))
    if theirs.data.features != config.data.features:
        raise CheckpointError(
            f"{path} was trained on data.features = {theirs.data.features}, and the conf has {config.data.features}: "
            f"--set data.features={theirs.data.features}"
        )
    state, own = contents["model"], model.state_dict()
    same_tokens = contents.get("tokens") == tokens
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    foreign = sorted(name for name in other if not name.startswith(VOCABULARY_MODULES))
    usable = {
        name: tensor
        for name, tensor in state.items()
        if name in own and name not in other and (same_tokens or not name.startswith(VOCABULARY_MODULES))
    }
    if foreign or not any(name.startswith("encoder.layers.") for name in usable):
        ours, their = config.to_dict()["model"], theirs.to_dict()["model"]
        keys = [f"model.{key} = {their[key]}, here {value}" for key, value in ours.items() if their[key] != value]
        keys = [each for each in keys if not each.startswith(("model.vocab_size", "model.dropout"))]
        raise CheckpointError(
            f"{path} has another encoder: {'; '.join(keys) or ', '.join(foreign[:3])}. Give a conf with its shape, or "
            "--set these keys"
        )
    with torch.no_grad():
        for name, tensor in usable.items():
            own[name].copy_(tensor)
    new = own.keys() - usable.keys()
    unused = state.keys() - usable.keys()
    told = f"weights from {path}: {_modules(usable)}"
    told += f"; new: {_modules(new)}" if new else "; nothing is new"
    if not same_tokens:
        told += f" (the vocabulary is another: {len(contents.get('tokens') or [])} tokens there, {len(tokens)} here)"
    return told + (f"; not used: {_modules(unused)}" if unused else "")


def _modules(names: object) -> str:
    """Tensors by the module that they are of: `encoder.layers 1 to 6 (220), ctc_heads 1, 2 (4)`."""
    found: dict[str, tuple[set[int], int]] = {}
    for name in sorted(names):  # type: ignore[call-overload]
        parts = name.split(".")
        depth = 2 if parts[0] == "encoder" else 1
        module = ".".join(parts[:depth])
        numbers, count = found.get(module, (set(), 0))
        if len(parts) > depth and parts[depth].isdecimal():
            # lists count from 0, and layers from 1; what is named by an exit is named by its layer
            numbers.add(int(parts[depth]) + (module == "encoder.layers"))
        found[module] = numbers, count + 1
    told = []
    for module, (numbers, count) in found.items():
        listed = sorted(numbers)
        if len(listed) > 2 and listed[-1] - listed[0] == len(listed) - 1:
            where = f" {listed[0]} to {listed[-1]}"
        else:
            where = f" {', '.join(map(str, listed))}" if listed else ""
        told.append(f"{module}{where} ({count} tensors)")
    return ", ".join(told)


def _freeze(model: AsrModel, count: int) -> None:
    """No gradient and no dropout in modules up to encoder layer `count`, and batch statistics as they came."""
    if count == 0:
        return
    encoder = model.encoder
    if not isinstance(encoder, Encoder):
        raise ConfigError(f"--freeze-encoder-layers {count}: this encoder's layers are in stacks; leave it out")
    if not 0 < count <= len(encoder.layers):
        raise ConfigError(f"--freeze-encoder-layers {count}: the encoder has 1 to {len(encoder.layers)} layers")
    frozen: list[nn.Module] = [encoder.cmvn, encoder.subsampling, *encoder.layers[:count]]
    frozen += [branch for layer, branch in encoder.parallel.items() if int(layer) <= count]
    for module in frozen:
        module.requires_grad_(False)
        # said once, it would be undone by train() of the model around it
        module.register_forward_pre_hook(lambda module, _: module.eval() and None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"--init-from: there is no {path}; give a checkpoint, such as EXP/averaged.pt")
    return path


def _told(initial: Initial) -> str:
    source = f"--init-from a checkpoint {initial.checkpoint}" if initial.checkpoint else "no --init-from"
    return f"{source} and --freeze-encoder-layers {initial.frozen_layers}"
