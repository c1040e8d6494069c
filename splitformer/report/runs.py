"""Runs: all records of one system trained with one seed, gathered from an experiment or read from a results file.

A results file, `<system>-seed<seed>.json`, is small enough to be committed. Reports are made from these files alone, so
that a report can be regenerated after the experiments are gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json
from splitformer.report.records import (
    DecodeRecord,
    EarlyExitRecord,
    EpochRecord,
    Record,
    TradeoffRecord,
    read_training_log,
)


@dataclass(frozen=True)
class Run:
    """All records of one system trained with one seed."""

    decode: tuple[DecodeRecord, ...]
    training: tuple[EpochRecord, ...]
    tradeoffs: tuple[TradeoffRecord, ...] = ()
    early_exits: tuple[EarlyExitRecord, ...] = ()
    committed: bool = False
    """whether it is shown for comparison, from the results that are committed to the repository"""

    @property
    def system(self) -> str:
        return self.decode[0].system

    @property
    def seed(self) -> int:
        return self.decode[0].seed

    @property
    def last_exit(self) -> DecodeRecord:
        """A record of the deepest exit, which has the cost of the whole encoder."""
        return max(self.decode, key=lambda record: record.exit_layer)


def model_config(record: DecodeRecord) -> dict[str, Any]:
    """Return the configuration that the model was trained with."""
    return {name: section for name, section in record.config.items() if name != "decoding"}


# ---- from experiments to runs


def gather(exp_root: str | Path, results_dir: str | Path, corpus: str) -> list[Path]:
    """Write the results file of every decoded experiment under `exp_root` to `results_dir`.

    Returns:
      the files written, sorted by the experiment's name.
    Raises:
      UserError: an experiment has records of another corpus or of several models, or two are the same run.
    """
    origin: dict[Path, Path] = {}
    for decode_dir in sorted(Path(exp_root).glob("*/decode")):
        exp_dir = decode_dir.parent
        decode = tuple(DecodeRecord.load(path) for path in sorted(decode_dir.glob("*.json")))
        if not decode:
            continue
        curves = sorted((exp_dir / "early_exit").glob("tradeoff-*.json"))
        others = sorted(set((exp_dir / "early_exit").glob("*.json")) - set(curves))
        run = Run(
            decode,
            tuple(read_training_log(exp_dir / "training.jsonl")),
            tuple(TradeoffRecord.load(path) for path in curves),
            tuple(EarlyExitRecord.load(path) for path in others),
        )
        _check_run(run, corpus, exp_dir)
        path = Path(results_dir) / f"{run.system}-seed{run.seed}.json"
        if path in origin:
            raise UserError(
                f"{origin[path]} and {exp_dir} are both {run.system} with seed {run.seed}; a report shows one of them: "
                f"move the other out of {exp_root}"
            )
        origin[path] = exp_dir
        save_run(run, path)
    return list(origin)


def _check_run(run: Run, corpus: str, source: Path) -> None:
    """Raises UserError unless all records are of `corpus` and of one model."""
    for name in ("corpus", "system", "seed"):
        values = {getattr(record, name) for record in (*run.decode, *run.tradeoffs, *run.early_exits)}
        if len(values) > 1:
            raise UserError(f"{source} holds records of {name} {sorted(values)}; remove the old ones and decode again")
    if any(model_config(record) != model_config(run.decode[0]) for record in run.decode):
        raise UserError(f"{source} holds records of different configurations; remove the old ones and decode again")
    if run.decode[0].corpus != corpus:
        raise UserError(f"{source} holds records of corpus {run.decode[0].corpus}, and the report is on {corpus}")


def load_runs(results_dir: str | Path, corpus: str) -> list[Run]:
    """Return the runs of a folder of results files, sorted by system and seed.

    Raises:
      UserError: a file is damaged or of another corpus.
    """
    runs = []
    for path in Path(results_dir).glob("*.json"):
        run = load_run(path)
        _check_run(run, corpus, path)
        runs.append(run)
    return sorted(runs, key=lambda run: (run.system, run.seed))


def with_committed(own: Iterable[Run], committed: Iterable[Run]) -> list[Run]:
    """Return the runs of both, sorted by system and seed; an own run takes the place of a committed one."""
    runs = {(run.system, run.seed): replace(run, committed=True) for run in committed}
    runs |= {(run.system, run.seed): run for run in own}
    return [runs[key] for key in sorted(runs)]


# ---- results files


_CURVES = ("points", "savings", "budgets")


def save_run(run: Run, path: str | Path) -> None:
    """Write a results file: lists of records as tables, one row a line, with floats of 5 significant digits."""
    decode = [
        {**_values(replace(record, config={})), "decoding": record.config.get("decoding", {})} for record in run.decode
    ]
    tradeoffs = [_values(record) for record in run.tradeoffs]
    content = {
        "config": model_config(run.decode[0]),
        "decode": _table(decode),
        "training": _table([_values(record) for record in run.training]),
        "tradeoffs": [record | {name: _table(record[name]) for name in _CURVES} for record in tradeoffs],
        "early_exits": [_values(record) for record in run.early_exits],
    }
    with atomic_write(path) as file:
        file.write(_text(content) + "\n")


def load_run(path: str | Path) -> Run:
    """Read what `save_run` wrote.

    Raises:
      UserError: the file is something else; the message names it.
    """
    content, source = read_json(path), str(path)
    parts = {"config", "decode", "training", "tradeoffs", "early_exits"}
    if not isinstance(content, dict) or content.keys() != parts or not content["decode"].get("rows"):
        raise UserError(f"{path} is not a results file of this version; remove it and run the report again")
    decode = []
    for row in _records(content["decode"], source):
        options = row.pop("decoding", {})
        row["config"] = content["config"] | ({"decoding": options} if options else {})
        decode.append(DecodeRecord.from_dict(row, source))
    for record in content["tradeoffs"]:
        record.update({name: _records(record[name], f"{source}, {name}") for name in _CURVES if name in record})
    return Run(
        tuple(decode),
        tuple(EpochRecord.from_dict(row, source) for row in _records(content["training"], source)),
        tuple(TradeoffRecord.from_dict(record, source) for record in content["tradeoffs"]),
        tuple(EarlyExitRecord.from_dict(record, source) for record in content["early_exits"]),
    )


def _values(record: Record) -> dict[str, Any]:
    """Return the fields of a record as JSON has them, with floats of 5 significant digits."""
    values = json.loads(json.dumps(asdict(record)), parse_float=lambda text: float(f"{float(text):.5g}"))
    return dict(values)


def _table(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return records with the same keys as a table: values that all of them share once, then a row per record."""
    first = records[0] if records else {}
    shared = {name: value for name, value in first.items() if all(record[name] == value for record in records)}
    columns = [name for name in first if name not in shared]
    return {"shared": shared, "columns": columns, "rows": [[record[name] for name in columns] for record in records]}


def _records(table: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Return the records of a table."""
    keys = {"shared", "columns", "rows"}
    if table.keys() != keys or any(len(row) != len(table["columns"]) for row in table["rows"]):
        raise UserError(f"{source}: not a table of shared values, columns, and rows with a value for each column")
    return [{**table["shared"], **dict(zip(table["columns"], row))} for row in table["rows"]]


def _text(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each key of an object, and for each element of a list of objects or of rows."""
    if isinstance(value, dict) and value:
        lines, brackets = [f"{json.dumps(name)}: {_text(each, indent + ' ')}" for name, each in value.items()], "{}"
    elif isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        rows = isinstance(value[0], list)
        lines = [json.dumps(each, ensure_ascii=False) if rows else _text(each, indent + " ") for each in value]
        brackets = "[]"
    else:
        return json.dumps(value, ensure_ascii=False)
    return f"{brackets[0]}\n" + ",\n".join(f"{indent} {line}" for line in lines) + f"\n{indent}{brackets[1]}"
