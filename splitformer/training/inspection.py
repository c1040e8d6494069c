"""Statistics of every layer's output and gradients, and of every exit's posteriors, for one training batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitformer.data.batch import Batch
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import trial, valid_frames
from splitformer.report.tables import markdown_table
from splitformer.training.precision import Precision


@dataclass
class Activation:
    """The output of one module for a batch, including padding."""

    name: str
    rms: float
    largest: float
    not_finite: float  # share of the values
    weight_rms: float  # NaN without parameters
    gradient_rms: float = math.nan  # of the loss with respect to the output; NaN without gradient


@dataclass
class ExitStatistics:
    """The CTC posteriors of one exit over the valid frames of a batch, in evaluation mode."""

    layer: int
    loss: float  # per label token, in training mode
    blank: float  # mean posterior
    entropy: float  # mean, in nats


@dataclass
class Inspection:
    """Statistics of modules, in the order in which they run, and of exits.

    Look for values that grow from layer to layer without bound, gradients that vanish towards the front end, and exits
    whose posteriors are all blank (an entropy near zero with a large loss).
    """

    layers: list[Activation]
    exits: list[ExitStatistics]

    def __str__(self) -> str:
        header = ["output of", "rms", "largest", "gradient rms", "weight rms", "not finite"]
        rows = []
        for each in self.layers:
            values = (each.rms, each.largest, each.gradient_rms, each.weight_rms)
            rows.append([each.name, *(f"{value:.3g}" for value in values), f"{100 * each.not_finite:.2g} %"])
        tables = [markdown_table(header, rows)]
        if self.exits:
            header = ["exit", "CTC loss", "blank posterior", "entropy"]
            rows = [[f"{e.layer}", *(f"{value:.3f}" for value in (e.loss, e.blank, e.entropy))] for e in self.exits]
            tables.append(markdown_table(header, rows))
        return "\n\n".join(tables)


def inspect(loss: MultiExitLoss, batch: Batch, precision: Precision, step: int) -> Inspection:
    """Return the statistics of training step `step` on `batch`; `loss` is left unchanged."""
    activations: list[Activation] = []
    batch = batch.to(next(loss.parameters()).device)
    with trial(loss), ExitStack() as stack:
        for name, module in _modules(loss.model):
            stack.callback(module.register_forward_hook(_recorder(name, activations)).remove)
        with precision.autocast():
            losses = loss(batch.x, batch.x_lens, batch.y, batch.y_lens, step)
        losses.total.backward()
        stack.close()  # the hooks are not for the posteriors
        loss.eval()
        with torch.no_grad(), precision.autocast():
            exits = _exits(loss, batch, losses.per_exit.tolist()) if "ctc" in loss.model.heads else []
        loss.train()
    return Inspection(activations, exits)


def _modules(model: AsrModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the front end, each layer and its components, each parallel branch, and each exit's heads."""
    encoder: Any = model.encoder
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


def _recorder(name: str, activations: list[Activation]) -> Any:
    """Return a forward hook that appends the statistics of a module's output."""

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
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

    return record


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else math.nan


def _exits(loss: MultiExitLoss, batch: Batch, losses: list[float]) -> list[ExitStatistics]:
    exits = []
    for exit_output, per_token in zip(loss.model.encoder(batch.x, batch.x_lens), losses, strict=True):
        log_probs = loss.model.ctc_log_probs(exit_output)
        frames = log_probs[valid_frames(exit_output.lengths, log_probs.size(1))]
        entropy = -(frames.exp() * frames).sum(dim=1)
        blank = frames[:, loss.blank_id].exp()
        exits.append(ExitStatistics(exit_output.layer, per_token, float(blank.mean()), float(entropy.mean())))
    return exits
