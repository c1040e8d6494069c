"""Conformer layer (arXiv 2005.08100) with absolute positions, as in the published systems.

It can be traced and exported: attention is written out, pointwise convolutions are Linear, and nothing branches on a
length. Padding never affects a valid frame: attention gives padded keys no weight, the depthwise convolution sees zeros
there, and batch normalisation computes its statistics over valid frames only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

MASK_BIAS = -1.0e4
"""Added to the scores of padded keys: its exp() is zero in float32, and it is finite in float16."""

FUSED_ATTENTION = getattr(nn.functional, "scaled_dot_product_attention", None)
"""Only in torch 2. Used without dropout or on a GPU: its CPU fallback for dropout was slower at commit fc44523."""


def valid_frames(lengths: Tensor, num_frames: int) -> Tensor:
    """Return an (N, T) boolean mask that is true on valid frames, for lengths (N,) and T = `num_frames`."""
    return torch.arange(num_frames, device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)


class FeedForward(nn.Module):
    """LayerNorm, Linear, SiLU, Linear."""

    def __init__(self, d_model: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, hidden_dim)
        self.down = nn.Linear(hidden_dim, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(nn.functional.silu(self.up(self.norm(x))))
        return self.dropout(self.down(x))


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, equation 1)."""

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1.0 / math.sqrt(d_model // num_heads)
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj.weight)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, key_bias: Tensor) -> Tensor:
        """Map x (N, T, D) to the same shape; key_bias (N, 1, 1, T) is 0 on valid keys, `MASK_BIAS` on padded ones."""
        n, t, d = x.shape
        projected = self.in_proj(x).view(n, t, 3, self.num_heads, d // self.num_heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)  # iterating over a tensor does not trace
        dropout = self.dropout.p if self.training else 0.0
        if FUSED_ATTENTION is not None and not torch.jit.is_tracing() and (x.is_cuda or dropout == 0.0):
            out = FUSED_ATTENTION(q, k, v, key_bias.to(q.dtype), dropout)
        else:
            scores = torch.matmul(q * self.scale, k.transpose(-2, -1)) + key_bias
            out = torch.matmul(self.dropout(scores.softmax(dim=-1)), v)
        return self.out_proj(out.transpose(1, 2).reshape(n, t, d))


@contextmanager
def trial(module: nn.Module) -> Iterator[None]:
    """Restore batch statistics and gradients on exit.

    Batch statistics are those of this rank only, so that no rank waits for another.
    """
    norms = [each for each in module.modules() if isinstance(each, MaskedBatchNorm)]
    buffers = [buffer.clone() for buffer in module.buffers()]
    for norm in norms:
        norm.over_ranks = False
    try:
        yield
    finally:
        for norm in norms:
            norm.over_ranks = True
        for buffer, before in zip(module.buffers(), buffers, strict=True):
            buffer.copy_(before)
        for parameter in module.parameters():
            parameter.grad = None


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of x over all ranks, differentiable; outside distributed training, return x.

    All ranks must pass the same shape.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return _SumOverRanks.apply(x)
    return x


class _SumOverRanks(torch.autograd.Function):
    """The losses of all ranks depend on the sum, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the valid frames of a padded batch; same parameters and buffers as `BatchNorm1d`.

    In distributed training, statistics are computed over all ranks, so that the model does not depend on their number;
    `trial` switches that off.
    """

    over_ranks = True
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise x (N, T, D); mask (N, T, 1) is 1 on valid frames and 0 on padded ones."""
        if self.training:
            total = sum_over_ranks if self.over_ranks else nn.Identity()
            sums = total(torch.cat([(x * mask).sum(dim=(0, 1)), mask.sum().view(1)]))
            mean, count = sums[:-1] / sums[-1], sums[-1].detach()
            var = total(((x - mean).square() * mask).sum(dim=(0, 1))) / count
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight * torch.rsqrt(var + self.eps)
        return x * scale + (self.bias - mean * scale)


class ConvolutionModule(nn.Module):
    """LayerNorm, pointwise, GLU, depthwise, BatchNorm, SiLU, pointwise."""

    def __init__(self, d_model: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.pointwise1 = nn.Linear(d_model, 2 * d_model)
        self.depthwise = nn.Conv1d(d_model, d_model, kernel, padding=(kernel - 1) // 2, groups=d_model)
        self.batch_norm = MaskedBatchNorm(d_model)
        self.pointwise2 = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map x (N, T, D) to the same shape; mask (N, T, 1) as in `MaskedBatchNorm`."""
        x = nn.functional.glu(self.pointwise1(self.norm(x)), dim=-1) * mask
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        x = nn.functional.silu(self.batch_norm(x, mask))
        return self.dropout(self.pointwise2(x))


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, LayerNorm (arXiv 2005.08100, equation 1)."""

    def __init__(self, d_model: int, num_heads: int, feedforward_dim: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.feed_forward1 = FeedForward(d_model, feedforward_dim, dropout)
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, num_heads, dropout)
        self.attention_dropout = nn.Dropout(dropout)
        self.convolution = ConvolutionModule(d_model, kernel, dropout)
        self.feed_forward2 = FeedForward(d_model, feedforward_dim, dropout)
        self.final_norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, key_bias: Tensor, mask: Tensor) -> Tensor:
        """Map x (N, T, D) to the same shape; key_bias (N, 1, 1, T) and mask (N, T, 1) are from `frame_masks`."""
        x = x + 0.5 * self.feed_forward1(x)
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), key_bias))
        x = x + self.convolution(x, mask)
        x = x + 0.5 * self.feed_forward2(x)
        return self.final_norm(x)


def frame_masks(lengths: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention's key_bias (N, 1, 1, T) and the mask (N, T, 1), for x (N, T, D) with `lengths` (N,)."""
    mask = valid_frames(lengths, x.size(1)).to(x.dtype)
    return ((1.0 - mask) * MASK_BIAS).unsqueeze(1).unsqueeze(1), mask.unsqueeze(2)
