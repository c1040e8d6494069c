"""In which number format the products of a training step are computed."""

from __future__ import annotations

import functools
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitformer.errors import UserError

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
SMALLEST_SCALE = 2.0**-8
"""A loss scale below this means that gradients overflow whatever the scale: the model diverges."""


class PrecisionError(UserError):
    """A number format that the device lacks, or in which training has failed."""


class Precision:
    """Autocast, and for float16 the loss scale that keeps small gradients from vanishing.

    `auto` is bfloat16 where the device computes with it in hardware, on other GPUs float16, on other CPUs float32. (On
    a CPU with AVX512-BF16 or AMX a step of a small model takes about half the time.)
    """

    def __init__(self, wanted: str, device: torch.device) -> None:
        """Raises PrecisionError for float16 where this torch has no loss scale for the device."""
        if wanted not in PRECISIONS:
            raise PrecisionError(f"--precision {wanted!r}: choose one of {', '.join(PRECISIONS)}")
        self.name = _automatic(device) if wanted == "auto" else wanted
        self.device = device
        self.scaler = _scaler(device) if self.name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.name == "bf16" else torch.float16)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Call once per step, when all gradients are there."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step, for finite gradients."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def overflow(self) -> bool:
        """Gradients were not finite. True where that is the loss scale's doing, which is lowered, and no fault."""
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
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if _cpu_flags() & {"avx512_bf16", "amx_bf16"} else "fp32"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says of the processor; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()
