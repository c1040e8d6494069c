"""The pruned transducer loss at every exit (Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training",
Interspeech 2022, arXiv 2206.13236), with k2.

At each exit, a simple joiner that only adds, am(t) + lm(s), gives a first loss over all T' x (S + 1) nodes at little
cost. The occupation of its nodes tells which `prune_range` symbols matter in each frame, and the real joiner is
computed for those only.

Shared between exits: the decoder and the lm side of the simple loss do not depend on frames and are computed once. The
am side, the pruning bounds and the joiner belong to each exit, because a deeper exit may align differently.

Memory: the joiner's logits, (N, T', prune_range, V), and several tensors of that size are by far the largest of a
step, and autograd would keep those of all exits until the backward pass. `_WithGradient` therefore computes an exit's
gradients together with its loss and keeps only these, which are as large as the encoder's output. The peak is that of
one exit whatever their number, and nothing is computed twice. `benchmarks/transducer_loss.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import k2
import torch
from torch import Tensor, nn

from splitformer.config import LossConfig
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput
from splitformer.model.joiner import Joiner


class PrunedTransducerLoss(nn.Module):
    """Simple and pruned loss at every exit; holds the projections of the simple loss, which only training needs."""

    def __init__(self, model: AsrModel, config: LossConfig) -> None:
        super().__init__()
        self.prune_range, self.lm_scale, self.am_scale = config.prune_range, config.lm_scale, config.am_scale
        decoder_dim = model.decoder.embedding.embedding_dim
        vocab_size = model.decoder.vocab_size
        self.simple_lm_proj = nn.Linear(decoder_dim, vocab_size)
        self.simple_am_proj = nn.ModuleDict(
            {layer: nn.Linear(joiner.encoder_proj.in_features, vocab_size) for layer, joiner in model.joiners.items()}
        )

    def forward(
        self,
        model: AsrModel,
        exits: list[ExitOutput],
        y: Tensor,
        y_lens: Tensor,
        simple_scale: float,
        pruned_scale: float,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return (E,) simple_scale * simple + pruned_scale * pruned at each exit, in nats, summed over the batch.

        Args:
          model: provides the decoder and the joiners
          exits: outputs for one batch, of the same lengths at all exits
          y: (N, S) labels; padding may hold anything. y_lens: (N,) valid labels, which may be 0
          lengths: (N,) valid frames, those of the exits, on the device of y and y_lens (default: the exits' own). These
            three are checked where they are; that is the host in training, which so need not wait for the device
        Raises:
          ValueError: a label is outside the vocabulary, or an utterance has too few frames for its labels.
        """
        blank_id, device = model.decoder.blank_id, exits[0].encoder_out.device
        lengths = exits[0].lengths if lengths is None else lengths
        y = _checked_labels(y, y_lens, lengths, model.decoder.vocab_size, blank_id, self.prune_range)
        # begin_symbol, begin_frame, end_symbol, end_frame
        boundary = torch.stack([torch.zeros_like(lengths), torch.zeros_like(lengths), y_lens, lengths], dim=1)
        y, boundary = to_device(y, device), to_device(boundary, device)
        decoder_out = model.decoder.teacher_forced(y)
        lm = self.simple_lm_proj(decoder_out).float()

        losses = []
        for exit_output in exits:
            joiner, am_proj = model.joiner(exit_output.layer), self.simple_am_proj[str(exit_output.layer)]

            def exit_loss(
                encoder_out: Tensor,
                decoder_out: Tensor,
                lm: Tensor,
                joiner: Joiner = joiner,
                am_proj: nn.Module = am_proj,
            ) -> Tensor:
                # k2 requires a padded T' of at least S; frames beyond an utterance's end are ignored
                encoder_out = nn.functional.pad(encoder_out, (0, 0, 0, max(0, y.size(1) - encoder_out.size(1))))
                simple, ranges = self._simple(am_proj(encoder_out).float(), lm, y, boundary, blank_id)
                logits = joiner(
                    joiner.encoder_proj(encoder_out).unsqueeze(2), prune(joiner.decoder_proj(decoder_out), ranges)
                )
                with torch.autocast(logits.device.type, enabled=False):
                    pruned = k2.rnnt_loss_pruned(
                        logits.float(), y, ranges, termination_symbol=blank_id, boundary=boundary, reduction="sum"
                    )
                return simple_scale * simple + pruned_scale * pruned

            parameters = [*joiner.parameters(), *am_proj.parameters()]
            losses.append(_with_gradient(exit_loss, [exit_output.encoder_out, decoder_out, lm], parameters))
        return torch.stack(losses)

    def _simple(self, am: Tensor, lm: Tensor, y: Tensor, boundary: Tensor, blank_id: int) -> tuple[Tensor, Tensor]:
        """Return the summed simple loss, and the symbols that matter in each frame: (N, T', at most prune_range)."""
        with torch.autocast(am.device.type, enabled=False):
            loss, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
                lm=lm,
                am=am,
                symbols=y,
                termination_symbol=blank_id,
                lm_only_scale=self.lm_scale,
                am_only_scale=self.am_scale,
                boundary=boundary,
                reduction="sum",
                return_grad=True,
            )
            return loss, k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary, self.prune_range)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on `device`; the host does not wait for the copy."""
    pin = device.type == "cuda" and not values.is_cuda
    return (values.pin_memory() if pin else values).to(device, non_blocking=True)


def prune(decoder_projected: Tensor, ranges: Tensor) -> Tensor:
    """Select from decoder states (N, S + 1, J) those that `ranges` (N, T', R) names in each frame: (N, T', R, J).

    The values are those of k2.do_rnnt_pruning. It gathers from a view expanded over frames, whose gradient is a dense
    (N, T', S + 1, J); the gradient of a row index has the size of the states.
    """
    n, states, dim = decoder_projected.shape
    rows = ranges + states * torch.arange(n, device=ranges.device).view(n, 1, 1)
    # embedding has a faster gradient on a CPU than index_select or indexing
    return nn.functional.embedding(rows, decoder_projected.reshape(n * states, dim))


def _checked_labels(
    y: Tensor, y_lens: Tensor, lengths: Tensor, vocab_size: int, blank_id: int, prune_range: int
) -> Tensor:
    """Return `y` padded with blanks, with at least one column as k2 requires; ValueError for impossible labels."""
    if y.size(1) == 0:
        y = y.new_full((y.size(0), 1), blank_id)
    inside = torch.arange(y.size(1), device=y.device) < y_lens.unsqueeze(1)
    wrong = inside & ((y < 0) | (y >= vocab_size) | (y == blank_id))
    if wrong.any():
        utterance, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"label {int(y[utterance, position])} at position {position} of utterance {utterance}: labels are 0 to "
            f"{vocab_size - 1} except the blank {blank_id}; was the text encoded with another tokenizer?"
        )
    # from one frame to the next the range moves by at most prune_range - 1 symbols
    short = lengths * (prune_range - 1) < y_lens
    short |= lengths < 1
    if short.any():
        utterance = int(short.nonzero()[0])
        raise ValueError(
            f"utterance {utterance} has {int(y_lens[utterance])} labels and {int(lengths[utterance])} output frames: "
            f"with loss.prune_range = {prune_range} a frame has room for {prune_range - 1} labels; drop it, as training"
            " does with utterances that have more labels than frames"
        )
    return torch.where(inside, y, torch.full_like(y, blank_id))


def _with_gradient(loss: Callable[..., Tensor], inputs: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """Return loss(*inputs), differentiable with respect to `inputs` and `parameters`; see the module's docstring."""
    if not torch.is_grad_enabled():
        return loss(*inputs)
    return _WithGradient.apply(loss, len(inputs), *inputs, *parameters)


class _WithGradient(torch.autograd.Function):
    """Computes the gradients of a scalar together with it, so that its graph does not outlive the call."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            value = loss(*leaves)
            # the parameters' own gradients are not touched: the backward pass adds to them, through the hooks of DDP
            ctx.save_for_backward(*torch.autograd.grad(value, [*leaves, *parameters]))
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grad * saved for saved in ctx.saved_tensors))
