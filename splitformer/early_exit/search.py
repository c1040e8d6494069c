"""Searching a batch whose utterances exit where a policy decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.searches import Method, Options, exit_view
from splitformer.early_exit.policies import Deadline, Policy
from splitformer.early_exit.running import exit_early
from splitformer.early_exit.statistics import Meter
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput


@dataclass(frozen=True)
class EarlyResult:
    """The result of one utterance under an exit policy.

    layer: of the exit whose output was searched.
    fallback: whether its lattice was empty, so that the hypothesis is that of greedy search.
    nan_exits: number of exits passed over because their output held a NaN.
    seconds: from features to words; of the batch up to this exit.
    late: whether these are more than the policy's deadline.
    """

    layer: int
    hypothesis: Hypothesis
    fallback: bool
    nan_exits: int
    seconds: float
    late: bool


@torch.no_grad()
def search_early(
    model: AsrModel,
    x: Tensor,
    x_lens: Tensor,
    policy: Policy,
    method: Method,
    options: Mapping[int, Options],
    clock: Callable[[], float] = time.perf_counter,
) -> list[EarlyResult]:
    """Run each utterance up to the exit at which `policy` stops it, and search that exit.

    A policy that reads n-best posteriors searches every exit on the way; the result of the last of them is kept.

    Args:
      x, x_lens: features (N, T, C) and their lengths (N,).
      options: of the method at each exit; the method's default where an exit has none.
      clock: returns seconds.
    Returns:
      N results in the order of the batch.
    Raises:
      UserError: all exits of an utterance hold a NaN, or the policy needs a head that the model lacks.
    """
    # {row: (layer, hypothesis, fallback)} of the last exit searched
    searched: dict[int, tuple[int, Hypothesis, bool]] = {}
    exit_layers = model.encoder.exit_layers

    def keep(rows: Tensor, layer: int, hypotheses: list[Hypothesis], fallbacks: list[int]) -> None:
        for place, (row, hypothesis) in enumerate(zip(rows.tolist(), hypotheses, strict=True)):
            searched[row] = (layer, hypothesis, place in fallbacks)

    def nbest(rows: Tensor, exit_output: ExitOutput, log_probs: Tensor) -> Tensor:
        view, layer = exit_view(model, exit_output, log_probs), exit_output.layer
        hypotheses, fallbacks, uncertainty = method.run_with_uncertainty(view, options.get(layer, method.default))
        keep(rows, layer, hypotheses, fallbacks)
        return uncertainty

    def stops(rows: Tensor, exit_output: ExitOutput, log_probs: Tensor | None) -> Tensor:
        return policy.stops(exit_output.layer, meter.measure(rows, exit_output, log_probs)).to(rows.device)

    meter = Meter(len(x), exit_layers, policy.needs, nbest, clock)
    results: dict[int, EarlyResult] = {}
    for exited in exit_early(model, x, x_lens, stops):
        if (exited.nan_exits == len(exit_layers)).any():  # not every method looks for NaN
            raise UserError("all exits of an utterance hold NaN: has the training diverged?")
        rows, layer = exited.rows.tolist(), exited.exit_output.layer
        if any(row not in searched or searched[row][0] != layer for row in rows):
            view = exit_view(model, exited.exit_output, exited.log_probs)
            keep(exited.rows, layer, *method.run(view, options.get(layer, method.default)))
        seconds = clock() - meter.started
        late = isinstance(policy, Deadline) and seconds > policy.seconds
        for row, nan_exits in zip(rows, exited.nan_exits.tolist()):
            results[row] = EarlyResult(*searched[row], nan_exits, seconds, late)
    return [results[row] for row in range(len(x))]
