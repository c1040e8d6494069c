"""Loss and word error rate at every exit on the dev cuts, by greedy search: what training reports after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from splitformer.data.batch import Batch
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.losses.multi_exit import MultiExitLoss, ctc_losses
from splitformer.training.distributed import Ranks


@dataclass(frozen=True)
class DevResult:
    loss_per_exit: dict[int, float]
    """CTC loss per label token; empty without a CTC head"""
    wer_per_exit: dict[str, dict[int, float]] = field(default_factory=dict)
    """{head: {layer: percent}}"""


@torch.no_grad()
def evaluate(
    loss: MultiExitLoss,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    ranks: Ranks,
    heads: Iterable[str] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> DevResult:
    """Evaluate `loss.model` on the `batches` of this rank and return the result over those of all ranks.

    The model runs in evaluation mode and is left in training mode. If an error occurs on one rank, that rank raises it
    and the others exit with status 1.

    Args:
      heads: those to evaluate (default: all).
      autocast: returns the context in which the model runs.
    """
    heads = loss.model.heads if heads is None else tuple(heads)
    problem: Exception | None = None
    sums = torch.zeros(0)
    try:
        sums = _sums(loss, batches, tokenizer, ranks.device, heads, autocast)
    except Exception as error:
        problem = error
    finally:
        loss.model.train()
    ranks.raise_first(problem)
    return _result(ranks.sum(sums.to(ranks.device)), heads, loss.model.encoder.exit_layers)


def _sums(
    loss: MultiExitLoss,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    device: torch.device,
    heads: tuple[str, ...],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """Return (4, at least E) sums over `batches`: tokens and words; losses, CTC and transducer errors of each exit."""
    model = loss.model.eval()
    # float64, because float32 is too coarse for the sums of a whole test set
    counts, losses, ctc_errors, transducer_errors = torch.zeros(
        4, max(2, len(model.encoder.exit_layers)), dtype=torch.float64
    )
    for batch in batches:
        references = [text.split() for text in batch.texts]
        counts[:2] += torch.tensor([int(batch.y_lens.sum()), sum(map(len, references))])
        lengths = model.encoder.output_lengths(batch.x_lens)  # on the host, where losses and searches read them
        x, x_lens, y = (each.to(device, non_blocking=True) for each in (batch.x, batch.x_lens, batch.y))
        with autocast():
            for i, exit_output in enumerate(model.encoder(x, x_lens)):
                if "ctc" in heads:
                    log_probs = model.ctc_log_probs(exit_output)
                    # dev utterances with more labels than frames are kept
                    loss_per_utterance = ctc_losses(
                        [log_probs], lengths, y, batch.y_lens, loss.blank_id, zero_infinity=True
                    )
                    losses[i] += float(loss_per_utterance.sum())
                    ctc_errors[i] += _errors(ctc_greedy_search(log_probs, lengths), references, tokenizer)
                if "transducer" in heads:
                    joiner = model.joiner(exit_output.layer)
                    found = transducer_greedy_search(model.decoder, joiner, exit_output.encoder_out, lengths)
                    transducer_errors[i] += _errors(found, references, tokenizer)
    return torch.stack([counts, losses, ctc_errors, transducer_errors])


def _result(sums: Tensor, heads: tuple[str, ...], exits: tuple[int, ...]) -> DevResult:
    rows = sums.tolist()
    tokens, words = (max(count, 1.0) for count in rows[0][:2])
    return DevResult(
        {layer: total / tokens for layer, total in zip(exits, rows[1])} if "ctc" in heads else {},
        {
            head: {layer: 100.0 * count / words for layer, count in zip(exits, errors)}
            for head, errors in zip(("ctc", "transducer"), rows[2:], strict=True)
            if head in heads
        },
    )


def _errors(hypotheses: list[Hypothesis], references: list[list[str]], tokenizer: Tokenizer) -> int:
    return sum(
        Levenshtein.distance(reference, tokenizer.decode(hypothesis.tokens).split())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    )
