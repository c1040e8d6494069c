"""Measure what the front end costs beside the layers, as ONNX files on one thread: every exit pays for it.

    python -m benchmarks.front_end [--checkpoint EXP/averaged.pt ...] --output TABLE.md

The shape of the published models is always measured, with random weights, with its own front end and with two wide
Conv2d front ends. The input is 10 s of random features; the fastest of several runs counts. Compare the ratios within
a row.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from splitformer.checkpoint import load_model
from splitformer.cli import command
from splitformer.config import ModelConfig
from splitformer.export.formats import onnx_function, write_onnx
from splitformer.export.wrappers import Part, at_least_one_output_frame, stage_parts, traceable_encoder
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 1000
ROUNDS = 8


@dataclass(frozen=True)
class Options:
    """Measure what the front end costs beside the layers, as ONNX files on one thread."""

    checkpoint: tuple[Path, ...] = ()
    """models to measure beside the published shape"""
    output: Path | None = None
    """also write the table to this file"""


class FrontEnd(nn.Module):
    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.encoder = traceable_encoder(model)

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.front_end(at_least_one_output_frame(x), x_lens)


def run(options: Options) -> None:
    models = {path.parent.name: load_model(path)[0] for path in options.checkpoint}
    models["published shape, two linear Conv1d"] = AsrModel(ModelConfig()).eval()
    for channels in (32, 256):
        config = ModelConfig(subsampling="conv2d", subsampling_channels=channels)
        models[f"the same, two Conv2d of {channels} channels"] = AsrModel(config).eval()
    lines = ["# The front end beside the layers", "", "Real-time factors of onnxruntime, fp32, one thread; made by", ""]
    lines += [f"    {command_line(ROOT)}", ""]
    lines += ["| model | front end | first exit | last exit | front end's share of them |", "|---|---:|---:|---:|---:|"]
    for name, model in models.items():
        front, exits = measure(model)
        (first, first_cost), (last, last_cost) = exits[0], exits[-1]
        lines.append(
            f"| {name} | {front:.5f} | {first_cost:.5f} (layer {first}) | {last_cost:.5f} (layer {last}) "
            f"| {100 * front / first_cost:.0f} and {100 * front / last_cost:.0f} % |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        with atomic_write(options.output) as file:
            file.write(text)


def measure(model: AsrModel) -> tuple[float, list[tuple[str, float]]]:
    """Return the real-time factor of the front end, and (layer, that of everything up to there) for each exit."""
    module = FrontEnd(model)
    x, x_lens = torch.randn(1, FRAMES, module.encoder.num_mel_bins), torch.tensor([FRAMES])
    stages = stage_parts(model)
    front = Part("front", module, stages[0].example, ("x", "x_lens"), ("hidden", "lengths"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        write_onnx(front, path, {})
        cost, total, exits, state = best(path, x, x_lens), 0.0, [], (x, x_lens)
        for part in stages:
            write_onnx(part, path, {})
            total += best(path, *state)
            state = onnx_function(path)(*state)[:2]
            exits.append((part.metadata["exit_layer"], total))
    return cost, exits


def best(path: Path, *inputs: Tensor) -> float:
    """Return the real-time factor of the file; frames are 10 ms."""
    function, fastest = onnx_function(path), float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        function(*inputs)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest / (FRAMES * 0.01)


if __name__ == "__main__":
    sys.exit(command(run))
