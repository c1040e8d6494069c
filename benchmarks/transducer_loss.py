"""Peak memory and time of a step's transducer losses, for 1, 3 and 6 exits, against as many separate losses.

    python -m benchmarks.transducer_loss [--device cuda] [--utterances 8 --seconds 10 --labels 100 --vocab-size 500]

Each figure comes from a process of its own. The encoder is left out: its outputs are random. `separate` is what a loss
per exit would be that shares nothing: the decoder and the lm side computed for each, all graphs kept until the
backward pass. Times are ratios to one exit of the same run: a machine's absolute ones say little.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from splitformer.config import LossConfig, ModelConfig
from splitformer.files import atomic_write
from splitformer.losses import pruned_transducer
from splitformer.losses.pruned_transducer import PrunedTransducerLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--utterances", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in each; 25 output frames a second")
    parser.add_argument("--labels", type=int, default=50, help="in each utterance")
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the table there as well")
    parser.add_argument("--exits", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--separate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exits:
        print(json.dumps(measure(args)))
        return
    rows = []
    for separate in (False, True):
        for exits in (1, 3, 6):
            command = [sys.executable, "-m", "benchmarks.transducer_loss", *sys.argv[1:], "--exits", str(exits)]
            done = subprocess.run(command + ["--separate"] * separate, capture_output=True, text=True, check=True)
            rows.append(("separate" if separate else "shared", exits, *json.loads(done.stdout)))
    one_megabytes, one_seconds = rows[0][2:]
    text = [
        "# Transducer losses at several exits",
        "",
        f"{args.utterances} x {args.seconds:g} s, {args.labels} labels of {args.vocab_size}; {device(args)}",
        "Losses and their backward pass, without the encoder. In brackets: of one shared exit. Made by",
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
    if args.output:
        with atomic_write(args.output) as file:
            file.write("\n".join(text) + "\n")


def device(args: argparse.Namespace) -> str:
    if args.device == "cpu":
        return f"cpu, {torch.get_num_threads()} thread(s)"
    return torch.cuda.get_device_name(args.device)


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """(MB above what was there before the first step, seconds of the fastest step)"""
    torch.manual_seed(0)
    layers = tuple(range(1, args.exits + 1))
    model = AsrModel(
        ModelConfig(
            vocab_size=args.vocab_size,
            num_layers=args.exits,
            exit_layers=layers,
            parallel_exits=(),
            heads=("transducer",),
        )
    ).to(args.device)
    loss = PrunedTransducerLoss(model, LossConfig()).to(args.device)
    frames = round(25 * args.seconds)
    lengths = torch.full((args.utterances,), frames, device=args.device)
    y = torch.randint(1, args.vocab_size, (args.utterances, args.labels), device=args.device)
    y_lens = torch.full((args.utterances,), args.labels, device=args.device)
    encoder_out = [torch.randn(args.utterances, frames, 256, device=args.device) for _ in layers]

    def step() -> None:
        exits = [ExitOutput(layer, x.requires_grad_(), lengths) for layer, x in zip(layers, encoder_out)]
        if args.separate:
            total = sum(loss(model, [exit_output], y, y_lens, 0.5, 1.0).sum() for exit_output in exits)
        else:
            total = loss(model, exits, y, y_lens, 0.5, 1.0).sum()
        total.backward()

    if args.separate:  # plain autograd
        pruned_transducer._with_gradient = lambda call, inputs, parameters: call(*inputs)
    before = peak_megabytes(args.device)
    seconds = min(timed(step, args.device) for _ in range(args.steps))
    return peak_megabytes(args.device) - before, seconds


def peak_megabytes(device: str) -> float:
    """The most that this process has held so far."""
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
    main()
