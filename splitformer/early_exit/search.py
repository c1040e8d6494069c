"""Searching a batch whose utterances leave the encoder early, as an exit policy says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.searches import ExitView, Method, Options
from splitformer.early_exit.policies import Deadline, Policy
from splitformer.early_exit.running import exit_early
from splitformer.early_exit.statistics import Meter
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput


@dataclass(frozen=True)
class EarlyResult:
    """What became of one utterance.

    layer: of the exit whose output was searched.
    fallback: its lattice came out empty, so that this is the greedy hypothesis.
    nan_exits: exits that were passed because their output held a NaN.
    seconds: from the batch's setting out, with features, to this utterance's words.
    late: that was more than the policy's deadline.
    """

    layer: int
    hypothesis: Hypothesis
    fallback: bool
    nan_exits: int
    seconds: float
    late: bool


def exit_view(model: AsrModel, exit_output: ExitOutput, log_probs: Tensor | None) -> ExitView:
    """What a search sees of one exit."""
    transducer = "transducer" in model.heads
    return ExitView(
        exit_output.lengths,
        log_probs,
        exit_output.encoder_out,
        model.decoder if transducer else None,
        model.joiner(exit_output.layer) if transducer else None,
        [],
    )


def words_of(hypothesis: Hypothesis, spell: Callable[[list[int]], str]) -> list[str]:
    """Return the words that a lexicon chose, or those that `spell` makes of the tokens."""
    return spell(hypothesis.tokens).split() if hypothesis.words is None else hypothesis.words


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
    """Run each utterance as far as `policy` lets it, and search the exit at which it leaves.

    Where the policy reads n-best posteriors, every exit that is asked is searched, and the answer of the last one taken
    as it is.

    Args:
      x, x_lens: features (N, T, C) and their lengths (N,).
      options: of the method at each exit; those of an exit that is not there are the method's default.
      clock: seconds.
    Returns:
      N results in the order of the batch.
    Raises:
      ValueError: where every exit of an utterance holds a NaN, where the policy reads what the model's heads cannot
        give, and as the method.
    """
    # {row: (layer, hypothesis, fallback)} of the last exit searched
    found: dict[int, tuple[int, Hypothesis, bool]] = {}
    exit_layers = model.encoder.exit_layers

    def search(
        rows: Tensor, exit_output: ExitOutput, log_probs: Tensor | None, with_uncertainty: bool = False
    ) -> Tensor | None:
        run = method.run_with_uncertainty if with_uncertainty else method.run
        chosen = options.get(exit_output.layer, method.default)
        hypotheses, fallbacks, *doubts = run(exit_view(model, exit_output, log_probs), chosen)
        for place, (row, hypothesis) in enumerate(zip(rows.tolist(), hypotheses, strict=True)):
            found[row] = (exit_output.layer, hypothesis, place in fallbacks)
        return doubts[0] if with_uncertainty else None

    def stops(rows: Tensor, exit_output: ExitOutput, log_probs: Tensor | None) -> Tensor:
        return policy.stops(exit_output.layer, meter.measure(rows, exit_output, log_probs)).to(rows.device)

    meter = Meter(len(x), policy.needs, lambda *exit: search(*exit, with_uncertainty=True), clock, exit_layers)
    results: list[EarlyResult | None] = [None] * len(x)
    for leaving in exit_early(model, x, x_lens, stops):
        if (leaving.nan_exits == len(exit_layers)).any():  # not every method looks at what it is given
            raise ValueError("all exits of an utterance hold NaN: has the training diverged?")
        layer = leaving.exit_output.layer
        if any(row not in found or found[row][0] != layer for row in leaving.rows.tolist()):
            search(leaving.rows, leaving.exit_output, leaving.log_probs)
        seconds = clock() - meter.started
        late = isinstance(policy, Deadline) and seconds > policy.seconds
        for row, nan_exits in zip(leaving.rows.tolist(), leaving.nan_exits.tolist()):
            results[row] = EarlyResult(*found[row], nan_exits, seconds, late)
    return results
