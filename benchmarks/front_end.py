"""What the front end costs beside the layers, as ONNX files on one thread: every exit pays it.

    python -m benchmarks.front_end [--checkpoint EXP/averaged.pt ...] --output TABLE.md

Without checkpoints the published shape with random weights, with its own front end and with wide Conv2d ones. The input
is 10 s of random features; the fastest of several runs counts. Look at the ratios within a row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from splitformer.checkpoint import load_model
from splitformer.config import ModelConfig
from splitformer.export.onnx_files import onnx_function, write_onnx
from splitformer.export.wrappers import Part, at_least_one_output_frame, stage_parts
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 1000
ROUNDS = 8


class FrontEnd(nn.Module):
    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder.front_end(at_least_one_output_frame(x), x_lens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    models = {f"{path.parent.name}": load_model(path)[0] for path in args.checkpoint}
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
    if args.output:
        with atomic_write(args.output) as file:
            file.write(text)


def measure(model: AsrModel) -> tuple[float, list[tuple[str, float]]]:
    """Real-time factors: of the front end, and of everything up to each exit with its layer."""
    x, x_lens = torch.randn(1, FRAMES, model.encoder.num_mel_bins), torch.tensor([FRAMES])
    stages = stage_parts(model)
    axes = {name: stages[0].axes[name] for name in ("x", "x_lens", "hidden", "lengths")}
    front = Part("front", FrontEnd(model).eval(), stages[0].example, ("x", "x_lens"), ("hidden", "lengths"), axes)
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
    """Real-time factor of the file, of frames of 10 ms."""
    run, fastest = onnx_function(path), float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run(*inputs)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest / (FRAMES * 0.01)


if __name__ == "__main__":
    main()
