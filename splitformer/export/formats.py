"""Files of exported models: ONNX for onnxruntime and sherpa-onnx, TorchScript for torch, and safetensors (weights)."""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from splitformer.checkpoint import CheckpointError, build_model
from splitformer.config import Config
from splitformer.export.wrappers import Part, refuse_frozen_values
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel

Opset = Literal[12, 13, 14, 15, 16, 17]
"""ONNX operator sets that have been tried with sherpa-onnx."""
DEFAULT_OPSET: Opset = 13
IR_VERSION = 8
"""The newest ONNX file version that older releases of onnxruntime, such as those on devices, can read."""
METADATA_FILE = "metadata.json"
"""Name of the metadata in a TorchScript archive."""


def write_onnx(part: Part, path: Path, metadata: Mapping[str, str], opset: Opset = DEFAULT_OPSET) -> None:
    """Trace `part` and write it to `path` atomically. Raise an ExportError if tracing would freeze a value."""
    buffer = io.BytesIO()
    # torch 2.9 and later use another exporter by default, which needs more packages
    tracing = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with refuse_frozen_values(path.name), torch.no_grad():
        torch.onnx.export(
            part.module,
            part.example,
            buffer,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes=part.axes,
            opset_version=opset,
            **tracing,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    _save_onnx(model, path, {**metadata, **part.metadata, "opset": str(opset)})


def write_int8(path: Path, int8_path: Path) -> None:
    """Write the ONNX file `path` with 8-bit weights of its matrix products; activations are quantised at run time.

    Convolutions stay in float32: ConvInteger is not supported everywhere, and depthwise convolutions have few weights.
    """
    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it recommends a pre-processing that changes nothing here
        try:
            quantize_dynamic(
                path, quantised, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
            )
        finally:
            logging.disable(logging.NOTSET)
        model = onnx.load(quantised)
    _save_onnx(model, int8_path, {**onnx_metadata(path), "quantized": "int8"})


def _save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Check `model`, replace its metadata by `metadata` and write it."""
    model.ir_version = min(model.ir_version, IR_VERSION)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path, "wb") as file:
        file.write(model.SerializeToString())


def onnx_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file."""
    return {each.key: each.value for each in onnx.load(path).metadata_props}


def onnx_function(path: Path, threads: int = 1) -> Callable[..., tuple[Tensor, ...]]:
    """Return an ONNX file as a function of tensors, run by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
        return tuple(torch.from_numpy(each) for each in outputs)

    return run


def write_torchscript(part: Part, path: Path, metadata: Mapping[str, str]) -> None:
    """As `write_onnx`; `torch.jit.load(path)` returns the part as a function of tensors."""
    with refuse_frozen_values(path.name), torch.no_grad():
        traced = torch.jit.trace(part.module, part.example, check_trace=False)
    text = json.dumps({**metadata, **part.metadata}, ensure_ascii=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={METADATA_FILE: text})
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def write_safetensors(
    model: AsrModel, config: Config, tokens: Sequence[str], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write the model's weights with its configuration and tokens. Nothing in such a file can be executed."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    texts = {"config": json.dumps(config.to_dict()), "tokens": json.dumps(list(tokens), ensure_ascii=False)}
    with atomic_write(path, "wb") as file:
        file.write(save(state, {**metadata, **texts}))


def load_safetensors(path: str | Path) -> tuple[AsrModel, Config, dict[str, Any]]:
    """Return the model of an exported file in evaluation mode, its configuration, and its metadata, `tokens` as a list.

    Raise a CheckpointError if the file is missing, damaged or of another version.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        config_values, metadata["tokens"] = json.loads(metadata["config"]), json.loads(metadata["tokens"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a model of --format safetensors ({error}); export again") from error
    model, config = build_model(config_values, state, str(path))
    return model, config, metadata


def count_parameters(path: Path) -> int:
    """Return the number of parameters in a file; in ONNX files, constants and scales of quantised weights count too."""
    if path.suffix == ".onnx":
        return sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    module = load_safetensors(path)[0] if path.suffix == ".safetensors" else torch.jit.load(str(path))
    return sum(each.numel() for each in module.parameters())
