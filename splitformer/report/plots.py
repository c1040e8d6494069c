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

from splitformer.files import atomic_write
from splitformer.report.early_exit import (
    FIXED,
    LEARNED,
    ORACLE,
    dynamic_exits_title,
    ordered_policies,
    ordered_tradeoffs,
)
from splitformer.report.records import TradeoffPoint, TradeoffRecord
from splitformer.report.render import training_title
from splitformer.report.results import Published, Results
from splitformer.report.runs import Run


def plot_all(results: Results, published: Sequence[Published], folder: str | Path) -> dict[str, str]:
    """Draw WER against layers and multiply-accumulates; of every system its training and its exit policies' curves.

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
        tradeoffs = ordered_tradeoffs(results.runs_of(system), results.dev_sets)
        if tradeoffs:
            plots[dynamic_exits_title(system)] = f"early-exit-{system}.png"
            _plot_tradeoff(tradeoffs[0], folder / f"early-exit-{system}.png")
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


_COLOURS = [f"C{number}" for number in range(10) if number != 7]  # C7 is grey, as the oracle is


def _plot_tradeoff(record: TradeoffRecord, path: Path) -> None:
    """WER against three costs: the fixed exits with 95 % intervals, the oracle, a line per policy.

    One policy alone has its interval as a band, so that the lines stay visible. A line joins a policy's settings in
    the order of their cost.
    """
    figure = Figure(figsize=(12.6, 3.6))
    policies = ordered_policies(point.policy for point in record.points)
    banded = _policy_with_band(record)
    first_wer = max((p.wer for p in record.points if p.policy == FIXED), default=record.last_wer)
    panels: tuple[tuple[str, float, Callable[[TradeoffPoint], float]], ...] = (
        ("encoder layers, mean", record.exit_layers[-1], lambda p: p.layers),
        ("10⁹ MACs per second of audio", record.last_macs_per_second / 1e9, lambda p: p.macs_per_second / 1e9),
        ("real-time factor", record.last_rtf, lambda p: p.rtf),
    )
    axes = figure.subplots(1, len(panels))
    for axis, (label, last, cost) in zip(axes, panels):
        for number, policy in enumerate(each for each in policies if each not in (FIXED, ORACLE)):
            points = _by_cost(record, policy, cost)
            x, colour = [cost(p) for p in points], _COLOURS[number % len(_COLOURS)]
            axis.plot(x, [p.wer for p in points], marker=".", markersize=3, linewidth=1, color=colour, label=policy)
            if policy == banded:
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
        _finish(axis, f"{record.system}, seed {record.seed}: {record.test_set}, {record.method}", label, "WER (%)")
        axis.title.set_fontsize(9)
        # n-best lists may cost more time than the layers they save: up to half as much again is shown
        dearest = max((cost(p) for p in record.points), default=last)
        axis.set_xlim(0, 1.03 * max(last, min(dearest, 1.5 * last)))
        axis.set_ylim(0, 1.1 * first_wer)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
    _save(figure, path)


def _by_cost(record: TradeoffRecord, policy: str, cost: Callable[[TradeoffPoint], float]) -> list[TradeoffPoint]:
    return sorted((point for point in record.points if point.policy == policy), key=lambda p: (cost(p), p.wer))


def _policy_with_band(record: TradeoffRecord) -> str | None:
    """The learned policy, else the one furthest below the fixed exits over all budgets."""
    if any(point.policy == LEARNED for point in record.points):
        return LEARNED
    differences: dict[str, list[float]] = {}
    for point in record.budgets:
        if point.policy not in (FIXED, ORACLE):
            differences.setdefault(point.policy, []).append(point.difference)
    return min(differences, key=lambda policy: sum(differences[policy]) / len(differences[policy]), default=None)


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
