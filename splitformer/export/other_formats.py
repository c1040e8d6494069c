"""Models as TorchScript, which runs where torch is and our code is not, and as safetensors, weights alone."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitformer.checkpoint import CheckpointError, build_model
from splitformer.config import Config
from splitformer.export.wrappers import Part, refuse_frozen_values
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel

METADATA_FILE = "metadata.json"
"""Inside a TorchScript archive."""


def write_torchscript(part: Part, path: Path, metadata: Mapping[str, str]) -> None:
    """Trace `part` and write it to `path`; `torch.jit.load(path)` gives back a function of tensors.

    Raises:
      ExportError: where tracing would freeze something that depends on the input.
    """
    with refuse_frozen_values(path.name), torch.no_grad():
        traced = torch.jit.trace(part.module, part.example, check_trace=False)
    told = json.dumps({**metadata, **part.metadata}, ensure_ascii=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA_FILE: told})
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def read_torchscript_metadata(path: Path) -> dict[str, str]:
    """What `write_torchscript` put beside the code."""
    extra = {METADATA_FILE: ""}
    torch.jit.load(str(path), _extra_files=extra)
    return json.loads(extra[METADATA_FILE])


def write_safetensors(
    model: AsrModel, config: Config, tokens: list[str], path: Path, metadata: Mapping[str, str]
) -> None:
    """The model's weights with its configuration and tokens; the file holds nothing that could be executed."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    told = {**metadata, "config": json.dumps(config.to_dict()), "tokens": json.dumps(tokens, ensure_ascii=False)}
    with atomic_write(path, "wb") as file:
        file.write(save(state, told))


def load_safetensors(path: str | Path) -> tuple[AsrModel, Config, dict[str, Any]]:
    """The model in `path` in evaluation mode, its configuration, and the file's metadata with `tokens` as a list.

    Raises:
      CheckpointError: the file is missing, damaged or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        config_values, metadata["tokens"] = json.loads(metadata["config"]), json.loads(metadata["tokens"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file of bin/export ({error}); export again") from error
    model, config = build_model(config_values, state, str(path))
    return model, config, metadata
