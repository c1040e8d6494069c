"""What flows through a model: statistics of every layer's output and gradients, for one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitformer.data.batches import Batch
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.conformer import statistics_of_one_rank, valid_frames
from splitformer.training.precision import Precision


@dataclass
class Activation:
    """One module's output over a batch, its padding included."""

    name: str
    rms: float
    largest: float
    not_finite: float
    """share of the values"""
    gradient_rms: float = math.nan
    """of the loss by this output; NaN where none came back"""
    weight_rms: float = math.nan
    """of the module's parameters"""


@dataclass
class ExitStatistics:
    """One exit's CTC posteriors over the valid frames of a batch, in evaluation mode."""

    layer: int
    loss: float
    """per label token, in training mode"""
    blank: float
    """mean posterior of the blank"""
    entropy: float
    """mean, in nats"""


def inspect(
    loss: MultiExitLoss, batch: Batch, precision: Precision, step: int
) -> tuple[list[Activation], list[ExitStatistics]]:
    """Statistics of a training step's layers, in the order in which the batch meets them, and of its exits.

    `loss` is left as it was. What to look for: values that grow from layer to layer without bound, a gradient that
    vanishes towards the front end, an exit whose posteriors are all blank (an entropy near zero with a large loss).
    """
    buffers = [buffer.clone() for buffer in loss.buffers()]
    activations: list[Activation] = []
    batch = batch.to(next(loss.parameters()).device)
    with ExitStack() as stack:
        for name, module in _parts(loss.model):
            handle = module.register_forward_hook(_note(name, activations))
            stack.callback(handle.remove)
        stack.enter_context(statistics_of_one_rank(loss))
        with precision.autocast():
            losses = loss(batch.x, batch.x_lens, batch.y, batch.y_lens, step)
        losses.total.backward()
    for parameter in loss.parameters():
        parameter.grad = None
    loss.eval()
    with torch.no_grad(), precision.autocast():
        exits = _exits(loss, batch, losses.per_exit.tolist())
    loss.train()
    for buffer, before in zip(loss.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return activations, exits


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The front end, each layer and what it is made of, each parallel branch, each exit's heads."""
    encoder = model.encoder
    yield "front end", encoder.subsampling
    for number, layer in enumerate(encoder.layers, 1):
        yield f"layer {number}", layer
        for part in ("feed_forward1", "attention", "convolution", "feed_forward2"):
            yield f"layer {number} {part}", getattr(layer, part)
    for exit_layer, branch in getattr(encoder, "parallel", {}).items():
        yield f"parallel {exit_layer}", branch
    for kind in ("ctc_heads", "joiners"):
        for exit_layer, head in getattr(model, kind, {}).items():
            yield f"{kind[:-1].replace('_', ' ')} {exit_layer}", head


def _note(name: str, activations: list[Activation]) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        values = x.detach().float()
        finite = torch.isfinite(values)
        weights = [p.detach().float().square().mean() for p in module.parameters()]
        activation = Activation(
            name,
            rms=_rms(values[finite]),
            largest=float(values[finite].abs().max()) if bool(finite.any()) else math.nan,
            not_finite=1.0 - float(finite.float().mean()),
            weight_rms=float(torch.stack(weights).mean().sqrt()) if weights else math.nan,
        )
        activations.append(activation)
        if x.requires_grad:
            x.register_hook(lambda gradient: setattr(activation, "gradient_rms", _rms(gradient.float())))

    return note


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else math.nan


def _exits(loss: MultiExitLoss, batch: Batch, losses: list[float]) -> list[ExitStatistics]:
    if "ctc" not in loss.model.heads:
        return []
    found = []
    for exit_output, per_token in zip(loss.model.encoder(batch.x, batch.x_lens), losses, strict=True):
        log_probs = loss.model.ctc_log_probs(exit_output)
        frames = log_probs[valid_frames(exit_output.lengths, log_probs.size(1))]
        entropy = -(frames.exp() * frames).sum(dim=1)
        blank = frames[:, loss.blank_id].exp()
        found.append(ExitStatistics(exit_output.layer, per_token, float(blank.mean()), float(entropy.mean())))
    return found
