"""A table of what each exit gives for each utterance of a set, and the result of a policy computed from it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitformer.early_exit.policies import Policy
from splitformer.errors import UserError
from splitformer.files import atomic_write, read_json


@dataclass(frozen=True)
class ExitTable:
    """U utterances at E exits, each utterance run in a batch of one.

    layers: the exits. utterances, speakers: U of each; an unknown speaker is "".
    audio_seconds, ref_words: (U,). errors: (U, E), of the words found at each exit.
    statistics: {name: (U, E)}, see `statistics.STATISTICS`.
    encoder_macs: (U, E) multiply-accumulates up to each exit without heads; head_macs: (U, E) of its CTC head;
      search_macs: (U, E) of greedy search with the decoder and joiner of a transducer.
    encoder_seconds, head_seconds, search_seconds: (U, E) likewise; statistic_seconds: {name: (U, E)}, for
      nbest_posterior with the search that it comes from.
    """

    layers: tuple[int, ...]
    utterances: list[str]
    speakers: list[str]
    audio_seconds: Tensor
    ref_words: Tensor
    errors: Tensor
    statistics: dict[str, Tensor]
    encoder_macs: Tensor
    head_macs: Tensor
    search_macs: Tensor
    encoder_seconds: Tensor
    head_seconds: Tensor
    search_seconds: Tensor
    statistic_seconds: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.utterances)

    def some(self, which: Tensor) -> ExitTable:
        """Return the utterances of `which` (U,), a mask."""

        def select(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: column[which] for name, column in value.items()}
            return value[which] if isinstance(value, Tensor) else list(itertools.compress(value, which.tolist()))

        return replace(self, **{name: select(value) for name, value in vars(self).items() if name != "layers"})

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        with atomic_write(path) as file:
            json.dump(_to_json(vars(self)), file, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> ExitTable:
        """Read what `save` wrote. Raise UserError, naming the file, if it holds something else."""
        try:
            values = read_json(path)
            names = {name: values.pop(name) for name in ("utterances", "speakers")}
            table = cls(layers=tuple(values.pop("layers")), **names, **_from_json(values))
            table.check()
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a table of exits ({error!r}); make it again with bin/tradeoff") from error
        return table

    def check(self) -> None:
        """Raise ValueError unless all columns have the shapes of the same utterances and exits."""
        if len(self.speakers) != len(self):
            raise ValueError(f"{len(self.speakers)} speakers of {len(self)} utterances")
        for name, value in vars(self).items():
            if name not in ("layers", "utterances", "speakers"):
                shape = (len(self),) if name in ("audio_seconds", "ref_words") else (len(self), len(self.layers))
                for column in value.values() if isinstance(value, dict) else [value]:
                    if tuple(column.shape) != shape:
                        raise ValueError(f"{name} is {tuple(column.shape)}; expected {shape}")


def _to_json(value: Any) -> Any:
    """Return tensors as lists, with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _to_json(each) for name, each in value.items()}
    if isinstance(value, Tensor):
        return _to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _from_json(each) for name, each in value.items()}
    rows = [[math.nan if x is None else x for x in row] if isinstance(row, list) else row for row in value]
    return torch.tensor(rows, dtype=torch.float64)


# ---- the result of a policy


class Outcome(NamedTuple):
    """The result of a policy for U utterances."""

    taken: Tensor
    """(U,) index of the exit in table.layers"""
    errors: Tensor
    layers: Tensor
    macs: Tensor
    seconds: Tensor


def outcome(policy: Policy, table: ExitTable) -> Outcome:
    """Return the exits that `policy` would have chosen, their errors, and the cost.

    The cost is that of the layers, of every head that was read, of the statistics, and of one search unless the
    statistics searched that exit already.
    """
    last = len(table.layers) - 1
    taken = torch.full((len(table),), last)
    for place in reversed(range(last)):
        passed = {name: table.statistics[name][:, : place + 1] for name in policy.needs}
        taken[policy.stops(table.layers[place], passed)] = place
    heads = _at(table.head_macs.cumsum(dim=1), taken)
    seconds = _at(table.encoder_seconds, taken) + _at(table.head_seconds.cumsum(dim=1), taken)
    for name in policy.needs:
        if name in table.statistic_seconds:
            asked = table.statistic_seconds[name].clone()
            asked[:, last] = 0.0  # the last exit is not asked
            seconds = seconds + _at(asked.cumsum(dim=1), taken)
    searched = (taken < last) & ("nbest_posterior" in policy.needs)
    seconds = seconds + _at(table.search_seconds, taken).masked_fill(searched, 0.0)
    macs = _at(table.encoder_macs + table.search_macs, taken) + heads
    return Outcome(taken, _at(table.errors, taken), _layers(table, taken), macs, seconds)


def without_policy(table: ExitTable, taken: Tensor) -> Outcome:
    """Return the outcome of exits `taken` (U,) that no policy chose: no other exit's head is read."""
    macs = _at(table.encoder_macs + table.head_macs + table.search_macs, taken)
    seconds = _at(table.encoder_seconds + table.head_seconds + table.search_seconds, taken)
    return Outcome(taken, _at(table.errors, taken), _layers(table, taken), macs, seconds)


def fixed(table: ExitTable, layer: int) -> Outcome:
    """Return the outcome of the model that ends at the exit after `layer`."""
    return without_policy(table, torch.full((len(table),), table.layers.index(layer)))


def oracle(table: ExitTable, price: float) -> Outcome:
    """Return the outcome of each utterance's exit with the lowest errors + price * cost.

    The cost is a share of the last exit's mean multiply-accumulates. Over all prices the outcomes form a curve of
    errors against cost that no policy can be below.
    """
    cost = table.encoder_macs + table.head_macs + table.search_macs
    return without_policy(table, (table.errors + price * cost / cost[:, -1].mean()).argmin(dim=1))


def _layers(table: ExitTable, taken: Tensor) -> Tensor:
    return torch.tensor(table.layers, dtype=torch.float64)[taken]


def _at(values: Tensor, taken: Tensor) -> Tensor:
    """Return values (U, E) at exits taken (U,)."""
    return values.gather(1, taken.unsqueeze(1)).squeeze(1)
