"""Loss and word error rate at every exit on held-out cuts, by greedy search: what training watches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import kaldialign
import torch

from splitformer.data.batches import Batch
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.losses.ctc import ctc_losses
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput
from splitformer.training.distributed import Ranks


@dataclass(frozen=True)
class DevResult:
    loss_per_exit: dict[int, float]
    """CTC loss per label token; empty for a system without CTC"""
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
    """Run `heads` (default: all) of `loss.model` over `batches` in evaluation mode and leave it in training mode.

    Each rank has batches of its own; the result, the same on all of them, is that of all batches.
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
            layer, lengths = exit_output.layer, exit_output.lengths
            if "ctc" in heads:
                log_probs = model.ctc_log_probs(exit_output)
                # a dev utterance may have more labels than frames; it is not dropped
                losses = ctc_losses([log_probs], lengths, batch.y, batch.y_lens, loss.blank_id, zero_infinity=True)
                total_loss[layer] += float(losses.sum())
                errors["ctc"][layer] += _errors(ctc_greedy_search(log_probs, lengths), references, tokenizer)
            if "transducer" in heads:
                errors["transducer"][layer] += _errors(_transducer_search(model, exit_output), references, tokenizer)
    model.train()
    counts = [tokens, words, *total_loss.values(), *(n for by_exit in errors.values() for n in by_exit.values())]
    # sums of a whole test set: float32 would lose words
    sums = ranks.sum(torch.tensor(counts, dtype=torch.float64, device=ranks.device)).tolist()
    tokens, words = max(sums[0], 1.0), max(sums[1], 1.0)
    rows = [dict(zip(exits, sums[i : i + len(exits)], strict=True)) for i in range(2, len(sums), len(exits))]
    wer = {
        head: {layer: 100.0 * n / words for layer, n in row.items()} for head, row in zip(heads, rows[1:], strict=True)
    }
    return DevResult({layer: value / tokens for layer, value in rows[0].items()} if "ctc" in heads else {}, wer)


def _transducer_search(model: AsrModel, exit_output: ExitOutput) -> list[Hypothesis]:
    joiner = model.joiner(exit_output.layer)
    return transducer_greedy_search(model.decoder, joiner, exit_output.encoder_out, exit_output.lengths)


def _errors(hypotheses: list[Hypothesis], references: list[list[str]], tokenizer: Tokenizer) -> int:
    return sum(
        kaldialign.edit_distance(reference, tokenizer.decode(hypothesis.tokens).split())["total"]
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    )
