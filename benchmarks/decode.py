"""Real-time factor per exit and method, and how it divides into encoder and search, so that a user can choose.

    python -m benchmarks.decode --checkpoint EXP/averaged.pt --cuts CUTS --lang-dir LANG --output TABLES.md

One thread. Each method runs with its default weights; those that are tuned change the time little. Absolute times are
the machine's; the shares, and the ratios within a table, are what to look at. Of each batch the fastest of --rounds
runs counts, because on a busy machine the others measure its other work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from splitformer.bin.decode import Decoded, decode_cuts
from splitformer.checkpoint import load_model
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.searches import METHODS, Weights, make_methods
from splitformer.files import atomic_write
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cuts", type=Path, required=True)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(default: all of the model's heads)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="utterances in a batch")
    parser.add_argument("--utterances", type=int, default=32, help="the first so many of the cuts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the tables there as well")
    args = parser.parse_args()

    torch.set_num_threads(1)
    model, _, _ = load_model(args.checkpoint)
    tokenizer = Tokenizer(args.lang_dir)
    names = args.methods or [name for name, head in METHODS.items() if head in model.heads]
    cpu = torch.device("cpu")
    methods = make_methods(names, args.lang_dir, tokenizer.vocab_size, cpu, Weights())
    options_of = {(layer, m.name): [m.default] for layer in model.encoder.exit_layers for m in methods}

    text = [f"One thread, {args.utterances} utterances; made by", "", f"    {command_line(ROOT)}", ""]
    for size in args.batch_sizes:
        cuts = load_cuts([args.cuts]).subset(first=args.utterances)
        total: dict[tuple[int, str], Decoded] = {}
        for batch in tqdm(list(evaluation_batches(cuts, tokenizer, None, max_cuts=size)), desc=f"batches of {size}"):
            rounds = [
                decode_cuts(model, [batch], methods, options_of, lambda tokens: [], cpu) for _ in range(args.rounds)
            ]
            for layer, name, options in rounds[0]:
                runs = [each[layer, name, options] for each in rounds]
                entry = total.setdefault((layer, name), Decoded())
                entry.encoder_seconds += min(run.encoder_seconds for run in runs)
                entry.search_seconds += min(run.search_seconds for run in runs)
                entry.audio_seconds += batch.seconds
        text += [f"## Batches of {size}", "", *table(total, model.encoder.exit_layers, names), ""]
    print("\n".join(text))
    if args.output:
        with atomic_write(args.output) as file:
            file.write("# Real-time factor of decoding\n\n" + "\n".join(text))


def table(total: dict[tuple[int, str], Decoded], layers: tuple[int, ...], names: list[str]) -> list[str]:
    """Rows exits, columns methods: the encoder's real-time factor, then each search's and its share of the whole."""
    lines = [
        "| layer | encoder | " + " | ".join(names) + " |",
        "|---:|---:|" + "---:|" * len(names),
    ]
    for layer in layers:
        encoder = total[layer, names[0]]
        cells = [f"{layer}", f"{encoder.encoder_seconds / encoder.audio_seconds:.4f}"]
        for name in names:
            entry = total[layer, name]
            share = entry.search_seconds / (entry.encoder_seconds + entry.search_seconds)
            cells.append(f"{entry.search_seconds / entry.audio_seconds:.4f} ({100 * share:.0f} %)")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Search beside the encoder's column; in brackets its share of both together."]
    return lines


if __name__ == "__main__":
    main()
