"""A run's records: gathered from an experiment, kept as one small JSON file that can be committed.

A run is one system trained with one seed. `gather` turns `exp/<system>-seed<seed>/` into a file of results; tables
are made of those files alone, so that they can be made again where the experiments are gone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json
from splitformer.report.records import (
    BudgetPoint,
    DecodeRecord,
    EarlyExitRecord,
    EpochRecord,
    Saving,
    TradeoffPoint,
    TradeoffRecord,
    read_training_log,
)


class ReportError(UserError):
    """Records or published figures that no table can be made of; the message names them and the remedy."""


@dataclass(frozen=True)
class Run:
    """All records of one system trained with one seed.

    tradeoffs, early_exits: of exit policies, where any were tried.
    """

    decode: tuple[DecodeRecord, ...]
    training: tuple[EpochRecord, ...]
    tradeoffs: tuple[TradeoffRecord, ...] = ()
    early_exits: tuple[EarlyExitRecord, ...] = ()

    @property
    def system(self) -> str:
        return self.decode[0].system

    @property
    def seed(self) -> int:
        return self.decode[0].seed

    @property
    def last_exit(self) -> DecodeRecord:
        """A record of the exit that follows the most layers: it has the whole encoder's cost."""
        return max(self.decode, key=lambda record: record.exit_layer)


def gather(exp_root: str | Path, results_dir: str | Path, corpus: str) -> list[Path]:
    """Write `results_dir/<system>-seed<seed>.json` for every experiment under `exp_root` that was decoded.

    Returns:
      the files written, in the order of the experiments' names; none where `exp_root` does not exist.
    Raises:
      ReportError: records of another corpus, several models in one experiment, or one run in two experiments.
    """
    origin: dict[Path, Path] = {}
    for decode_dir in sorted(Path(exp_root).glob("*/decode")):
        exp_dir = decode_dir.parent
        records = [DecodeRecord.load(path) for path in sorted(decode_dir.glob("*.json"))]
        if not records:
            continue
        tradeoffs, early_exits = _read_early_exit(exp_dir / "early_exit")
        run = Run(tuple(records), tuple(read_training_log(exp_dir / "training.jsonl")), tradeoffs, early_exits)
        _check_run(run, corpus, exp_dir)
        path = Path(results_dir) / f"{run.system}-seed{run.seed}.json"
        if path in origin:
            raise ReportError(
                f"{origin[path]} and {exp_dir} are both {run.system} with seed {run.seed}; "
                "a table takes one: move the other out of the experiments' folder"
            )
        origin[path] = exp_dir
        save_run(run, path)
    return list(origin)


def _read_early_exit(folder: Path) -> tuple[tuple[TradeoffRecord, ...], tuple[EarlyExitRecord, ...]]:
    """The two kinds of records of a folder, told apart by the files' names; none where it does not exist."""
    paths = sorted(folder.glob("*.json"))
    curves = [path for path in paths if path.name.startswith("tradeoff-")]
    return (
        tuple(TradeoffRecord.load(path) for path in curves),
        tuple(EarlyExitRecord.load(path) for path in paths if path not in curves),
    )


def _check_run(run: Run, corpus: str, source: Path) -> None:
    """Raises ReportError unless all records are of `corpus` and of one model."""
    everything = (*run.decode, *run.tradeoffs, *run.early_exits)
    for name, records in (
        ("corpus", everything),
        ("system", everything),
        ("seed", everything),
        ("num_layers", run.decode),
    ):
        found = sorted({getattr(record, name) for record in records})
        if len(found) > 1:
            raise ReportError(f"{source} holds records of {name} {found}: {_REMEDY}")
    if any(model_config(record) != model_config(run.decode[0]) for record in run.decode):
        raise ReportError(f"{source} holds records of models that were configured differently: {_REMEDY}")
    if run.decode[0].corpus != corpus:
        raise ReportError(f"{source} holds records of corpus {run.decode[0].corpus}, and the report is on {corpus}")


_REMEDY = "remove the old ones and decode again"


def model_config(record: DecodeRecord) -> dict[str, Any]:
    """The configuration that the model was trained with."""
    return {name: section for name, section in record.config.items() if name != "decoding"}


def save_run(run: Run, path: str | Path) -> None:
    """Write a run: what all its decode records share once, then one record a line; floats of 5 digits.

    What exit policies did follows where there is any, without what the decode records share; the points of a curve are
    rows of values below the names of their fields.
    """
    records = [_rounded({**asdict(record), "config": None}) for record in run.decode]
    shared, own = _without_repetition(records)
    # sections of the configuration likewise: the model's are the same, the options of decoding are not
    shared["config"], own_configs = _without_repetition([record.config for record in run.decode])
    rows = [{**record, "config": config} if config else record for record, config in zip(own, own_configs)]
    training = [_rounded(asdict(epoch)) for epoch in run.training]
    with atomic_write(path) as file:
        file.write('{\n"shared": ' + json.dumps(shared, indent=1, sort_keys=True, ensure_ascii=False))
        for name, each in (("decode", rows), ("training", training)):
            file.write(f',\n"{name}": [\n' + ",\n".join(map(_line, each)) + "\n]")
        if run.tradeoffs:
            texts = (_tradeoff_text(record, shared) for record in run.tradeoffs)
            file.write(',\n"tradeoffs": [\n' + ",\n".join(texts) + "\n]")
        if run.early_exits:
            texts = (_line(_own(record, shared)) for record in run.early_exits)
            file.write(',\n"early_exits": [\n' + ",\n".join(texts) + "\n]")
        file.write("\n}\n")


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _own(record: TradeoffRecord | EarlyExitRecord, shared: dict[str, Any]) -> dict[str, Any]:
    """The fields of a record, rounded, less those that `shared` has with the same value."""
    values = _rounded(asdict(record))
    return {name: value for name, value in values.items() if name not in shared or shared[name] != value}


_CURVES = {"points": TradeoffPoint, "savings": Saving, "budgets": BudgetPoint}


def _tradeoff_text(record: TradeoffRecord, shared: dict[str, Any]) -> str:
    """One JSON object: a line of its single values, then each curve, one point a line."""
    own = _own(record, shared)
    text = _line({name: value for name, value in own.items() if name not in _CURVES})[:-1]
    for name, kind in _CURVES.items():
        columns = [field.name for field in fields(kind)]
        lines = [_line(columns), *(_line([point[column] for column in columns]) for point in own[name])]
        text += f',\n"{name}": [\n' + ",\n".join(lines) + "\n]"
    return text + "}"


def _tradeoff(own: Any, shared: dict[str, Any], source: str) -> TradeoffRecord:
    """The record of what `_tradeoff_text` wrote."""
    values = _with_shared(TradeoffRecord, own, shared)
    for name in _CURVES.keys() & values.keys():
        if len({len(row) for row in values[name]}) != 1:
            raise ReportError(f"{source}, {name}: not a line of the fields' names and rows of as many values")
        columns, *rows = values[name]
        values[name] = [dict(zip(columns, row)) for row in rows]
    return TradeoffRecord.from_dict(values, source)


def _with_shared(kind: type, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """`own` with what it left out because `shared` has it."""
    return {**{field.name: shared[field.name] for field in fields(kind) if field.name in shared}, **own}


def _without_repetition(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all rows share, and what is left of each."""
    shared = {name: value for name, value in rows[0].items() if all(name in row and row[name] == value for row in rows)}
    return shared, [{name: value for name, value in row.items() if name not in shared} for row in rows]


def load_run(path: str | Path) -> Run:
    """Read what `save_run` wrote. Raises ValueError that names the file where it is something else."""
    values = read_json(path)
    needed = {"shared", "decode", "training"}
    known = needed | {"tradeoffs", "early_exits"}  # which files of runs without exit policies lack
    if not isinstance(values, dict) or not needed <= values.keys() <= known or not values["decode"]:
        raise ReportError(f"{path} is no file of results; remove it and run the report again")
    shared, source = values["shared"], str(path)
    decode = []
    for own in values["decode"]:
        config = {**shared.get("config", {}), **own.get("config", {})}
        decode.append(DecodeRecord.from_dict({**shared, **own, "config": config}, source))
    return Run(
        tuple(decode),
        tuple(EpochRecord.from_dict(epoch, source) for epoch in values["training"]),
        tuple(_tradeoff(own, shared, source) for own in values.get("tradeoffs", [])),
        tuple(
            EarlyExitRecord.from_dict(_with_shared(EarlyExitRecord, own, shared), source)
            for own in values.get("early_exits", [])
        ),
    )


def load_runs(results_dir: str | Path, corpus: str) -> list[Run]:
    """All runs of a results folder, by system and seed.

    Raises:
      ReportError: where there is none, or one is of another corpus.
    """
    runs = []
    for path in sorted(Path(results_dir).glob("*.json")):
        run = load_run(path)
        _check_run(run, corpus, path)
        runs.append(run)
    if not runs:
        raise ReportError(f"no results in {results_dir}: train and decode a system first")
    return sorted(runs, key=lambda run: (run.system, run.seed))


def _rounded(value: Any) -> Any:
    """The same with floats cut to 5 significant digits, so that files stay small and diffs readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value
