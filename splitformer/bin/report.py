"""Write the tables and plots of all runs of a corpus: RESULTS.md, *.png and results/*.json."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.provenance import command_line
from splitformer.report.plots import plot_all
from splitformer.report.render import render
from splitformer.report.results import Results, load_published
from splitformer.report.runs import gather, load_runs, with_committed

REPO_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """Write the tables and plots of all runs of a corpus: RESULTS.md, *.png and results/*.json.

    An experiment that was removed keeps its file in results/, and so its place in the tables; remove that file too to
    leave it out.
    """

    corpus: str
    """name of the corpus, as given to decode"""
    exp_root: Path
    """folder of experiments, whose records are read: */decode/*.json, */early_exit/*.json and */training.jsonl"""
    output_dir: Path | None = None
    """folder to write to (default: the exp root)"""
    committed: Path | None = None
    """folder of the committed results, such as egs/CORPUS, to show beside your own runs"""
    publish: Path | None = None
    """write to this folder of committed results, such as egs/CORPUS, instead of --output-dir"""
    dev_sets: tuple[str, ...] = ()
    """sets on which choices are made; all other sets are test sets"""
    published: Path | None = None
    """TOML file with WERs that others published on the same test sets"""


def run(options: Options) -> None:
    if options.publish and (options.output_dir or options.committed):
        raise UserError("--publish names the folder to write to: leave --output-dir and --committed out")
    output = options.publish or options.output_dir or options.exp_root
    written = gather(options.exp_root, output / "results", options.corpus)
    runs = load_runs(output / "results", options.corpus)
    if options.committed:
        runs = with_committed(runs, load_runs(options.committed / "results", options.corpus))
    if not runs:
        raise UserError(f"no results in {options.exp_root} or {output / 'results'}: train and decode a system first")
    results = Results(options.corpus, runs, options.dev_sets)
    # figures with a notice are not those of the corpus: nothing that others published may stand beside them
    published = load_published(options.published) if options.published and not results.notices else []
    plots = plot_all(results, published, output)
    report = output / "RESULTS.md"
    with atomic_write(report) as file:
        file.write(render(results, published, plots, command_line(REPO_ROOT)))
    for path in (*written, *(output / name for name in plots.values()), report):
        print(path)


if __name__ == "__main__":
    sys.exit(command(run))
