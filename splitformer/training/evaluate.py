"""Loss and word error rate at every exit on the dev cuts, by greedy search: what training reports after each epoch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from rapidfuzz.distance import Levenshtein

from splitformer.data.batches import Batch
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
) -> DevResult:
    """Evaluate `loss.model` on `batches` and return the result over the batches of all ranks.

    The model runs in evaluation mode and is left in training mode.

    Args:
      batches: those of this rank.
      heads: the heads to evaluate (default: all).
    """
    model = loss.model.eval()
    heads = model.heads if heads is None else tuple(heads)
    exits = model.encoder.exit_layers
    total_loss = dict.fromkeys(exits, 0.0)
    errors = {head: dict.fromkeys(exits, 0) for head in heads}
    tokens = words = 0
    for batch in (b.to(ranks.device) for b in batches):
        references = [text.split() for text in batch.texts]
        tokens += int(batch.y_lens.sum())
        words += sum(map(len, references))
        for exit_output in model.encoder(batch.x, batch.x_lens):
            layer, encoder_out, lengths = exit_output
            if "ctc" in heads:
                log_probs = model.ctc_log_probs(exit_output)
                # dev utterances with more labels than frames are kept
                losses = ctc_losses([log_probs], lengths, batch.y, batch.y_lens, loss.blank_id, zero_infinity=True)
                total_loss[layer] += float(losses.sum())
                errors["ctc"][layer] += _errors(ctc_greedy_search(log_probs, lengths), references, tokenizer)
            if "transducer" in heads:
                found = transducer_greedy_search(model.decoder, model.joiner(layer), encoder_out, lengths)
                errors["transducer"][layer] += _errors(found, references, tokenizer)
    model.train()
    counts = [tokens, words, *total_loss.values(), *(n for by_exit in errors.values() for n in by_exit.values())]
    # float32 is too coarse for the sums of a whole test set
    sums = ranks.sum(torch.tensor(counts, dtype=torch.float64, device=ranks.device)).tolist()
    tokens, words = max(sums[0], 1.0), max(sums[1], 1.0)
    losses_by_exit, *errors_by_exit = (
        dict(zip(exits, sums[i : i + len(exits)], strict=True)) for i in range(2, len(sums), len(exits))
    )
    return DevResult(
        {layer: value / tokens for layer, value in losses_by_exit.items()} if "ctc" in heads else {},
        {
            head: {layer: 100.0 * n / words for layer, n in by_exit.items()}
            for head, by_exit in zip(heads, errors_by_exit, strict=True)
        },
    )


def _errors(hypotheses: list[Hypothesis], references: list[list[str]], tokenizer: Tokenizer) -> int:
    return sum(
        Levenshtein.distance(reference, tokenizer.decode(hypothesis.tokens).split())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    )
