"""The number format of matrix products in training."""

from __future__ import annotations

import re
import typing
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        self.scaler = _scaler(device) if self.name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.name == "bf16" else torch.float16)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo the loss scale; call it once per step, when all gradients are there."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights with finite gradients."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def overflow(self) -> bool:
        """Return whether the loss scale can explain gradients that are not finite; if so, it is lowered."""
        if self.scaler is None:
            return False
        self.scaler.update()
        if self.scaler.get_scale() < SMALLEST_SCALE:
            raise PrecisionError(
                f"gradients overflow in float16 even at a loss scale of {self.scaler.get_scale():g}: training "
                "diverges. Lower optim.base_lr, or train with --precision bf16 or fp32"
            )
        return True

    def state(self) -> dict[str, Any]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def _scaler(device: torch.device) -> Any:
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type)
    if device.type == "cuda":
        return torch.cuda.amp.GradScaler()
    raise PrecisionError(f"--precision fp16: torch {torch.__version__} has it on GPUs only; use auto, bf16 or fp32")


def _automatic(device: torch.device) -> str:
    if device.type == "cuda":  # not is_bf16_supported(), which also accepts emulation
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return "fp32"
    return "bf16" if flags and {"avx512_bf16", "amx_bf16"} & set(flags[1].split()) else "fp32"
