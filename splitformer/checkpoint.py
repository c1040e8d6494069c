"""Checkpoints: everything a run needs to resume, and a model that can be rebuilt from one file."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from splitformer.config import Config
from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or it does not belong to this model."""


def save_checkpoint(path: str | Path, contents: Mapping[str, Any]) -> None:
    """Write `contents` to `path` atomically.

    Each value is either plain (anything that JSON can hold) or consists of dictionaries of tensors. Plain values are
    stored as JSON, because the restricted unpickler of torch 1.13 accepts tensors and strings but no float.

    Raises:
      OSError: the file cannot be written, for example because the disk is full; the previous file is kept.
    """
    plain, tensors = {}, {}
    for name, value in contents.items():
        try:
            plain[name] = json.dumps(value)
        except TypeError:
            tensors[name] = value
    with atomic_write(path, "wb") as file:
        writer = _DeferredErrors(file)
        torch.save({"plain": plain, "tensors": tensors}, cast(IO[bytes], writer))
        if writer.error:
            raise writer.error


class _DeferredErrors:
    """A file that keeps its first error for later: torch 1.13 aborts the process if a write fails in its archive."""

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


def load_contents(path: str | Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote, on the CPU. Nothing in the file is executed.

    Raises:
      CheckpointError: the file is missing or damaged, or holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        start = file.read(4)
    if start and start != b"PK\x03\x04":
        raise CheckpointError(f"{path} cannot be read: it is not a checkpoint; give one such as EXP/averaged.pt")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose message recommends an unsafe way to load it
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or it holds more than tensors and plain values, so that this "
            "project did not write it; give a checkpoint such as EXP/averaged.pt"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read: it is damaged ({reason}); delete it and use an earlier one"
        ) from error
    if not isinstance(stored, dict) or not {"plain", "tensors"} <= stored.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this project: it lacks `plain` or `tensors`")
    return {name: json.loads(value) for name, value in stored["plain"].items()} | stored["tensors"]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the contents of a model's checkpoint, on the CPU, with present names for the tensors of older ones.

    Raises:
      CheckpointError: see `load_contents`; also, the file holds no model or no configuration.
    """
    contents = load_contents(path)
    if missing := {"model", "config"} - contents.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}")
    for name in ("model", "average"):
        if name in contents:
            contents[name] = {_present_name(key): tensor for key, tensor in contents[name].items()}
    return contents


def _present_name(tensor: str) -> str:
    """Return the name of the tensor that older checkpoints call `tensor`."""
    return tensor.replace("encoder.feature_norm.", "encoder.cmvn.")


def load_model(
    checkpoint: str | Path | Mapping[str, Any],
    device: str | torch.device = "cpu",
    exit_layer: int | None = None,
) -> tuple[AsrModel, Config, dict[str, Any]]:
    """Return a checkpoint's model in evaluation mode, its configuration, and the checkpoint's contents.

    Args:
      checkpoint: a file, or the contents of one, such as `averaged` returns.
      device: of the model; the contents stay on the CPU.
      exit_layer: truncate the model at this exit. Layers and exits above it are dropped, and the returned
        configuration and the contents' `model` are those of the truncated model.
    Raises:
      CheckpointError: the file cannot be read, was written by another version, or has no exit `exit_layer`.
    """
    if isinstance(checkpoint, Mapping):
        contents, source = dict(checkpoint), "the checkpoint"
    else:
        contents, source = load_checkpoint(checkpoint), str(checkpoint)
    config = Config.from_dict(contents["config"], source=source)
    if exit_layer is not None:
        if exit_layer not in config.model.exit_layers:
            exits = ", ".join(map(str, config.model.exit_layers))
            raise CheckpointError(f"{source} has no exit after layer {exit_layer}; choose one of {exits}")
        config = _truncated(config, exit_layer)
    model, contents["model"] = _with_weights(config, contents["model"], source, truncated=exit_layer is not None)
    return model.to(device).eval(), config, contents


def build_model(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> tuple[AsrModel, Config]:
    """Return the model of a configuration with these weights, in evaluation mode.

    Raises:
      CheckpointError: the weights do not fit the configuration; the message names `source`.
    """
    built = Config.from_dict(config, source=source)
    present = {_present_name(name): tensor for name, tensor in state.items()}
    model, _ = _with_weights(built, present, source, truncated=False)
    return model.eval(), built


def _with_weights(
    config: Config, state: Mapping[str, Tensor], source: str, truncated: bool
) -> tuple[AsrModel, dict[str, Tensor]]:
    """Return the model with its weights, and those weights. `state` may hold more of them only if `truncated`."""
    model = AsrModel(config.model)
    expected = model.state_dict()
    problems = {
        "it lacks": expected.keys() - state.keys(),
        "has the unknown": set() if truncated else state.keys() - expected.keys(),
        "has other shapes of": {
            name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape
        },
    }
    if any(problems.values()):
        listed = [f"{what} {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
                  for what, names in problems.items() if names]  # fmt: skip
        raise CheckpointError(
            f"{source} is a checkpoint of another version of this code: {'; '.join(listed)}. Use it with the code that "
            "wrote it, or train again"
        )
    state = {name: state[name] for name in expected}
    model.load_state_dict(state)
    return model, state


def _truncated(config: Config, exit_layer: int) -> Config:
    """Return the configuration of the model that ends at the exit after encoder layer `exit_layer`."""
    exits, branches = (
        tuple(layer for layer in layers if layer <= exit_layer)
        for layers in (config.model.exit_layers, config.model.parallel_exits)
    )
    weights = config.loss.exit_weights[: len(exits)]
    if not any(weights):  # only dropped exits had a weight
        weights = ()
    return replace(
        config,
        model=replace(config.model, num_layers=exit_layer, exit_layers=exits, parallel_exits=branches),
        loss=replace(config.loss, exit_weights=weights),
    )


def adopt_checkpoint(source: str | Path, config: Config, output: str | Path) -> None:
    """Copy a checkpoint from elsewhere to `output` after checking that it has the model that `config` describes.

    Raises:
      CheckpointError: it cannot be read, lacks what decoding needs, or has another model; the message names the keys.
    """
    contents = load_checkpoint(source)
    if missing := sorted({"tokens", "progress", "seed", "world_size", "device"} - contents.keys()):
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}: give a checkpoint of bin/average or bin/import_released"
        )
    theirs, ours = Config.from_dict(contents["config"], source=str(source)).to_dict(), config.to_dict()
    keys = [("model", key) for key in theirs["model"] if key not in ("vocab_size", "dropout")] + [("data", "features")]
    different = [
        f"{section}.{key} = {ours[section][key]} in the conf, {theirs[section][key]} in the checkpoint"
        for section, key in keys
        if theirs[section][key] != ours[section][key]
    ]
    if different:
        raise CheckpointError(f"{source} is of another system than the conf: {'; '.join(different)}")
    with atomic_write(output, "wb") as file:
        file.write(Path(source).read_bytes())


def checkpoint_id(path: str | Path) -> str:
    """Return an identifier of the file's contents: the first 16 digits of its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def epoch_checkpoints(exp_dir: str | Path) -> dict[int, Path]:
    """Return {N: exp_dir/epoch-N.pt} in ascending order."""
    matches = [(re.fullmatch(r"epoch-(\d+)\.pt", path.name), path) for path in Path(exp_dir).glob("epoch-*.pt")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def averaged(exp_dir: str | Path, epoch: int | None = None, avg: int | None = None) -> dict[str, Any]:
    """Return the contents of a checkpoint whose weights are the mean over all steps of the last `avg` epochs.

    Args:
      epoch: last epoch of the average (default: the newest).
      avg: number of epochs (default: the configuration's training.average_epochs, or all if there are fewer).
    Raises:
      CheckpointError: a checkpoint that is needed is missing or cannot be read.
    """
    found = epoch_checkpoints(exp_dir)
    if not found:
        raise CheckpointError(f"there is no epoch-N.pt in {exp_dir}: train first")

    def load(number: int) -> dict[str, Any]:
        if number not in found:
            numbers = ", ".join(map(str, found))
            raise CheckpointError(f"{exp_dir} has no epoch-{number}.pt; choose among epochs {numbers}")
        return load_checkpoint(found[number])

    epoch = max(found) if epoch is None else epoch
    last = load(epoch)
    if avg is None:
        avg = min(Config.from_dict(last["config"]).training.average_epochs, epoch)
    if not 1 <= avg <= epoch:
        raise CheckpointError(f"--avg {avg} with --epoch {epoch}: 1 to {epoch} epochs can be averaged")
    before: dict[str, Any] = {"average": last["average"], "average_step": 0} if avg == epoch else load(epoch - avg)
    if last["average_step"] > before["average_step"]:
        model = average_between(before["average"], before["average_step"], last["average"], last["average_step"])
    else:  # fewer steps than training.average_period: no mean yet
        model = last["model"]
    kept = ("config", "tokens", "progress", "seed", "world_size", "device")
    return {"model": model, "epoch": epoch, "avg": avg, **{name: last[name] for name in kept}}


def average_between(
    earlier: Mapping[str, Tensor], earlier_step: int, later: Mapping[str, Tensor], later_step: int
) -> dict[str, Tensor]:
    """Return the mean of the weights over the steps after `earlier_step` up to `later_step`, from two running averages.

    With A_n the running average at step n (`RunningAverage`), the mean over the steps m + 1 to n is
    (n A_n - m A_m) / (n - m). It is computed in float64, because the difference of two long means loses digits in
    float32. If `earlier_step` is 0, `earlier` does not matter.

    Raises:
      ValueError: `later_step` is not greater than `earlier_step`.
    """
    if not 0 <= earlier_step < later_step:
        raise ValueError(f"steps {earlier_step} and {later_step} must increase to average between them")
    mean = {}
    for name, tensor in later.items():
        if not tensor.is_floating_point():
            mean[name] = tensor
            continue
        total = tensor.double() * later_step - earlier[name].double() * earlier_step
        mean[name] = (total / (later_step - earlier_step)).to(tensor.dtype)
    return mean
