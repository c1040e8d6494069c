"""Gather the records of all experiments of a corpus and write its RESULTS.md with plots beside it.

    python -m splitformer.bin.report --corpus NAME --exp-root egs/NAME/exp --results-dir egs/NAME/results \
        --output egs/NAME/RESULTS.md --dev-sets dev [--published egs/NAME/published.toml]

Experiments that are gone keep their file in the results folder and their place in the tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from splitformer.files import atomic_write
from splitformer.provenance import command_line
from splitformer.report.plots import plot_all
from splitformer.report.render import render
from splitformer.report.results import Results, load_published
from splitformer.report.runs import gather, load_runs

REPO_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="its name, as given to decode")
    parser.add_argument("--exp-root", type=Path, required=True, help="folder of experiments: */decode/*.json")
    parser.add_argument(
        "--results-dir", type=Path, required=True, help="for one <system>-seed<seed>.json a run"
    )
    parser.add_argument("--output", type=Path, required=True, help="RESULTS.md; plots are written beside it")
    parser.add_argument(
        "--dev-sets", nargs="*", default=[], help="sets on which choices are made; others are tests"
    )
    parser.add_argument(
        "--published", type=Path, help="TOML with the figures of others on the same test sets"
    )
    args = parser.parse_args()

    try:
        written = gather(args.exp_root, args.results_dir, args.corpus)
        results = Results(args.corpus, load_runs(args.results_dir, args.corpus), args.dev_sets)
        published = load_published(args.published) if args.published else []
        plots = plot_all(results, published, args.output.parent)
        with atomic_write(args.output) as file:
            file.write(render(results, published, plots, command_line(REPO_ROOT)))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    for path in (*written, *(args.output.parent / name for name in plots.values()), args.output):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
