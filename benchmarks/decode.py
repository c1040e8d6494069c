"""Measure the real-time factor of encoder and search at each exit, for each method, on one thread.

    python -m benchmarks.decode --checkpoint EXP/averaged.pt --cuts CUTS --lang-dir LANG --output TABLES.md

Methods run with their default weights, which change the time little. Of each batch the fastest of --rounds runs counts,
because other work on the machine slows some of them. Compare shares and ratios within a table; absolute times are those
of the machine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from splitformer.cli import command
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.decoding.decode import Decoded, decode_cuts
from splitformer.decoding.loading import load_for_decoding
from splitformer.decoding.methods import METHODS, methods_of
from splitformer.decoding.searches import make_methods
from splitformer.files import atomic_write
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    """Measure the real-time factor of encoder and search at each exit, for each method, on one thread."""

    checkpoint: Path
    cuts: Path
    lang_dir: Path
    methods: tuple[str, ...] = ()
    """search methods (default: all of the model's heads)"""
    batch_sizes: tuple[int, ...] = (1, 16)
    """utterances in a batch"""
    utterances: int = 32
    """take the first utterances of the cuts"""
    rounds: int = 3
    """runs of each batch, of which the fastest counts"""
    output: Path | None = None
    """write the tables there as well"""


def run(options: Options) -> None:
    torch.set_num_threads(1)
    model, config, _, tokenizer = load_for_decoding(options.checkpoint, options.lang_dir, CPU)
    heads = config.model.heads
    names = list(options.methods) or [method.name for method in METHODS.values() if method.head in heads]
    names = [method.name for method in methods_of(names, heads)]
    methods = make_methods(names, options.lang_dir, tokenizer.vocab_size, CPU)
    layers = config.model.exit_layers
    options_of = {(layer, method.name): [method.default] for layer in layers for method in methods}

    text = [f"One thread, {options.utterances} utterances; made by", "", f"    {command_line(ROOT)}", ""]
    for size in options.batch_sizes:
        cuts = load_cuts([options.cuts]).subset(first=options.utterances)
        total: dict[tuple[int, str], Decoded] = {}
        for batch in tqdm(list(evaluation_batches(cuts, tokenizer, None, max_cuts=size)), desc=f"batches of {size}"):
            rounds = [
                decode_cuts(model, [batch], methods, options_of, tokenizer.decode, CPU) for _ in range(options.rounds)
            ]
            for layer, name, weights in rounds[0]:
                runs = [each[layer, name, weights] for each in rounds]
                entry = total.setdefault((layer, name), Decoded())
                entry.encoder_seconds += min(each.encoder_seconds for each in runs)
                entry.search_seconds += min(each.search_seconds for each in runs)
                entry.audio_seconds += batch.seconds
        text += [f"## Batches of {size}", "", *table(total, layers, names), ""]
    print("\n".join(text))
    if options.output:
        with atomic_write(options.output) as file:
            file.write("# Real-time factor of decoding\n\n" + "\n".join(text))


def table(total: dict[tuple[int, str], Decoded], layers: tuple[int, ...], names: list[str]) -> list[str]:
    """Return a table with exits as rows: the encoder's real-time factor, and each search's with its share of both."""
    lines = ["| layer | encoder | " + " | ".join(names) + " |", "|---:|---:|" + "---:|" * len(names)]
    for layer in layers:
        encoder = total[layer, names[0]]
        cells = [f"{layer}", f"{encoder.encoder_seconds / encoder.audio_seconds:.4f}"]
        for name in names:
            entry = total[layer, name]
            share = entry.search_seconds / (entry.encoder_seconds + entry.search_seconds)
            cells.append(f"{entry.search_seconds / entry.audio_seconds:.4f} ({100 * share:.0f} %)")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "Columns of methods: the search alone, and in brackets its share of encoder and search."]


if __name__ == "__main__":
    sys.exit(command(run))
