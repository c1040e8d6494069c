"""Checkpoints: everything a run needs to go on, and a model that rebuilds from its file alone."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from splitformer.config import Config
from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or made by something else."""


def save_checkpoint(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Write `contents` so that `path` is whole or untouched.

    Each value is either plain (whatever JSON holds) or tensors in dictionaries. Plain values are stored as JSON: the
    restricted unpickler of torch 1.13 knows tensors and strings, but not a float.

    Raises:
      OSError: the file cannot be written, for instance because the disk is full; what was there before stays.
    """
    plain, tensors = {}, {}
    for name, value in contents.items():
        try:
            plain[name] = json.dumps(value)
        except TypeError:
            tensors[name] = value
    with atomic_write(path, "wb") as file:
        quiet = _LateErrors(file)
        torch.save({"plain": plain, "tensors": tensors}, quiet)
        if quiet.error:
            raise quiet.error


class _LateErrors:
    """A file whose first error is kept for later: torch 1.13 ends the process where a write fails in its archive."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        if self.error is None:
            try:
                self.file.flush()
            except OSError as error:
                self.error = error


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """A checkpoint of a model; nothing in the file is executed.

    Raises:
      CheckpointError: the file is missing, truncated, or holds more than tensors and plain containers.
    """
    contents = load_contents(path, device)
    if missing := {"model", "config"} - contents.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
    for name in ("model", "average"):
        if name in contents:
            contents[name] = {_present_name(key): tensor for key, tensor in contents[name].items()}
    return contents


def _present_name(tensor: str) -> str:
    """The name of a tensor whose name in older checkpoints is `tensor`."""
    return tensor.replace("encoder.feature_norm.", "encoder.cmvn.")


def load_contents(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Whatever `save_checkpoint` wrote; nothing in the file is executed.

    Raises:
      CheckpointError: as `load_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it and use an earlier one") from error
    if not isinstance(stored, dict) or not {"plain", "tensors"} <= stored.keys():
        raise CheckpointError(f"{path} is no checkpoint of this project: it lacks `plain` or `tensors`")
    return {name: json.loads(value) for name, value in stored["plain"].items()} | stored["tensors"]


def load_model(
    path: str | Path, device: str | torch.device = "cpu", exit_layer: int | None = None
) -> tuple[AsrModel, Config, dict[str, Any]]:
    """The model in `path` in evaluation mode, its configuration, and the checkpoint.

    Args:
      exit_layer: an exit; the model ends there, and the weights of layers and exits above are not kept. The
        configuration returned is that of this smaller model, and the checkpoint's `model` lacks those weights too.
    Raises:
      CheckpointError: the file cannot be read, is of another version, or exit_layer is none of the model's exits.
    """
    contents = load_checkpoint(path, device)
    config = Config.from_dict(contents["config"], source=str(path))
    if exit_layer is not None:
        if exit_layer not in config.model.exit_layers:
            exits = ", ".join(map(str, config.model.exit_layers))
            raise CheckpointError(f"{path} has no exit after layer {exit_layer}; choose among {exits}")
        config = _truncated(config, exit_layer)
    model, contents["model"] = _with_weights(config, contents["model"], str(path), truncated=exit_layer is not None)
    return model.to(device).eval(), config, contents


def build_model(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> tuple[AsrModel, Config]:
    """The model of a configuration with these weights, in evaluation mode.

    Raises CheckpointError, which names `source`, where they do not go together.
    """
    built = Config.from_dict(config, source=source)
    model, _ = _with_weights(built, state, source, truncated=False)
    return model.eval(), built


def _with_weights(
    config: Config, state: Mapping[str, Tensor], source: str, truncated: bool
) -> tuple[AsrModel, dict[str, Tensor]]:
    """The model with its weights, and of `state` those that it has; more of them is an error unless `truncated`."""
    model = AsrModel(config.model)
    expected = model.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unknown = [] if truncated else sorted(state.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or unknown or other:
        what = [f"{why} {', '.join(names[:3])}{', ...' if names[3:] else ''}"
                for why, names in (("it lacks", missing), ("has the unknown", unknown), ("has other shapes of", other))
                if names]  # fmt: skip
        raise CheckpointError(
            f"{source} is a checkpoint of another version of this code: {'; '.join(what)}. Use it with the code that "
            "made it, or train again"
        )
    state = {name: state[name] for name in expected}
    model.load_state_dict(state)
    return model, state


def adopt_checkpoint(source: str | Path, config: Config, output: str | Path) -> None:
    """Copy a checkpoint that was made elsewhere to `output`, if it is of the model that `config` describes.

    Raises:
      CheckpointError: it cannot be read, lacks what decoding needs, or is of another model; the message names the keys.
    """
    contents = load_checkpoint(source)
    if missing := sorted({"tokens", "progress", "seed", "world_size", "device"} - contents.keys()):
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}: give one that bin/average or bin/import_reference made"
        )
    theirs, ours = Config.from_dict(contents["config"], source=str(source)).to_dict(), config.to_dict()
    different = [
        f"model.{key} = {ours['model'][key]} in the conf, {value} in the checkpoint"
        for key, value in theirs["model"].items()
        if key not in ("vocab_size", "dropout") and value != ours["model"][key]
    ]
    if theirs["data"]["features"] != ours["data"]["features"]:
        different.append(
            f"data.features = {ours['data']['features']} in the conf, {theirs['data']['features']} in the checkpoint"
        )
    if different:
        raise CheckpointError(f"{source} is of another system than the conf: {'; '.join(different)}")
    with atomic_write(output, "wb") as file:
        file.write(Path(source).read_bytes())


def _truncated(config: Config, exit_layer: int) -> Config:
    """The same up to encoder layer `exit_layer`."""
    exits, branches = (
        [x for x in xs if x <= exit_layer] for xs in (config.model.exit_layers, config.model.parallel_exits)
    )
    weights = config.loss.exit_weights[: len(exits)]
    if not any(weights):  # the exits above had all the weight
        weights = ()
    return replace(
        config,
        model=replace(config.model, num_layers=exit_layer, exit_layers=tuple(exits), parallel_exits=tuple(branches)),
        loss=replace(config.loss, exit_weights=weights),
    )


def checkpoint_id(path: str | Path) -> str:
    """What tells this file from other checkpoints: the first 16 digits of its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
