"""The plots of a report: small PNG files, the same bytes for the same results.

Tier: report, matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from splitformer.report import Published, Results, training_title
from splitformer.results import atomic_write
from splitformer.runs import Run


def plot_all(results: Results, published: Sequence[Published], folder: str | Path) -> dict[str, str]:
    """Draw WER against layers, WER against multiply-accumulates, and the training curves of every system.

    Returns:
      {title: file name in `folder`}, for `splitformer.report.render`.
    """
    folder = Path(folder)
    plots = {}
    if results.test_sets:
        plots["WER against layers"] = "wer-layers.png"
        _plot_wer(
            results,
            published,
            folder / "wer-layers.png",
            "encoder layers run",
            lambda record: record.exit_layer,
        )
        plots["WER against multiply-accumulates"] = "wer-macs.png"
        _plot_wer(
            results, [], folder / "wer-macs.png", "10⁹ multiply-accumulates per second of audio",
            lambda record: record.macs_per_second / 1e9,
        )  # fmt: skip
    for system in results.systems:
        run = next((run for run in results.runs_of(system) if run.training), None)
        if run is not None:
            plots[training_title(system)] = f"training-{system}.png"
            _plot_training(run, folder / f"training-{system}.png")
    return plots


def _plot_wer(
    results: Results, published: Sequence[Published], path: Path, label: str, cost: Callable[..., float]
) -> None:
    """One panel per test set; a system is a line through its exits, with bars from best to worst seed.

    Each system is decoded by the method chosen on dev, or greedily where there is none to choose on.
    """
    figure = Figure(figsize=(0.9 + 4.6 * len(results.test_sets), 3.8))
    axes = figure.subplots(1, len(results.test_sets), squeeze=False)[0]
    for axis, test_set in zip(axes, results.test_sets):
        for number, system in enumerate(results.systems):
            method = results.chosen_method(system) or results.methods(system)[0]
            points = []
            for layer in results.layers(system):
                records = results.records(system, layer, test_set, method)
                if records:
                    wers = [record.wer for record in records]
                    points.append((cost(records[0]), sum(wers) / len(wers), min(wers), max(wers)))
            if points:
                x, mean, low, high = zip(*points)
                below, above = [m - l for m, l in zip(mean, low)], [h - m for m, h in zip(mean, high)]
                axis.errorbar(
                    x,
                    mean,
                    yerr=(below, above),
                    marker="o",
                    markersize=4,
                    capsize=2,
                    color=f"C{number % 10}",
                    label=f"{system}, {method}",
                )
        for number, each in enumerate(published):
            points = [(layer, wers[test_set]) for layer, wers in each.wer_per_exit.items() if test_set in wers]
            if points:
                axis.plot(
                    *zip(*points),
                    linestyle="--",
                    marker="x",
                    markersize=4,
                    color=str(0.2 + 0.25 * (number % 3)),
                    label=f"{each.name} (published)",
                )
        _finish(axis, test_set, label, "WER (%)")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    _save(figure, path)


def _plot_training(run: Run, path: Path) -> None:
    """Dev loss and dev WER by epoch, a colour per exit, dotted a transducer's; dashed the mean training loss."""
    figure = Figure(figsize=(8.8, 3.6))
    left, right = figure.subplots(1, 2)
    epochs = [record.epoch for record in run.training]
    train = [record.train_loss for record in run.training]
    left.plot(epochs, train, "k--", linewidth=1, label="training, mean over exits")
    layers = sorted(run.training[-1].train_loss_per_exit)
    for number, layer in enumerate(layers):
        colour = matplotlib.colormaps["viridis"](0.9 * number / max(len(layers) - 1, 1))
        loss = [record.dev_loss_per_exit.get(layer, math.nan) for record in run.training]
        wer = [record.dev_wer_per_exit.get(layer, math.nan) for record in run.training]
        left.plot(epochs, loss, linewidth=1.2, color=colour)
        right.plot(epochs, wer, linewidth=1.2, color=colour, label=f"layer {layer}")
        if any(record.dev_transducer_wer_per_exit for record in run.training):
            wer = [record.dev_transducer_wer_per_exit.get(layer, math.nan) for record in run.training]
            right.plot(
                epochs, wer, linewidth=1.2, color=colour, linestyle=":", label=None if number else "dotted: transducer"
            )
    _finish(left, f"{run.system}, seed {run.seed}: dev loss", "epoch", "CTC loss per token")
    _finish(right, f"{run.system}, seed {run.seed}: dev WER", "epoch", "WER (%), greedy_search")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    right.set_ylim(0, 105)
    right.legend(fontsize=8)
    _save(figure, path)


def _finish(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, without the version of matplotlib in it."""
    FigureCanvasAgg(figure)
    figure.tight_layout()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
