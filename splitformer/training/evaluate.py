"""Loss and word error rate at every exit on held-out cuts, by greedy search: what training watches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import kaldialign
import torch

from splitformer.data.datamodule import Batch
from splitformer.data.tokenizer import Tokenizer
from splitformer.greedy import ctc_greedy_search
from splitformer.losses.ctc import MultiExitCtcLoss


@dataclass(frozen=True)
class DevResult:
    loss_per_exit: dict[int, float]
    """CTC loss per label token"""
    wer_per_exit: dict[int, float]
    """percent"""


@torch.no_grad()
def evaluate(loss: MultiExitCtcLoss, batches: Iterable[Batch], tokenizer: Tokenizer, device: torch.device) -> DevResult:
    """Run `loss.model` over `batches` in evaluation mode and leave it in training mode."""
    model = loss.model.eval()
    total_loss: dict[int, float] = defaultdict(float)
    errors: dict[int, int] = defaultdict(int)
    tokens = words = 0
    for batch in (b.to(device) for b in batches):
        references = [text.split() for text in batch.texts]
        tokens += int(batch.y_lens.sum())
        words += sum(map(len, references))
        for exit_output, log_probs in model(batch.x, batch.x_lens):
            total_loss[exit_output.layer] += float(
                torch.nn.functional.ctc_loss(
                    log_probs.transpose(0, 1),
                    batch.y,
                    exit_output.lengths,
                    batch.y_lens,
                    blank=loss.blank_id,
                    reduction="sum",
                    zero_infinity=True,  # a dev utterance may have more labels than frames; it is not dropped
                )
            )
            hypotheses = ctc_greedy_search(log_probs, exit_output.lengths, loss.blank_id)
            for reference, hypothesis in zip(references, hypotheses, strict=True):
                decoded = tokenizer.decode(hypothesis.tokens).split()
                errors[exit_output.layer] += kaldialign.edit_distance(reference, decoded)["total"]
    model.train()
    return DevResult(
        {layer: value / max(tokens, 1) for layer, value in total_loss.items()},
        {layer: 100.0 * count / max(words, 1) for layer, count in errors.items()},
    )
