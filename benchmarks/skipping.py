"""What it saves to leave the encoder early: time and layer calls per exit, and in batches that shrink.

    python -m benchmarks.skipping [--systems conf published] [--output benchmarks/skipping.md]

Weights and features are random: time does not depend on them, and the stop rules here look at neither. Of each exit

    stop       the full model, let go at this exit by `exit_early`
    truncated  the same weights loaded up to this exit, to the end of that model
    all        every layer and every exit's head, whatever exit is used: what the authors' released code does

run in turns, and a figure is the median over the turns of the ratio within one: what else a machine does changes from
turn to turn, and a ratio little. Batches of 1 are the utterances of the larger batch, one in a turn, and as they take
less time they have four times the turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from splitformer.checkpoint import load_model, save_checkpoint
from splitformer.config import Config, load_config
from splitformer.early_exit.running import exit_early
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import ConformerLayer
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
FRAMES_PER_SECOND = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=("conf", "published"), default=["conf", "published"])
    parser.add_argument("--conf", type=Path, default=ROOT / "egs/an4/conf/splitformer-ungated.toml")
    parser.add_argument("--utterances", type=int, default=8, help="in the larger batch, of 3 to 10 s each")
    parser.add_argument("--rounds", type=int, nargs=2, default=[12, 3], help="turns: of the conf, of the published")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the tables there as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    configs = {"conf": load_config(args.conf), "published": Config()}
    names = {"conf": str(args.conf).removeprefix(f"{ROOT}/"), "published": "The published system"}
    rounds = dict(zip(configs, args.rounds))
    text = [
        f"{args.threads} thread(s), random weights; made by",
        "",
        f"    {command_line(ROOT)}",
        "",
        "stop: leaving the full model at this exit; truncated: the same weights loaded up to this exit; all: every",
        "layer and head, whatever exit is used. Medians of ratios within a turn; calls are of Conformer layers, and",
        "of the parallel ones.",
    ]
    with torch.no_grad():
        for system in args.systems:
            models = build_models(configs[system])
            parameters = sum(p.numel() for p in models[max(models)].parameters())
            text += ["", f"## {names[system]}: {parameters / 1e6:.1f} M parameters"]
            batch = random_batch(args.utterances, configs[system].model.num_mel_bins)
            for size, turns in ((1, 4 * rounds[system]), (args.utterances, rounds[system])):
                text += ["", f"Batches of {size}, {turns} turns:", "", *per_exit(models, cut_up(*batch, size), turns)]
            text += ["", *mixed(models[max(models)], *batch, rounds[system])]
    print("\n".join(text))
    if args.output:
        with atomic_write(args.output) as file:
            file.write("# What leaving early saves\n\n" + "\n".join(text) + "\n")


def build_models(config: Config) -> dict[int, AsrModel]:
    """{exit: the model up to there}; the last is the full one."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_checkpoint(path, {"model": AsrModel(config.model).state_dict(), "config": config.to_dict()})
        return {layer: load_model(path, exit_layer=layer)[0] for layer in config.model.exit_layers}


def random_batch(size: int, num_mel_bins: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Features of utterances of 3 to 10 s, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    x_lens = torch.randint(3 * FRAMES_PER_SECOND, 10 * FRAMES_PER_SECOND + 1, (size,), generator=generator)
    return torch.randn(size, int(x_lens.max()), num_mel_bins, generator=generator), x_lens


def leave_at(model: AsrModel, x: Tensor, x_lens: Tensor, layers: Tensor) -> None:
    """Run each utterance up to the exit after its own of `layers` (N,)."""
    for _ in exit_early(model, x, x_lens, lambda rows, exit_output, _: layers[rows] <= exit_output.layer):
        pass


def run_all(model: AsrModel, x: Tensor, x_lens: Tensor) -> None:
    for _ in model(x, x_lens):
        pass


def per_exit(models: dict[int, AsrModel], batches: list[tuple[Tensor, Tensor]], rounds: int) -> list[str]:
    """A row for each exit."""
    full, exits = models[max(models)], list(models)

    def runs(layer: int, x: Tensor, x_lens: Tensor) -> dict[str, Callable[[], None]]:
        layers = torch.full_like(x_lens, layer)
        return {
            "stop": lambda: leave_at(full, x, x_lens, layers),
            "truncated": lambda: leave_at(models[layer], x, x_lens, layers),
            "all": lambda: run_all(full, x, x_lens),
        }

    calls: dict[int, dict[str, int]] = {}
    for layer in exits:  # these count, and warm up; calls depend on no length, so the first second is enough
        calls[layer] = {}
        x, x_lens = batches[0]
        for name, run in runs(layer, x[:, :FRAMES_PER_SECOND], x_lens.clamp(max=FRAMES_PER_SECOND)).items():
            with counted(full if name != "truncated" else models[layer]) as tally:
                run()
            calls[layer][name] = len(tally)
    to_truncated: dict[int, list[float]] = {layer: [] for layer in exits}
    to_all: dict[int, list[float]] = {layer: [] for layer in exits}
    for turn in tqdm(range(rounds), desc=f"batches of {len(batches[0][1])}"):
        for layer in exits:
            seconds = in_turn(runs(layer, *batches[turn % len(batches)]), backwards=turn % 2 == 1)
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
    """A batch whose utterances leave at different exits; against all to the last one, and each by itself to its own."""
    utterances = len(x)
    exits = torch.tensor(model.encoder.exit_layers)
    layers = exits[torch.randint(0, len(exits), (utterances,), generator=torch.Generator().manual_seed(2))]
    last = torch.full_like(layers, int(exits[-1]))
    alone = cut_up(x, x_lens, 1)

    def one_by_one() -> None:
        for (one, length), layer in zip(alone, layers):
            leave_at(model, one, length, layer.view(1))

    runs: dict[str, Callable[[], None]] = {
        "shrinking": lambda: leave_at(model, x, x_lens, layers),
        "all": lambda: leave_at(model, x, x_lens, last),
        "one by one": one_by_one,
    }
    frames = {}
    for name, run in runs.items():
        with counted(model) as tally:
            run()
        frames[name] = sum(tally)
    turns = [in_turn(runs, backwards=turn % 2 == 1) for turn in tqdm(range(rounds), desc="mixed")]
    lines = [
        f"A batch of {utterances} that leave after layers {', '.join(map(str, layers.tolist()))}.",
        "Frames are those that Conformer layers see, padding included.",
        "",
        "| the shrinking batch against | time | frames |",
        "| --- | ---: | ---: |",
    ]
    for name, told in (("all", "all to the last exit"), ("one by one", "each by itself to its exit, without padding")):
        ratio = median(seconds["shrinking"] / seconds[name] for seconds in turns)
        lines.append(f"| {told} | {ratio:.3f} | {frames['shrinking'] / frames[name]:.3f} |")
    return lines


def cut_up(x: Tensor, x_lens: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The batch as batches of `size`, each with its own padding only."""
    parts = zip(x.split(size), x_lens.split(size))
    return [(part[:, : int(lengths.max())].contiguous(), lengths) for part, lengths in parts]


def in_turn(runs: dict[str, Callable[[], None]], backwards: bool) -> dict[str, float]:
    """Seconds of each; every other turn backwards, so that none always comes first."""
    seconds = {}
    for name in reversed(runs) if backwards else runs:
        started = time.perf_counter()
        runs[name]()
        seconds[name] = time.perf_counter() - started
    return seconds


@contextmanager
def counted(model: AsrModel) -> Iterator[list[int]]:
    """The frames, padding included, that each call of a Conformer layer saw."""
    tally: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, inputs, __: tally.append(inputs[0].size(0) * inputs[0].size(1)))
        for module in model.encoder.modules()
        if isinstance(module, ConformerLayer)
    ]
    try:
        yield tally
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
