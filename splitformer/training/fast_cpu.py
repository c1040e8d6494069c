"""Faster layers for training on a CPU, put in the place of a model's own.

The model is written in plain `nn.Linear` and `nn.Dropout`. `speed_up` changes the class of these modules and nothing
else: parameters, their names, hooks and what a checkpoint holds stay. In evaluation, and so in every export, they
compute what `nn` computes. `benchmarks/train.md` has what they save.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CPUINFO = Path("/proc/cpuinfo")
MIN_WEIGHTS = 2**15
"""of a linear layer; oneDNN prepares a convolution anew for each number of frames, which takes longer below this"""


def speed_up(module: nn.Module) -> None:
    """Make the linear and dropout layers of `module` faster in training on a CPU, in place.

    Dropout draws other random numbers than `nn.Dropout` does; linear layers add up in another order.
    """
    by_convolution = mkl_is_slow()
    for each in module.modules():
        if type(each) is nn.Dropout:
            each.__class__ = ByteDropout
        elif type(each) is nn.Linear and by_convolution and each.weight.numel() >= MIN_WEIGHTS:
            each.__class__ = ConvolutionLinear


def mkl_is_slow() -> bool:
    """Whether torch multiplies float32 matrices by MKL on a processor that is not Intel's.

    MKL leaves most of the vector units of such a processor unused. oneDNN, which torch has for convolutions, does not.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return False
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return vendor is not None and vendor[1] != "GenuineIntel"


class ConvolutionLinear(nn.Linear):
    """`nn.Linear` that trains in float32 on a CPU as a convolution of kernel 1 over all frames."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not self.training or x.device.type != "cpu" or _autocast_on_cpu():  # bfloat16 products are oneDNN's anyway
            return super().forward(x)
        # One image, as wide as there are frames, channels last: the layout that the frames have in memory. A kernel
        # of 1 has nothing to dilate, but with one thread torch takes MKL for convolutions that are not dilated.
        image = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        weight = self.weight.view(self.out_features, self.in_features, 1, 1)
        out = nn.functional.conv2d(image, weight, self.bias, dilation=2)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def _autocast_on_cpu() -> bool:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.is_autocast_enabled("cpu")
    return torch.is_autocast_cpu_enabled()


class ByteDropout(nn.Dropout):
    """`nn.Dropout` that draws one random byte per element, eight at a time; p is rounded to a 256th.

    On a CPU torch draws one number after another, which took a fifth of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or x.device.type != "cpu" or _is_compiling():
            return super().forward(x)
        return _DropoutByBytes.apply(x, round(self.p * 256))


def _is_compiling() -> bool:
    """Whether torch.compile (torch 2) traces this call: it cannot view numbers as bytes."""
    return hasattr(torch, "compiler") and torch.compiler.is_compiling()


class _DropoutByBytes(torch.autograd.Function):
    """Keeps the bytes for the backward pass, a quarter of what the factors would take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """x (*); `dropped` in 256 of its elements become 0."""
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
        ctx.save_for_backward(drawn)
        ctx.dropped = dropped
        return _factors(drawn, dropped, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (drawn,) = ctx.saved_tensors
        return _factors(drawn, ctx.dropped, grad.dtype).mul_(grad), None


def _factors(drawn: Tensor, dropped: int, dtype: torch.dtype) -> Tensor:
    """0 where a byte of `drawn` is less than `dropped`, else the factor that keeps the mean.

    The bytes are compared as float32: torch has vector instructions for that, and none for bytes.
    """
    return drawn.to(torch.float32).ge_(dropped).mul_(256.0 / (256 - dropped)).to(dtype)
