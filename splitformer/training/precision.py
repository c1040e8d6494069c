"""The number format of matrix products in training."""

from __future__ import annotations

import functools
import re
import typing
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from splitformer.errors import UserError
from splitformer.training.options import PrecisionName

SMALLEST_SCALE = 2.0**-8
"""Gradients that overflow at a lower loss scale overflow at any scale: the model diverges."""


class PrecisionError(UserError):
    """The device does not support a number format, or training failed in it."""


class Precision:
    """Autocast, and the loss scale that keeps small gradients from vanishing in float16.

    `auto` is bfloat16 if the device computes it in hardware; otherwise it is float16 on a GPU and float32 on a CPU.
    """

    def __init__(self, requested: PrecisionName, device: torch.device) -> None:
        """Raises PrecisionError for an unknown name, and for float16 if this torch has no loss scale on the device."""
        if requested not in typing.get_args(PrecisionName):
            choices = ", ".join(typing.get_args(PrecisionName))
            raise PrecisionError(f"--precision {requested!r}: choose one of {choices}")
        self.name = _automatic(device) if requested == "auto" else requested
        self.device = device
        scaler = getattr(torch.amp, "GradScaler", None)  # torch 2
        if self.name == "fp16" and device.type != "cuda" and scaler is None:
            version = torch.__version__
            raise PrecisionError(f"--precision fp16: torch {version} has it on GPUs only; choose auto, bf16 or fp32")
        scaler = functools.partial(scaler, device.type) if scaler else torch.cuda.amp.GradScaler
        self.scaler: Any = scaler(enabled=self.name == "fp16")
        """of the loss; it passes everything through unless the precision is float16"""

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.name == "bf16" else torch.float16)

    def overflow(self) -> bool:
        """Return whether the loss scale can explain gradients that are not finite."""
        if self.name != "fp16":
            return False
        if self.scaler.get_scale() < SMALLEST_SCALE:
            raise PrecisionError(
                f"gradients overflow in float16 even at a loss scale of {self.scaler.get_scale():g}: training "
                "diverges. Lower optim.base_lr, or train with --precision bf16 or fp32"
            )
        return True


def _automatic(device: torch.device) -> str:
    if device.type == "cuda":  # not is_bf16_supported(), which also accepts emulation
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return "fp32"
    return "bf16" if flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()) else "fp32"
