"""The training loss: the losses of the heads at every exit, weighted and added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from splitformer.config import ConfigError, LossConfig
from splitformer.model.asr import AsrModel

if TYPE_CHECKING:
    from splitformer.losses.pruned_transducer import PrunedTransducerLoss


class ExitLosses(NamedTuple):
    """The training loss and its components."""

    total: Tensor
    """scalar: the weighted mean over exits of the loss per label token"""
    per_exit: Tensor
    """(E,) loss per label token at each exit, in the order of the exits; detached"""


class MultiExitLoss(nn.Module):
    """Weighted mean over exits (joint training as in arXiv 2309.09546, eq. 2) of each exit's loss per label token.

    For a model with one kind of head, the loss of an exit is that of its head. With CTC and a transducer it is

        pruned_scale(w) * pruned + simple_scale(w) * simple + ctc_scale(w) * CTC,   w = transducer steps / warm_steps

    where the scales change linearly from 0.1, 1 and 1 at w = 0 to 1, `config.simple_scale` and `config.ctc_scale` at
    w >= 1, because pruning is meaningless before the simple loss has found an alignment (as in icefall's recipes;
    lowering the CTC scale over the same steps is this project's choice). In the first `transducer_from` steps only CTC
    is computed.

    The module contains the model, so that DistributedDataParallel sees a single forward, and the parameters that only
    training needs; `model.state_dict()` is all that decoding needs. Each utterance's loss uses its own output length.
    """

    exit_weights: Tensor

    def __init__(self, model: AsrModel, config: LossConfig, transducer_from: int = 0, blank_id: int = 0) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.transducer = _transducer_loss(model, config) if "transducer" in model.heads else None
        self.transducer_from = transducer_from
        self.blank_id = blank_id
        weights = torch.tensor(config.exit_weights or [1.0] * len(model.encoder.exit_layers))
        self.register_buffer("exit_weights", weights / weights.sum(), persistent=False)

    def forward(
        self,
        x: Tensor,
        x_lens: Tensor,
        y: Tensor,
        y_lens: Tensor,
        step: int = 0,
        num_tokens: float | None = None,
    ) -> ExitLosses:
        """Compute the loss of a batch.

        Args:
          x: (N, T, C) features, on the model's device. The other tensors are best kept on the host, in pinned memory:
            the losses read them there, and would have to wait for the device if they came from it.
          x_lens: (N,) valid frames; each must give at least as many output frames as its labels need
          y: (N, S) labels; padding may hold anything
          y_lens: (N,) valid labels
          step: training step in global batches, counted from 1
          num_tokens: divide the sum of the losses by this number of labels (default: those of this batch). For a
            micro-batch, give that of the global batch, so that losses and gradients of the micro-batches add up.
        """
        exits = list(self.model.encoder(x, x_lens.to(x.device, non_blocking=True)))
        lengths = self.model.encoder.output_lengths(x_lens)
        per_exit = torch.zeros(len(exits), device=x.device)
        started = step > self.transducer_from or "ctc" not in self.model.heads
        share = min(1.0, (step - self.transducer_from) / max(1, self.config.warm_steps)) if started else 0.0
        if "ctc" in self.model.heads:
            scale = 1.0 if self.transducer is None else _interpolate(1.0, self.config.ctc_scale, share)
            log_probs = [self.model.ctc_log_probs(exit_output) for exit_output in exits]
            losses = ctc_losses(log_probs, lengths, y.to(x.device, non_blocking=True), y_lens, self.blank_id)
            per_exit = per_exit + scale * losses.sum(dim=1)
        if self.transducer is not None and started:
            per_exit = per_exit + self.transducer(
                self.model,
                exits,
                y,
                y_lens,
                simple_scale=_interpolate(1.0, self.config.simple_scale, share),
                pruned_scale=_interpolate(0.1, 1.0, share),
                lengths=lengths,
            )
        per_exit = per_exit / (y_lens.sum().clamp(min=1) if num_tokens is None else num_tokens)
        total = (per_exit * self.exit_weights).sum()
        if self.transducer is not None and not started:
            # DistributedDataParallel expects a gradient of every parameter in every step
            unused = (self.transducer, self.model.decoder, self.model.joiners)
            total = total + 0.0 * sum(p.sum() for module in unused for p in module.parameters())
        return ExitLosses(total, per_exit.detach())

    def training_only_state(self) -> dict[str, Tensor]:
        """Return the parameters that are not part of the model; there are none for CTC."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}


def ctc_losses(
    log_probs: Sequence[Tensor],
    lengths: Tensor,
    y: Tensor,
    y_lens: Tensor,
    blank_id: int = 0,
    zero_infinity: bool = False,
) -> Tensor:
    """Return the (E, N) CTC losses (Graves et al. 2006) in nats, for each exit and utterance.

    Args:
      log_probs: E tensors (N, T', V), one per exit.
      lengths: (N,) valid output frames, the same at all exits. On a GPU, torch reads them and y_lens on the host.
      y: (N, S) labels; padding may hold anything. y_lens: (N,) valid labels.
      zero_infinity: an utterance with more labels than frames has loss 0 instead of infinity.
    """
    exits = len(log_probs)
    # one call for all exits: stacked along the batch, they share their labels
    return nn.functional.ctc_loss(
        torch.cat(list(log_probs)).transpose(0, 1),
        y.repeat(exits, 1),
        lengths.repeat(exits),
        y_lens.repeat(exits),
        blank=blank_id,
        reduction="none",
        zero_infinity=zero_infinity,
    ).view(exits, -1)


def _transducer_loss(model: AsrModel, config: LossConfig) -> PrunedTransducerLoss:
    try:  # CTC trains without k2
        from splitformer.losses.pruned_transducer import PrunedTransducerLoss
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.heads = {list(model.heads)} trains a transducer, whose loss needs k2 ({error}): use the "
            'environment of ./setup.sh, or heads = ["ctc"]'
        ) from None
    return PrunedTransducerLoss(model, config)


def _interpolate(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
