"""The plots of a report: small PNG files with the same bytes for the same results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from splitformer.early_exit.names import DEFAULT
from splitformer.files import atomic_write
from splitformer.report.early_exit import FIXED, ORACLE, ordered_policies, tradeoffs_by_set
from splitformer.report.records import DecodeRecord, TradeoffPoint, TradeoffRecord
from splitformer.report.results import Published, Results
from splitformer.report.runs import Run
from splitformer.report.tables import mean

_COLOURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is grey, the colour of the oracle


def plot_all(results: Results, published: Sequence[Published], folder: str | Path) -> dict[str, str]:
    """Draw WER against cost; and, for every system with runs that are not committed, its training and exit policies.

    Returns:
      {title: file name in `folder`}.
    """
    figures: dict[str, tuple[str, Figure]] = {}
    if results.test_sets:
        layers, macs = "encoder layers", "10⁹ multiply-accumulates per second of audio"
        figure = _wer_plot(results, published, layers, lambda record: record.exit_layer)
        figures["WER against layers"] = ("wer-layers.png", figure)
        figure = _wer_plot(results, [], macs, lambda record: record.macs_per_second / 1e9)
        figures["WER against multiply-accumulates"] = ("wer-macs.png", figure)
    for system in results.systems:
        runs = [run for run in results.runs_of(system) if not run.committed]
        trained = [run for run in runs if run.training]
        if trained:
            figure = _training_plot(trained[0], results.label(system))
            figures[f"Training of {system}"] = (f"training-{system}.png", figure)
        own = [r for group in tradeoffs_by_set(results, system) for r in group if r.seed in {run.seed for run in runs}]
        if own:
            figure = _tradeoff_plot(own[0], results.label(system))
            figures[f"Dynamic exits of {system}"] = (f"early-exit-{system}.png", figure)
    for name, figure in figures.values():
        FigureCanvasAgg(figure)
        if results.notices:
            figure.suptitle("\n".join(results.notices), fontsize=8)
        figure.tight_layout()
        with atomic_write(Path(folder) / name, "wb") as file:  # without the version of matplotlib
            figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
    return {title: name for title, (name, _) in figures.items()}


def _wer_plot(
    results: Results, published: Sequence[Published], label: str, cost: Callable[[DecodeRecord], float]
) -> Figure:
    """Draw a panel per test set; a system is a line through its exits, with bars from the best to the worst seed.

    Each system is decoded by the method chosen on dev, or by its first method if there is no dev set.
    """
    figure = Figure(figsize=(0.9 + 4.6 * len(results.test_sets), 3.8))
    axes = figure.subplots(1, len(results.test_sets), squeeze=False)[0]
    for axis, test_set in zip(axes, results.test_sets):
        for number, system in enumerate(results.systems):
            method = results.chosen_method(system) or results.methods(system)[0]
            exits = [results.records(system, layer, test_set, method) for layer in results.layers(system)]
            exits = [records for records in exits if records]
            if exits:
                wers = [[record.wer for record in records] for records in exits]
                means = [mean(each) for each in wers]
                bars = [m - min(each) for m, each in zip(means, wers)], [max(each) - m for m, each in zip(means, wers)]
                axis.errorbar(
                    [cost(records[0]) for records in exits], means, yerr=bars, marker="o", markersize=4, capsize=2,
                    color=f"C{number % 10}", label=f"{results.label(system)}, {method}",
                )  # fmt: skip
        for number, each in enumerate(published):
            points = [(layer, wers[test_set]) for layer, wers in each.wer_per_exit.items() if test_set in wers]
            if points:
                axis.plot(
                    *zip(*points), linestyle="--", marker="x", markersize=4, color=str(0.2 + 0.25 * (number % 3)),
                    label=f"{each.name} (published)",
                )  # fmt: skip
        _finish(axis, test_set, label, "WER (%)")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    return figure


def _training_plot(run: Run, name: str) -> Figure:
    """Draw dev loss and dev WER by epoch with a colour per exit; the WER of transducer heads is dotted."""
    figure = Figure(figsize=(8.8, 3.6))
    left, right = figure.subplots(1, 2)
    epochs = [record.epoch for record in run.training]
    train_loss = [record.train_loss for record in run.training]
    left.plot(epochs, train_loss, "k--", linewidth=1, label="training, mean over exits")
    layers = sorted(run.training[-1].train_loss_per_exit)
    for number, layer in enumerate(layers):
        colour = matplotlib.colormaps["viridis"](0.9 * number / max(len(layers) - 1, 1))
        loss = [record.dev_loss_per_exit.get(layer, math.nan) for record in run.training]
        wer = [record.dev_wer_per_exit.get(layer, math.nan) for record in run.training]
        left.plot(epochs, loss, linewidth=1.2, color=colour)
        right.plot(epochs, wer, linewidth=1.2, color=colour, label=f"layer {layer}")
        if any(record.dev_transducer_wer_per_exit for record in run.training):
            wer = [record.dev_transducer_wer_per_exit.get(layer, math.nan) for record in run.training]
            dotted = None if number else "dotted: transducer"
            right.plot(epochs, wer, linewidth=1.2, color=colour, linestyle=":", label=dotted)
    _finish(left, f"{name}, seed {run.seed}: dev loss", "epoch", "CTC loss per token")
    _finish(right, f"{name}, seed {run.seed}: dev WER", "epoch", "WER (%), greedy search")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    right.set_ylim(0, 105)
    right.legend(fontsize=8)
    return figure


def _tradeoff_plot(record: TradeoffRecord, name: str) -> Figure:
    """Draw WER against three costs: the fixed exits with 95 % intervals, the oracle, and a line per policy.

    A line joins a policy's settings in the order of their cost. The recipe's policy has its interval as a band.
    """
    figure = Figure(figsize=(12.6, 3.6))
    policies = [policy for policy in ordered_policies(p.policy for p in record.points) if policy not in (FIXED, ORACLE)]
    first_wer = max((p.wer for p in record.points if p.policy == FIXED), default=record.last_wer)
    panels: tuple[tuple[str, float, Callable[[TradeoffPoint], float]], ...] = (
        ("mean encoder layers", record.exit_layers[-1], lambda p: p.layers),
        ("10⁹ MACs per second of audio", record.last_macs_per_second / 1e9, lambda p: p.macs_per_second / 1e9),
        ("real-time factor", record.last_rtf, lambda p: p.rtf),
    )
    axes = figure.subplots(1, len(panels))
    for axis, (label, last, cost) in zip(axes, panels):
        for number, policy in enumerate(policies):
            points = _by_cost(record, policy, cost)
            x, colour = [cost(p) for p in points], _COLOURS[number % len(_COLOURS)]
            axis.plot(x, [p.wer for p in points], marker=".", markersize=3, linewidth=1, color=colour, label=policy)
            if policy == DEFAULT:
                low, high = [p.wer_low for p in points], [p.wer_high for p in points]
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        bound = _by_cost(record, ORACLE, cost)
        if bound:
            axis.plot([cost(p) for p in bound], [p.wer for p in bound], ".:", color="0.5", label=ORACLE)
        fixed = _by_cost(record, FIXED, cost)
        bars = [max(p.wer - p.wer_low, 0) for p in fixed], [max(p.wer_high - p.wer, 0) for p in fixed]
        axis.errorbar(
            [cost(p) for p in fixed], [p.wer for p in fixed], yerr=bars, fmt="ko-",
            markersize=4, linewidth=1.2, elinewidth=0.8, capsize=2, label="fixed exits",
        )  # fmt: skip
        _finish(axis, f"{name}, seed {record.seed}: {record.test_set}, {record.method}", label, "WER (%)")
        axis.title.set_fontsize(9)
        # n-best lists may take more time than the layers they save: at most half as much again is shown
        highest = max((cost(p) for p in record.points), default=last)
        axis.set_xlim(0, 1.03 * max(last, min(highest, 1.5 * last)))
        axis.set_ylim(0, 1.1 * max(first_wer, 1e-3))
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
    return figure


def _by_cost(record: TradeoffRecord, policy: str, cost: Callable[[TradeoffPoint], float]) -> list[TradeoffPoint]:
    return sorted((point for point in record.points if point.policy == policy), key=lambda p: (cost(p), p.wer))


def _finish(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
