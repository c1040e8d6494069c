"""The pruned transducer loss at every exit (Kuang et al., "Pruned RNN-T for fast, memory-efficient ASR training",
Interspeech 2022, arXiv 2206.13236), with k2.

Per exit, a simple joiner that only adds, am(t) + lm(s), gives a first loss over all T' x (S + 1) nodes at little cost.
The occupation of its nodes says which `prune_range` symbols matter in each frame, and the real joiner is computed for
those only.

What the exits share and what not. The decoder and the lm side of the simple loss see no frames: they are computed
once. The am side, the pruning bounds and the joiner are each exit's own, because a deeper exit aligns otherwise.

Memory. The joiner's logits, (N, T', prune_range, V) and several tensors of that size around them, are by far the
largest of a step. Autograd would keep those of all exits until the backward pass. So `_WithGradient` computes an exit's
gradients along with its loss, and keeps those: as large as the encoder's output, not as the logits. The peak is then
one exit's, whatever the number of exits, and nothing is computed twice. `benchmarks/transducer_loss.py` shows it.
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


class PrunedTransducerLoss(nn.Module):
    """Simple and pruned loss at every exit; holds the simple projections, which only training needs."""

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
    ) -> Tensor:
        """(E,) simple_scale * simple + pruned_scale * pruned at each exit, in nats, summed over the batch.

        Args:
          model: whose decoder and joiners are trained
          exits: of one batch, all of the same lengths
          y: (N, S) labels, padded with anything; y_lens: (N,) valid labels, which may be 0
        Raises:
          ValueError: for labels outside the vocabulary, and for utterances with too few frames for their labels.
        """
        blank_id = model.decoder.blank_id
        lengths = exits[0].lengths
        y = _checked_labels(y, y_lens, lengths, model.decoder.vocab_size, blank_id, self.prune_range)
        # begin_symbol, begin_frame, end_symbol, end_frame
        boundary = torch.stack([torch.zeros_like(lengths), torch.zeros_like(lengths), y_lens, lengths], dim=1)
        decoder_out = model.decoder.teacher_forced(y)
        lm = self.simple_lm_proj(decoder_out).float()

        losses = []
        for exit_output in exits:
            joiner, am_proj = model.joiner(exit_output.layer), self.simple_am_proj[str(exit_output.layer)]

            def exit_loss(encoder_out, decoder_out, lm, joiner=joiner, am_proj=am_proj):
                # k2 asserts that the padded T' is at least S; frames behind an utterance's end count for nothing
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
        """The summed simple loss, and for each frame the symbols that matter: (N, T', at most prune_range)."""
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
            # as wide as the longest transcript needs, where that is less than prune_range
            return loss, k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary, self.prune_range)


def prune(decoder_projected: Tensor, ranges: Tensor) -> Tensor:
    """(N, S + 1, J) decoder states to (N, T', R, J), those that `ranges` (N, T', R) names for each frame.

    The values are k2.do_rnnt_pruning's. That gathers from a view expanded over frames, whose gradient is a dense
    (N, T', S + 1, J); an index into rows has a gradient of the size of the states.
    """
    n, states, dim = decoder_projected.shape
    rows = ranges + states * torch.arange(n, device=ranges.device).view(n, 1, 1)
    # of index_select, indexing and embedding, the last has the fastest gradient on a CPU
    return nn.functional.embedding(rows, decoder_projected.reshape(n * states, dim))


def _checked_labels(
    y: Tensor, y_lens: Tensor, lengths: Tensor, vocab_size: int, blank_id: int, prune_range: int
) -> Tensor:
    """`y` with blanks for padding and at least one column, which k2 wants; ValueError for labels that cannot be."""
    if y.size(1) == 0:
        y = y.new_full((y.size(0), 1), blank_id)
    inside = torch.arange(y.size(1), device=y.device) < y_lens.unsqueeze(1)
    wrong = inside & ((y < 0) | (y >= vocab_size) | (y == blank_id))
    if wrong.any():
        utterance, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"label {int(y[utterance, position])} at position {position} of utterance {utterance}: labels are 0 to "
            f"{vocab_size - 1} without the blank {blank_id}; was the text encoded with another tokenizer?"
        )
    # from one frame to the next the range moves by at most prune_range - 1 symbols
    short = lengths * (prune_range - 1) < y_lens
    short |= lengths < 1
    if short.any():
        utterance = int(short.nonzero()[0])
        raise ValueError(
            f"utterance {utterance} has {int(y_lens[utterance])} labels and {int(lengths[utterance])} output frames: "
            f"with loss.prune_range = {prune_range} a frame has room for {prune_range - 1} labels; drop it, as "
            "training does with utterances that have more labels than frames"
        )
    return torch.where(inside, y, torch.full_like(y, blank_id))


def _with_gradient(loss: Callable[..., Tensor], inputs: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
    """loss(*inputs), differentiable with respect to `inputs` and `parameters`; see the module's docstring."""
    if not torch.is_grad_enabled():
        return loss(*inputs)
    return _WithGradient.apply(loss, len(inputs), *inputs, *parameters)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradients are computed with it, so that nothing of its graph outlives the call."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], num_inputs: int, *tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            value = loss(*inputs)
            # a parameter's own gradient is left alone: the backward pass adds to it, through the hooks of DDP
            ctx.save_for_backward(*torch.autograd.grad(value, [*inputs, *parameters]))
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(grad * saved for saved in ctx.saved_tensors))
