"""Measure peak memory and time of the transducer losses of a step, for 1, 3 and 6 exits.

    python -m benchmarks.transducer_loss [--device cuda] [--utterances 8 --seconds 10 --labels 100 --vocab-size 500]

Each figure comes from a process of its own. There is no encoder: its outputs are random. `separate` is a loss per exit
that shares nothing: each computes the decoder and the lm side, and all graphs are kept until the backward pass. Compare
the ratios to one shared exit, because absolute times depend on the machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from splitformer.cli import command
from splitformer.config import LossConfig, ModelConfig
from splitformer.files import atomic_write
from splitformer.losses import pruned_transducer
from splitformer.losses.pruned_transducer import PrunedTransducerLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Options:
    """Measure the transducer losses of a step."""

    device: str = "cpu"
    utterances: int = 8
    seconds: float = 10.0
    """seconds of audio in each utterance; 25 output frames per second"""
    labels: int = 50
    """labels of each utterance"""
    vocab_size: int = 500
    steps: int = 5
    """the fastest of these counts"""
    output: Path | None = None
    """also write the table to this file"""


def run(options: Options) -> None:
    rows = []
    for separate in (False, True):
        for exits in (1, 3, 6):
            request = json.dumps({"options": asdict(options), "exits": exits, "separate": separate}, default=str)
            program = [sys.executable, "-m", "benchmarks.transducer_loss", "--worker", request]
            done = subprocess.run(program, capture_output=True, text=True, check=True)
            rows.append(("separate" if separate else "shared", exits, *json.loads(done.stdout)))
    one_megabytes, one_seconds = rows[0][2:]
    text = [
        "# Transducer losses at several exits",
        "",
        f"{options.utterances} x {options.seconds:g} s, {options.labels} labels of {options.vocab_size}; "
        f"{device(options)}",
        "Losses and their backward pass, without the encoder. In brackets: ratio to one shared exit. Made by",
        "",
        f"    {command_line(ROOT)}",
        "",
        "| losses | exits | peak MB | s a step |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, exits, megabytes, seconds in rows:
        text.append(
            f"| {name} | {exits} | {megabytes:.0f} ({megabytes / one_megabytes:.2f}) | "
            f"{seconds:.2f} ({seconds / one_seconds:.2f}) |"
        )
    print("\n".join(text))
    if options.output:
        with atomic_write(options.output) as file:
            file.write("\n".join(text) + "\n")


def device(options: Options) -> str:
    if options.device == "cpu":
        return f"cpu, {torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name(options.device)


def measure(options: Options, exits: int, separate: bool) -> tuple[float, float]:
    """Return the peak MB above those before the first step, and the seconds of the fastest step."""
    torch.manual_seed(0)
    layers = tuple(range(1, exits + 1))
    model = AsrModel(
        ModelConfig(
            vocab_size=options.vocab_size,
            num_layers=exits,
            exit_layers=layers,
            parallel_exits=(),
            heads=("transducer",),
        )
    ).to(options.device)
    loss = PrunedTransducerLoss(model, LossConfig()).to(options.device)
    frames = round(25 * options.seconds)
    lengths = torch.full((options.utterances,), frames, device=options.device)
    y = torch.randint(1, options.vocab_size, (options.utterances, options.labels), device=options.device)
    y_lens = torch.full((options.utterances,), options.labels, device=options.device)
    encoder_out = [torch.randn(options.utterances, frames, 256, device=options.device) for _ in layers]

    def step() -> None:
        outputs = [ExitOutput(layer, x.requires_grad_(), lengths) for layer, x in zip(layers, encoder_out)]
        if separate:
            total = sum(loss(model, [exit_output], y, y_lens, 0.5, 1.0).sum() for exit_output in outputs)
        else:
            total = loss(model, outputs, y, y_lens, 0.5, 1.0).sum()
        total.backward()

    if separate:  # plain autograd
        pruned_transducer._with_gradient = lambda call, inputs, parameters: call(*inputs)
    before = peak_megabytes(options.device)
    seconds = min(timed(step, options.device) for _ in range(options.steps))
    return peak_megabytes(options.device) - before, seconds


def peak_megabytes(device: str) -> float:
    """Return the peak memory of this process so far."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated(device) / 2**20


def timed(call: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        request = json.loads(sys.argv[2])
        print(json.dumps(measure(Options(**request["options"]), request["exits"], request["separate"])))
    else:
        sys.exit(command(run))
