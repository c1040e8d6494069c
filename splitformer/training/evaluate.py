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
    """Evaluate `loss.model` on the `batches` of this rank and return the result over those of all ranks.

    The model runs in evaluation mode and is left in training mode. `heads` are those to evaluate (default: all).
    """
    model = loss.model.eval()
    heads = model.heads if heads is None else tuple(heads)
    exits = model.encoder.exit_layers
    # float64, because float32 is too coarse for the sums of a whole test set
    counts, losses, ctc_errors, transducer_errors = torch.zeros(4, max(2, len(exits)), dtype=torch.float64)
    for batch in (b.to(ranks.device) for b in batches):
        references = [text.split() for text in batch.texts]
        counts[:2] += torch.tensor([int(batch.y_lens.sum()), sum(map(len, references))])
        for i, exit_output in enumerate(model.encoder(batch.x, batch.x_lens)):
            layer, encoder_out, lengths = exit_output
            if "ctc" in heads:
                log_probs = model.ctc_log_probs(exit_output)
                # dev utterances with more labels than frames are kept
                loss_per_utterance = ctc_losses(
                    [log_probs], lengths, batch.y, batch.y_lens, loss.blank_id, zero_infinity=True
                )
                losses[i] += float(loss_per_utterance.sum())
                ctc_errors[i] += _errors(ctc_greedy_search(log_probs, lengths), references, tokenizer)
            if "transducer" in heads:
                found = transducer_greedy_search(model.decoder, model.joiner(layer), encoder_out, lengths)
                transducer_errors[i] += _errors(found, references, tokenizer)
    model.train()
    sums = ranks.sum(torch.stack([counts, losses, ctc_errors, transducer_errors]).to(ranks.device)).tolist()
    tokens, words = (max(count, 1.0) for count in sums[0][:2])
    return DevResult(
        {layer: total / tokens for layer, total in zip(exits, sums[1])} if "ctc" in heads else {},
        {
            head: {layer: 100.0 * count / words for layer, count in zip(exits, errors)}
            for head, errors in zip(("ctc", "transducer"), sums[2:], strict=True)
            if head in heads
        },
    )


def _errors(hypotheses: list[Hypothesis], references: list[list[str]], tokenizer: Tokenizer) -> int:
    return sum(
        Levenshtein.distance(reference, tokenizer.decode(hypothesis.tokens).split())
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    )
