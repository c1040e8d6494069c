"""Measure what exiting early saves: time and layer calls at each exit, and in batches that shrink.

python -m benchmarks.skipping [--systems conf published] [--output benchmarks/skipping.md]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from splitformer.checkpoint import load_model, save_checkpoint
from splitformer.cli import command
from splitformer.config import Config, load_config
from splitformer.early_exit.running import exit_early
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import ConformerLayer
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
FRAMES_PER_SECOND = 100

System = Literal["conf", "published"]


@dataclass(frozen=True)
class Options:
    """Measure what exiting early saves: time and layer calls at each exit, and in batches that shrink.

    Weights and features are random, since time does not depend on them. At each exit three runs alternate:

        stop       the full model, stopped at this exit by `exit_early`
        truncated  the same weights loaded up to this exit, run to their end
        all        every layer and every exit's head, as the authors' released code runs for any exit

    A figure is the median over the rounds of the ratio within a round, which the load of the machine affects little.
    Batches of 1 are the utterances of the larger batch, one in each round. They have four times as many rounds.
    """

    systems: tuple[System, ...] = ("conf", "published")
    """systems to measure: that of --conf, the published one"""
    conf: Path = ROOT / "egs/an4/conf/splitformer.toml"
    """configuration file"""
    utterances: int = 8
    """utterances in the larger batch, of 3 to 10 s each"""
    rounds: tuple[int, int] = (12, 3)
    """rounds of the conf, and of the published system"""
    threads: int = 1
    """threads of torch"""
    output: Path | None = None
    """file for the tables, besides standard output"""


def run(options: Options) -> None:
    torch.set_num_threads(options.threads)
    configs: dict[System, Config] = {"conf": load_config(options.conf), "published": Config()}
    names = {"conf": str(options.conf).removeprefix(f"{ROOT}/"), "published": "The published system"}
    rounds = dict(zip(configs, options.rounds))
    text = [
        f"{options.threads} thread(s), random weights; made by",
        "",
        f"    {command_line(ROOT)}",
        "",
        "stop: the full model, stopped at this exit; truncated: the same weights loaded up to this exit; all: every",
        "layer and head, whatever exit is used. Medians of ratios within a round; calls are of Conformer layers,",
        "parallel ones included.",
    ]
    with torch.no_grad():
        for system in options.systems:
            models = build_models(configs[system])
            parameters = sum(p.numel() for p in models[max(models)].parameters())
            text += ["", f"## {names[system]}: {parameters / 1e6:.1f} M parameters"]
            batch = random_batch(options.utterances, configs[system].model.num_mel_bins)
            for size, count in ((1, 4 * rounds[system]), (options.utterances, rounds[system])):
                text += ["", f"Batches of {size}, {count} rounds:", "", *per_exit(models, split(*batch, size), count)]
            text += ["", *mixed(models[max(models)], *batch, rounds[system])]
    print("\n".join(text))
    if options.output:
        with atomic_write(options.output) as file:
            file.write("# What exiting early saves\n\n" + "\n".join(text) + "\n")


def build_models(config: Config) -> dict[int, AsrModel]:
    """Return {exit: the model up to there}; the last one is the full model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_checkpoint(path, {"model": AsrModel(config.model).state_dict(), "config": config.to_dict()})
        return {layer: load_model(path, exit_layer=layer)[0] for layer in config.model.exit_layers}


def random_batch(size: int, num_mel_bins: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return features of utterances of 3 to 10 s, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    x_lens = torch.randint(3 * FRAMES_PER_SECOND, 10 * FRAMES_PER_SECOND + 1, (size,), generator=generator)
    return torch.randn(size, int(x_lens.max()), num_mel_bins, generator=generator), x_lens


def exit_at(model: AsrModel, x: Tensor, x_lens: Tensor, layers: Tensor) -> None:
    """Run each utterance up to the exit after its own of `layers` (N,)."""
    for _ in exit_early(model, x, x_lens, lambda rows, exit_output, _: layers[rows] <= exit_output.layer):
        pass


def run_all(model: AsrModel, x: Tensor, x_lens: Tensor) -> None:
    for _ in model(x, x_lens):
        pass


def per_exit(models: dict[int, AsrModel], batches: list[tuple[Tensor, Tensor]], rounds: int) -> list[str]:
    """Return a table with a row for each exit."""
    full, exits = models[max(models)], list(models)

    def runs(layer: int, x: Tensor, x_lens: Tensor) -> dict[str, Callable[[], None]]:
        layers = torch.full_like(x_lens, layer)
        return {
            "stop": lambda: exit_at(full, x, x_lens, layers),
            "truncated": lambda: exit_at(models[layer], x, x_lens, layers),
            "all": lambda: run_all(full, x, x_lens),
        }

    calls: dict[int, dict[str, int]] = {}
    for layer in exits:  # these runs count calls, which do not depend on the length, and warm up
        calls[layer] = {}
        x, x_lens = batches[0]
        for name, each in runs(layer, x[:, :FRAMES_PER_SECOND], x_lens.clamp(max=FRAMES_PER_SECOND)).items():
            with counted_frames(full if name != "truncated" else models[layer]) as frames:
                each()
            calls[layer][name] = len(frames)
    to_truncated: dict[int, list[float]] = {layer: [] for layer in exits}
    to_all: dict[int, list[float]] = {layer: [] for layer in exits}
    for number in tqdm(range(rounds), desc=f"batches of {len(batches[0][1])}"):
        for layer in exits:
            seconds = time_round(runs(layer, *batches[number % len(batches)]), backwards=number % 2 == 1)
            to_truncated[layer].append(seconds["stop"] / seconds["truncated"])
            to_all[layer].append(seconds["stop"] / seconds["all"])
    lines = [
        "| exit | stop / truncated | stop / all | layer calls: stop | truncated | all |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for layer in exits:
        cells = [f"{layer}", f"{median(to_truncated[layer]):.3f}", f"{median(to_all[layer]):.3f}"]
        cells += [str(calls[layer][name]) for name in ("stop", "truncated", "all")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def mixed(model: AsrModel, x: Tensor, x_lens: Tensor, rounds: int) -> list[str]:
    """Return a table of a batch with different exits, relative to running all to the last, and each one alone."""
    utterances = len(x)
    exits = torch.tensor(model.encoder.exit_layers)
    layers = exits[torch.randint(0, len(exits), (utterances,), generator=torch.Generator().manual_seed(2))]
    last = torch.full_like(layers, int(exits[-1]))
    alone = split(x, x_lens, 1)

    def one_by_one() -> None:
        for (one, length), layer in zip(alone, layers):
            exit_at(model, one, length, layer.view(1))

    runs: dict[str, Callable[[], None]] = {
        "shrinking": lambda: exit_at(model, x, x_lens, layers),
        "all": lambda: exit_at(model, x, x_lens, last),
        "one by one": one_by_one,
    }
    frames = {}
    for name, each in runs.items():
        with counted_frames(model) as counts:
            each()
        frames[name] = sum(counts)
    times = [time_round(runs, backwards=number % 2 == 1) for number in tqdm(range(rounds), desc="mixed")]
    lines = [
        f"A batch of {utterances} that exit after layers {', '.join(map(str, layers.tolist()))}.",
        "Frames are those that Conformer layers process, padding included.",
        "",
        "| the shrinking batch relative to | time | frames |",
        "| --- | ---: | ---: |",
    ]
    for name, text in (("all", "all to the last exit"), ("one by one", "each alone to its exit, without padding")):
        ratio = median(seconds["shrinking"] / seconds[name] for seconds in times)
        lines.append(f"| {text} | {ratio:.3f} | {frames['shrinking'] / frames[name]:.3f} |")
    return lines


def split(x: Tensor, x_lens: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batch as batches of `size`, each with its own padding only."""
    return [
        (some[:, : int(lengths.max())].contiguous(), lengths)
        for some, lengths in zip(x.split(size), x_lens.split(size))
    ]


def time_round(runs: dict[str, Callable[[], None]], backwards: bool) -> dict[str, float]:
    """Return the seconds of each run, in this order or backwards."""
    seconds = {}
    for name in reversed(runs) if backwards else runs:
        started = time.perf_counter()
        runs[name]()
        seconds[name] = time.perf_counter() - started
    return seconds


@contextmanager
def counted_frames(model: AsrModel) -> Iterator[list[int]]:
    """Yield a list that gets the frames, padding included, of each call of a Conformer layer."""
    frames: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, __: frames.append(inputs[0].size(0) * inputs[0].size(1)))
        for module in model.encoder.modules()
        if isinstance(module, ConformerLayer)
    ]
    try:
        yield frames
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    sys.exit(command(run))
