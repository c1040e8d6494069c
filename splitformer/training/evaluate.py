"""Loss and word error rate at every exit on held-out cuts, by greedy search: what training watches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import kaldialign
import torch

from splitformer.data.datamodule import Batch
from splitformer.data.tokenizer import Tokenizer
from splitformer.greedy import Hypothesis, ctc_greedy_search, transducer_greedy_search
from splitformer.losses.ctc import ctc_losses
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput


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
    device: torch.device,
    heads: Iterable[str] | None = None,
) -> DevResult:
    """Run `heads` (default: all) of `loss.model` over `batches` in evaluation mode and leave it in training mode."""
    model = loss.model.eval()
    heads = model.heads if heads is None else tuple(heads)
    total_loss: dict[int, float] = defaultdict(float)
    errors: dict[str, dict[int, int]] = {head: defaultdict(int) for head in heads}
    tokens = words = 0
    for batch in (b.to(device) for b in batches):
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
    wer = {head: {layer: 100.0 * n / max(words, 1) for layer, n in counts.items()} for head, counts in errors.items()}
    return DevResult({layer: value / max(tokens, 1) for layer, value in total_loss.items()}, wer)


def _transducer_search(model: AsrModel, exit_output: ExitOutput) -> list[Hypothesis]:
    joiner = model.joiner(exit_output.layer)
    return transducer_greedy_search(model.decoder, joiner, exit_output.encoder_out, exit_output.lengths)


def _errors(hypotheses: list[Hypothesis], references: list[list[str]], tokenizer: Tokenizer) -> int:
    return sum(
        kaldialign.edit_distance(reference, tokenizer.decode(hypothesis.tokens).split())["total"]
        for reference, hypothesis in zip(references, hypotheses, strict=True)
    )
