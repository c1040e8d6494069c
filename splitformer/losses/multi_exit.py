"""The training loss of a system: its heads' losses at every exit, weighted and added, around the model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from splitformer.config import LossConfig
from splitformer.losses.ctc import ctc_losses
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput


class ExitLosses(NamedTuple):
    """The training loss and what it is made of."""

    total: Tensor
    """scalar: the weighted mean over exits of the loss per label token"""
    per_exit: Tensor
    """(E,) detached loss per label token at each exit, in the order of the exits"""


class TransducerLoss(Protocol):
    """What `losses.pruned_transducer.PrunedTransducerLoss` offers; a system with CTC alone needs no k2."""

    def __call__(
        self,
        model: AsrModel,
        exits: list[ExitOutput],
        y: Tensor,
        y_lens: Tensor,
        simple_scale: float,
        pruned_scale: float,
    ) -> Tensor: ...


class MultiExitLoss(nn.Module):
    """Weighted mean over exits (joint training as in arXiv 2309.09546, eq. 2) of each exit's loss per label token.

    An exit's loss is that of its heads: CTC alone; or, with a transducer,

        pruned_scale(w) * pruned + simple_scale(w) * simple + ctc_scale(w) * CTC,   w = transducer's steps / warm_steps

    where the scales go linearly from 0.1, 1 and 1 at w = 0 to 1, `config.simple_scale` and `config.ctc_scale` at
    w >= 1: pruning has no meaning before the simple loss has found an alignment (icefall's recipes; that CTC hands
    over in the same time is ours). For the first `transducer_from` steps CTC alone is computed.

    The module holds the model, so that DistributedDataParallel sees a single forward, and what only training needs;
    `model.state_dict()` is deployable as it stands. Each utterance's loss uses its own output length.
    """

    def __init__(
        self,
        model: AsrModel,
        config: LossConfig,
        transducer: TransducerLoss | None = None,
        transducer_from: int = 0,
        blank_id: int = 0,
    ) -> None:
        super().__init__()
        if ("transducer" in model.heads) != (transducer is not None):
            given = "none" if transducer is None else "one"
            raise ValueError(f"the model's heads are {model.heads}; of transducer losses, {given} is given")
        self.model = model
        self.config = config
        self.transducer = transducer
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
        """
        Args:
          x: (N, T, C) features
          x_lens: (N,) valid frames; each must give at least as many output frames as its labels need
          y: (N, S) labels, padded with anything
          y_lens: (N,) valid labels
          step: of training, counted from 1, in global batches
          num_tokens: labels that the sum of the losses is divided by (default: those of this batch). Where the batch
            is a part of a larger one, that one's: the parts' losses, and gradients, then add up to its own.
        """
        exits = list(self.model.encoder(x, x_lens))
        per_exit = torch.zeros(len(exits), device=x.device)
        started = step > self.transducer_from or "ctc" not in self.model.heads
        share = min(1.0, (step - self.transducer_from) / max(1, self.config.warm_steps)) if started else 0.0
        if "ctc" in self.model.heads:
            scale = _between(1.0, self.config.ctc_scale, share) if self.transducer is not None else 1.0
            log_probs = [self.model.ctc_log_probs(exit_output) for exit_output in exits]
            losses = ctc_losses(log_probs, exits[0].lengths, y, y_lens, self.blank_id)
            per_exit = per_exit + scale * losses.sum(dim=1)
        if self.transducer is not None and started:
            per_exit = per_exit + self.transducer(
                self.model,
                exits,
                y,
                y_lens,
                simple_scale=_between(1.0, self.config.simple_scale, share),
                pruned_scale=_between(0.1, 1.0, share),
            )
        per_exit = per_exit / (y_lens.sum().clamp(min=1) if num_tokens is None else num_tokens)
        total = (per_exit * self.exit_weights).sum()
        if self.transducer is not None and not started:
            # every parameter gets a gradient in every step, which DistributedDataParallel relies on
            total = total + 0.0 * sum(p.sum() for p in self._transducer_parameters())
        return ExitLosses(total, per_exit.detach())

    def training_only_state(self) -> dict[str, Tensor]:
        """The parameters that are not the model's: empty for CTC."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}

    def _transducer_parameters(self) -> list[nn.Parameter]:
        return [*self.transducer.parameters(), *self.model.decoder.parameters(), *self.model.joiners.parameters()]


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share
