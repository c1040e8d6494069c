"""Fitting exit policies: from a table of what every exit would have given to thresholds that meet a target.

All utterances of a calibration set are run through all exits once; the table keeps statistics, errors and costs. What a
policy would do is then arithmetic on the table, so that thousands of settings cost seconds.

How thresholds are found. A threshold for each exit, chosen freely to minimise errors on a hundred utterances, learns
those utterances: exits that happen to be better than deeper ones are taken everywhere. Instead, what a statistic s says
at an exit is made comparable between exits by a logistic regression over all of them,

    logit P(a deeper exit has fewer errors) = a_exit + w f(s),

one slope for all exits and an intercept for each, drawn towards a common one (Platt's calibration, pooled). One
probability p for all exits then is a threshold of its own for each: leave where a_exit + w f(s) <= logit p. So a curve
of WER against cost has one free number, and that is chosen by the target with the speakers left out in turn.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.early_exit.policies import Policy
from splitformer.files import atomic_write, read_json

# ---- what every exit would have given


@dataclass(frozen=True)
class ExitTable:
    """U utterances at E exits; each alone, in a batch of one.

    layers: the exits' names. utterances, speakers: U of each; a speaker may be "", unknown.
    audio_seconds, ref_words: (U,). errors: (U, E), of the words searched at each exit.
    statistics: {name: (U, E)}, see exit_policy.STATISTICS.
    encoder_macs: (U, E) multiply-accumulates up to each exit, heads left out; head_macs: (U, E) of its CTC head;
      search_macs: (U, E) of a transducer's decoder and joiner, of greedy search.
    encoder_seconds, head_seconds, search_seconds: (U, E) likewise; statistic_seconds: {name: (U, E)}, of
      nbest_posterior with the search that it is read from.
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
        """The utterances of `which` (U,), a mask."""
        taken = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                taken[each.name] = value[which]
            elif isinstance(value, dict):
                taken[each.name] = {name: tensor[which] for name, tensor in value.items()}
            elif isinstance(value, list):
                taken[each.name] = list(itertools.compress(value, which.tolist()))
        return replace(self, **taken)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON: what each utterance would have been at each exit."""
        values = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        with atomic_write(path) as file:
            json.dump(values, file, ensure_ascii=False)
            file.write("\n")

    @classmethod
    def load(cls, path: str | Path) -> ExitTable:
        """Read what `save` wrote. Raises ValueError that names the file where it is something else."""
        values = read_json(path)
        names = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"{path} is no table of exits of this version; make it again")
        try:
            for name in names - {"layers", "utterances", "speakers"}:
                value = values[name]
                values[name] = (
                    {key: _tensor(each) for key, each in value.items()} if isinstance(value, dict) else _tensor(value)
                )
            table = cls(**{**values, "layers": tuple(values["layers"])})
            table.check()
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged table of exits ({error}); make it again") from error
        return table

    def check(self) -> None:
        """Raises ValueError where the columns are not all of the same utterances and exits."""
        shape = (len(self), len(self.layers))
        if len(self.speakers) != len(self):
            raise ValueError(f"{len(self.speakers)} speakers of {len(self)} utterances")
        columns = [(each.name, getattr(self, each.name)) for each in fields(self) if each.type == "Tensor"]
        for name, column in [*columns, *self.statistics.items(), *self.statistic_seconds.items()]:
            expected = shape[:1] if name in ("audio_seconds", "ref_words") else shape
            if column.shape != expected:
                raise ValueError(f"{name} is {tuple(column.shape)}, and should be {expected}")


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    # JSON has no NaN: null, which a statistic has where there is none
    if isinstance(value, Tensor):
        return [[None if math.isnan(x) else x for x in row] if isinstance(row, list) else row for row in value.tolist()]
    return value


def _tensor(rows: list) -> Tensor:
    filled = [[math.nan if x is None else x for x in row] if isinstance(row, list) else row for row in rows]
    return torch.tensor(filled, dtype=torch.float64)


class Outcome(NamedTuple):
    """What a policy does with each of U utterances."""

    taken: Tensor
    """(U,) index of the exit in table.layers"""
    errors: Tensor
    layers: Tensor
    macs: Tensor
    seconds: Tensor


def outcome(policy: Policy, table: ExitTable) -> Outcome:
    """What `policy` would have done, and what it would have cost: layers, every head that was read, the statistics,
    and one search where the statistics had not searched already."""
    last = len(table.layers) - 1
    taken = torch.full((len(table),), last)
    for place in reversed(range(last)):
        passed = {name: table.statistics[name][:, : place + 1] for name in policy.needs}
        taken[policy.stops(table.layers[place], passed)] = place
    heads = at(table.head_macs.cumsum(dim=1), taken)
    seconds = at(table.encoder_seconds, taken) + at(table.head_seconds.cumsum(dim=1), taken)
    for name in policy.needs:
        if name in table.statistic_seconds:
            asked = table.statistic_seconds[name].clone()
            asked[:, last] = 0.0  # nobody asks at the last exit
            seconds = seconds + at(asked.cumsum(dim=1), taken)
    searched = (taken < last) & ("nbest_posterior" in policy.needs)
    seconds = seconds + at(table.search_seconds, taken).masked_fill(searched, 0.0)
    layers = torch.tensor(table.layers, dtype=torch.float64)[taken]
    macs = at(table.encoder_macs + table.search_macs, taken) + heads
    return Outcome(taken, at(table.errors, taken), layers, macs, seconds)


def without_policy(table: ExitTable, taken: Tensor) -> Outcome:
    """The outcome of leaving at exits `taken` (U,) without anybody asking: a truncated model, or an oracle."""
    macs = at(table.encoder_macs + table.head_macs + table.search_macs, taken)
    seconds = at(table.encoder_seconds + table.head_seconds + table.search_seconds, taken)
    layers = torch.tensor(table.layers, dtype=torch.float64)[taken]
    return Outcome(taken, at(table.errors, taken), layers, macs, seconds)


def fixed(table: ExitTable, layer: int) -> Outcome:
    """Everything leaves at the exit after `layer`."""
    return without_policy(table, torch.full((len(table),), table.layers.index(layer)))


def oracle(table: ExitTable, price: float) -> Outcome:
    """For each utterance the exit with the lowest errors + price * cost, the cost a share of the last exit's mean
    multiply-accumulates: no policy can be below the curve of errors against them that prices trace."""
    cost = table.encoder_macs + table.head_macs + table.search_macs
    return without_policy(table, (table.errors + price * cost / cost[:, -1].mean()).argmin(dim=1))


def at(values: Tensor, taken: Tensor) -> Tensor:
    """values (U, E) at exits taken (U,)."""
    return values.gather(1, taken.unsqueeze(1)).squeeze(1)
