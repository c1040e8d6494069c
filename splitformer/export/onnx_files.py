"""Models as ONNX files that onnxruntime runs and sherpa-onnx loads."""

from __future__ import annotations

import inspect
import io
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from splitformer.export.wrappers import ExportError, Part, refuse_frozen_values
from splitformer.files import atomic_write

OPSETS = range(12, 18)
"""Operator sets that were tried with sherpa-onnx."""
DEFAULT_OPSET = 13
IR_VERSION = 8
"""The newest file version that older releases of onnxruntime, as devices have them, still read."""


def check_opset(opset: int) -> None:
    """Raises ExportError for an operator set that is none of `OPSETS`."""
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not supported: choose {OPSETS[0]} to {OPSETS[-1]} ({DEFAULT_OPSET} unless your runtime "
            "wants another)"
        )


def write_onnx(part: Part, path: Path, metadata: Mapping[str, str], opset: int = DEFAULT_OPSET) -> None:
    """Trace `part` and write it to `path`, whole or not at all.

    Raises:
      ExportError: for the operator set, or where tracing would freeze something that depends on the input.
    """
    check_opset(opset)
    buffer = io.BytesIO()
    # torch from 2.9 on has a second exporter as its default, which wants packages that are not needed here
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
    model.ir_version = min(model.ir_version, IR_VERSION)
    save_onnx(model, path, {**metadata, **part.metadata, "opset": str(opset)})


def save_onnx(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Check `model`, put `metadata` in the place of its own and write it."""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path, "wb") as file:
        file.write(model.SerializeToString())


def write_int8(path: Path, int8_path: Path) -> None:
    """`path` with the weights of its matrix products in 8 bits; activations are quantised as they come.

    Matrix products only: a quantised convolution (ConvInteger) does not load everywhere, and the depthwise ones hold
    few weights.
    """
    metadata = read_metadata(path)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "int8.onnx"
        logging.disable(logging.WARNING)  # it recommends a pre-processing that changes nothing here
        try:
            quantize_dynamic(path, made, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        model = onnx.load(made)
    model.ir_version = min(model.ir_version, IR_VERSION)
    save_onnx(model, int8_path, {**metadata, "quantized": "int8"})


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_onnx` put beside the graph."""
    model = onnx.load(path)
    return {each.key: each.value for each in model.metadata_props}


def count_parameters(path: Path) -> int:
    """Numbers in the file's constant tensors, scales of quantised weights and the like included."""
    total = 0
    for tensor in onnx.load(path).graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        total += count
    return total


def onnx_function(path: Path, threads: int = 1) -> Callable[..., tuple[Tensor, ...]]:
    """The file as a function of tensors, run by onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
        return tuple(torch.from_numpy(each) for each in found)

    return run
