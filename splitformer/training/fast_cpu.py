"""Linear layers whose products take the faster of torch's two CPU libraries."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

CPUINFO = Path("/proc/cpuinfo")


def mkl_is_slow() -> bool:
    """Whether this torch multiplies float32 matrices by MKL on a processor that is not Intel's: MKL leaves most of
    such a processor's vector units unused, and oneDNN, which torch has for convolutions, does not."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return False
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return vendor is not None and vendor[1] != "GenuineIntel"


AS_CONVOLUTION = mkl_is_slow()
MIN_WEIGHTS = 2**15
"""of a layer; a convolution is prepared anew for each number of frames, which for less than these takes longer"""


class Linear(nn.Linear):
    """`nn.Linear` that, in training in float32 on a CPU where MKL is slow, is computed as a convolution of kernel 1
    over all frames: products and sums are the same, their order is not. `benchmarks/train.md` has what it saves.

    In evaluation, and so in every export, it is `nn.Linear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if not (
            AS_CONVOLUTION
            and self.training
            and x.device.type == "cpu"
            and self.weight.numel() >= MIN_WEIGHTS
            and not _autocast_on_cpu()  # products in bfloat16 are oneDNN's anyway
        ):
            return super().forward(x)
        # one image, as wide as there are frames, channels last: that is how the frames lie in memory. A kernel of 1
        # has nothing to dilate; but with one thread torch has a kernel of its own, by MKL, for what is not dilated
        image = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        weight = self.weight.view(self.out_features, self.in_features, 1, 1)
        out = nn.functional.conv2d(image, weight, self.bias, dilation=2)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def _autocast_on_cpu() -> bool:
    if hasattr(torch, "get_autocast_dtype"):  # torch 2.4
        return torch.is_autocast_enabled("cpu")
    return torch.is_autocast_cpu_enabled()
