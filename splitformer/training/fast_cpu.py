"""Faster linear and dropout layers for training on a CPU.

`speed_up` changes the class of a model's `nn.Linear` and `nn.Dropout` modules and nothing else: parameters, hooks and
checkpoints stay the same. In evaluation, and so in every export, these layers compute what `nn` computes. See
`benchmarks/train.md` for the speed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CPUINFO = Path("/proc/cpuinfo")
MIN_WEIGHTS = 2**15
"""Size of the smallest linear layer to replace: oneDNN takes time to set up a convolution for each number of frames."""


def speed_up(module: nn.Module) -> None:
    """Replace the linear and dropout layers of `module`, in place.

    Dropout then draws other random numbers than `nn.Dropout`, and linear layers sum in another order than `nn.Linear`.
    """
    by_convolution = mkl_is_slow()
    for each in module.modules():
        if type(each) is nn.Dropout:
            each.__class__ = ByteDropout
        elif type(each) is nn.Linear and by_convolution and each.weight.numel() >= MIN_WEIGHTS:
            each.__class__ = ConvolutionLinear


def mkl_is_slow() -> bool:
    """Return whether torch multiplies float32 matrices with MKL on a processor that is not Intel's.

    MKL does not use most vector units of such a processor. oneDNN, which torch uses for convolutions, does.
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
    """`nn.Linear`, computed as a convolution of kernel 1 over all frames when training in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        new = hasattr(torch, "get_autocast_dtype")  # torch 2.4
        autocast = torch.is_autocast_enabled("cpu") if new else torch.is_autocast_cpu_enabled()  # type: ignore[call-arg]
        if not self.training or x.device.type != "cpu" or autocast:  # bfloat16 uses oneDNN anyway
            return super().forward(x)
        # One image as wide as there are frames, channels last, which is the layout of the frames in memory. Dilation
        # does not affect a kernel of 1, but with one thread torch uses MKL for convolutions without dilation.
        image = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        weight = self.weight.view(self.out_features, self.in_features, 1, 1)
        out = nn.functional.conv2d(image, weight, self.bias, dilation=2)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class ByteDropout(nn.Dropout):
    """`nn.Dropout` that draws one random byte per element, eight at a time; p is rounded to a multiple of 1/256.

    torch draws one number after another on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        compiling = hasattr(torch, "compiler") and torch.compiler.is_compiling()  # it cannot view numbers as bytes
        if not self.training or self.p == 0.0 or x.device.type != "cpu" or compiling:
            return super().forward(x)
        return _DropoutByBytes.apply(x, round(self.p * 256))


class _DropoutByBytes(torch.autograd.Function):
    """Saves the bytes for the backward pass, which take a quarter of the memory of the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        """Set `dropped` in 256 of the elements of x, of any shape, to 0."""
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
    """Return 0 where a byte of `drawn` is less than `dropped`, and elsewhere the factor that preserves the mean.

    The bytes are compared as float32, for which torch uses vector instructions; for bytes it does not.
    """
    return drawn.to(torch.float32).ge_(dropped).mul_(256.0 / (256 - dropped)).to(dtype)
