"""From results to RESULTS.md: reads published figures, aggregates over seeds, renders tables.

`render` needs the files that `splitformer.report.runs.gather` wrote and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from splitformer.report.early_exit import dynamic_exits, dynamic_exits_summary, dynamic_exits_title
from splitformer.report.runs import Run, model_config
from splitformer.report.tables import commands, markdown_table, mean, percent, spread

if sys.version_info >= (3, 11):
    pass
else:
    pass
from splitformer.report.results import Published, Results

# ---- RESULTS.md


def render(results: Results, published: Sequence[Published], plots: Mapping[str, str], command: str) -> str:
    """RESULTS.md as text; the same for the same arguments.

    Args:
      results: all runs of a corpus.
      published: figures of others, shown beside ours.
      plots: {title: file name relative to RESULTS.md}.
      command: what makes this file, shown in it.
    """
    own_plots = {name for system in results.systems for name in (training_title(system), dynamic_exits_title(system))}
    parts = [
        f"# Results: {results.corpus}",
        f"Written by `{command}` from `results/*.json`; do not edit.",
        "WER is in percent; over several seeds it is the mean (lowest–highest). An exit is named by the "
        "encoder layer that it follows.",
        _sets(results),
        "## Summary",
        _summary(results),
        *(_unlike_configurations(results.runs_of(system)) for system in results.systems),
        *(f"![{title}]({name})" for title, name in plots.items() if title not in own_plots),
        *dynamic_exits_summary(results.runs, results.dev_sets),
        "## Side by side",
        "WER at every exit on the test sets, one table per decoding method.",
        *(_side_by_side(results, published, method) for method in results.methods()),
        _published(published),
    ]
    for system in results.systems:
        parts += _system(results, system)
        parts += [f"![{title}]({name})" for title, name in plots.items() if title == training_title(system)]
        parts += dynamic_exits(results.runs_of(system), results.dev_sets, plots.get(dynamic_exits_title(system)))
    return "\n\n".join(part for part in parts if part) + "\n"


def training_title(system: str) -> str:
    """The title, in `render`'s `plots`, of a system's training curves."""
    return f"Training of {system}"


def _sets(results: Results) -> str:
    rows = {}
    for run in results.runs:
        for r in run.decode:
            use = "choices" if r.test_set in results.dev_sets else "results"
            rows[r.test_set] = (use, str(r.num_utterances), str(r.ref_words), f"{r.audio_seconds / 60:.1f}")
    header = ("set", "used for", "utterances", "words", "minutes of audio")
    return markdown_table(header, [(name, *rows[name]) for name in sorted(rows)], left=2)


def _summary(results: Results) -> str:
    """One row per system, with the method chosen on dev; without a dev set, one per system and method."""
    if results.dev_sets:
        rule = (
            "Everything is chosen on the dev set: for each system the decoding method with the lowest dev "
            "WER at the last exit, and among the systems (in bold) the one with the lowest such WER."
        )
    else:
        rule = "No dev set was decoded, so nothing is chosen: every decoding method is listed."
    chosen = {system: results.chosen_method(system) for system in results.systems}
    dev = {s: results.dev_wer(s, method) for s, method in chosen.items() if method is not None}
    best = min((s for s in dev if dev[s] is not None), key=lambda s: dev[s], default=None)

    header = [
        "system",
        "parameters (M)",
        "seeds",
        "training",
        "decoding",
        *(["dev, last exit"] if dev else []),
    ]
    for test_set in results.test_sets:
        header += [f"{test_set}, first exit", f"{test_set}, last exit"]
    rows = []
    for system in results.systems:
        runs, layers = results.runs_of(system), results.layers(system)
        method = chosen[system]
        for shown in results.methods(system) if method is None else [method]:
            # a head's own: of a system with two, the joiner is larger than the CTC layer
            last = next(r for r in runs[0].decode if (r.exit_layer, r.method) == (layers[-1], shown))
            row = [f"**{system}**" if system == best else system, _parameters(last.parameters)]
            row += [", ".join(str(run.seed) for run in runs), _training_time(runs), shown]
            if dev:
                row += [percent(dev[system]) if system in dev else "–"]
            for test_set in results.test_sets:
                for layer in (layers[0], layers[-1]):
                    row += [spread(results.wers(system, layer, test_set, shown), percent, len(runs))]
            rows.append(row)
    return f"{rule}\n\n{markdown_table(header, rows)}"


def _unlike_configurations(runs: Sequence[Run]) -> str:
    """A warning where the seeds of a system were trained with different configurations."""
    values: dict[str, dict[str, list[int]]] = {}
    for run in runs:
        for section, table in model_config(run.decode[0]).items():
            for key, value in table.items():
                values.setdefault(f"{section}.{key}", {}).setdefault(json.dumps(value), []).append(run.seed)
    differences = [
        f"{name} is " + ", ".join(f"{value} (seed {', '.join(map(str, seeds))})" for value, seeds in by_value.items())
        for name, by_value in values.items()
        if len(by_value) > 1
    ]
    if not differences:
        return ""
    return (
        f"**The seeds of {runs[0].system} differ in more than the seed**, so their mean is of unlike things: "
        f"{'; '.join(differences)}."
    )


def _side_by_side(results: Results, published: Sequence[Published], method: str) -> str:
    with_exits = [each for each in published if each.wer_per_exit]
    systems = [system for system in results.systems if method in results.methods(system)]
    header, columns = ["layer"], []
    for test_set in results.test_sets:
        header += [f"{test_set}<br>{system}" for system in systems]
        columns += [
            {
                layer: spread(results.wers(system, layer, test_set, method), percent, len(results.runs_of(system)))
                for layer in results.layers(system)
            }
            for system in systems
        ]
        header += [f"{test_set}<br>{each.name} (published)" for each in with_exits]
        columns += [
            {layer: f"{wers[test_set]:g}" for layer, wers in each.wer_per_exit.items() if test_set in wers}
            for each in with_exits
        ]
    layers = sorted({layer for column in columns for layer in column})
    rows = [[str(layer), *(column.get(layer, "–") for column in columns)] for layer in layers]
    return f"### {method}\n\n{markdown_table(header, rows)}"


def _published(published: Sequence[Published]) -> str:
    """Figures of systems without exits, and the sources of all."""
    if not published:
        return ""
    parts = ["### Published on the same test sets"]
    flat = [each for each in published if each.wer]
    if flat:
        sets = sorted({test_set for each in flat for test_set in each.wer})
        rows = [[each.name, *(f"{each.wer[s]:g}" if s in each.wer else "–" for s in sets)] for each in flat]
        parts.append(markdown_table(["system", *sets], rows))
    sources = [f"- {p.name}: [{p.source}]({p.url}){'. ' + p.note if p.note else ''}" for p in published]
    return "\n\n".join([*parts, "\n".join(sources)])


def _system(results: Results, system: str) -> list[str]:
    runs = results.runs_of(system)
    dev_sets = [dev_set for dev_set in results.dev_sets if any(dev_set in _sets_of(run) for run in runs)]
    parts = [f"## {system}", _run_table(runs)]
    if results.test_sets:
        parts += ["Cost and WER on the test sets:", _wer_table(results, system, results.test_sets, cost=True)]
    if dev_sets:
        parts += ["WER on the dev set, on which choices are made:", _wer_table(results, system, dev_sets)]
    parts += [
        "Real-time factor: time of decoding up to the exit over audio time.",
        _rtf_table(results, system),
    ]
    options = [line for run in runs for line in _decoding_options(run)]
    if options:
        parts += ["Options of decoding:", "\n".join(options)]
    fallbacks = [
        f"- {r.test_set}, layer {r.exit_layer}, {r.method}, seed {r.seed}: {r.fallback_utterances} of "
        f"{r.num_utterances} utterances"
        for run in runs
        for r in sorted(run.decode, key=lambda r: (r.test_set, r.method, r.exit_layer))
        if r.fallback_utterances
    ]
    if fallbacks:
        parts += ["Utterances whose lattice came out empty, decoded greedily instead:", "\n".join(fallbacks)]
    return [*parts, commands([record for run in runs for record in run.decode])]


def _decoding_options(run: Run) -> list[str]:
    """A line per method; what differs from exit to exit, such as a weight chosen on dev, is listed by layer."""
    lines = []
    for method in sorted({record.method for record in run.decode}):
        by_option: dict[str, dict[int, str]] = {}
        for record in sorted(run.decode, key=lambda record: record.exit_layer):
            if record.method == method:
                for name, value in record.config.get("decoding", {}).items():
                    by_option.setdefault(name, {})[record.exit_layer] = f"{value}"
        told = []
        for name, by_layer in sorted(by_option.items()):
            values = list(by_layer.values())
            if len(set(values)) == 1:
                told.append(f"{name} {values[0]}")
            else:
                told.append(f"{name} {', '.join(values)} at layers {', '.join(map(str, by_layer))}")
        if told:
            lines.append(f"- {method}, seed {run.seed}: {'; '.join(told)}")
    return lines


def _sets_of(run: Run) -> set[str]:
    return {record.test_set for record in run.decode}


def _run_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        last = run.last_exit
        rows.append(
            [
                str(run.seed),
                f"{last.epoch}, the last {last.avg} averaged" if last.avg > 1 else str(last.epoch),
                f"{last.training_seconds / 60:.1f}",
                str(last.world_size),
                last.device,
                ", ".join(sorted({f"`{record.commit}`" for record in run.decode})),
                max(record.date for record in run.decode)[:10],
            ]
        )
    header = ["seed", "epochs", "training (min)", "processes", "device", "commit", "date"]
    return markdown_table(header, rows, left=2)


def _wer_table(results: Results, system: str, test_sets: Sequence[str], cost: bool = False) -> str:
    """Rows exits, columns sets and methods; with `cost` also parameters and MACs, of the cheapest head."""
    runs = results.runs_of(system)
    cells = [(test_set, method) for test_set in test_sets for method in results.methods(system)]
    header = ["layer", *(["parameters (M)", "10⁹ MACs per s of audio"] if cost else [])]
    header += [f"{test_set}<br>{method}" for test_set, method in cells]
    rows = []
    for layer in results.layers(system):
        row = [str(layer)]
        if cost:
            record = min((r for r in runs[0].decode if r.exit_layer == layer), key=lambda r: r.macs_per_second)
            row += [_parameters(record.parameters), f"{record.macs_per_second / 1e9:.3f}"]
        rows.append([*row, *(spread(results.wers(system, layer, s, m), percent, len(runs)) for s, m in cells)])
    return markdown_table(header, rows)


def _rtf_table(results: Results, system: str) -> str:
    """Rows exits, columns methods; over all sets, mean over seeds."""
    rows = []
    for layer in results.layers(system):
        row = [str(layer)]
        for method in results.methods(system):
            per_run = []
            for run in results.runs_of(system):
                own = [r for r in run.decode if (r.exit_layer, r.method) == (layer, method)]
                if own:
                    audio = sum(r.audio_seconds for r in own)
                    per_run.append(sum(r.rtf * r.audio_seconds for r in own) / audio)
            row.append(f"{mean(per_run):.4f}" if per_run else "–")
        rows.append(row)
    return markdown_table(["layer", *results.methods(system)], rows)


def _parameters(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _training_time(runs: Sequence[Run]) -> str:
    last = runs[0].last_exit
    processes = f" × {last.world_size} processes" if last.world_size > 1 else ""
    minutes = mean([run.last_exit.training_seconds for run in runs]) / 60
    return f"{minutes:.1f} min{processes}"
