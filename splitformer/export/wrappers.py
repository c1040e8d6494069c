"""Modules that trace: what an exported file computes, as functions of tensors alone.

Each wraps parts of a model that `load_model(path, exit_layer=exit)` has cut off at an exit, so that nothing above it is
there to be written. Inputs and outputs are in the order that sherpa-onnx expects; it knows them by place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.decoder import Decoder
from splitformer.model.encoder import Encoder
from splitformer.model.joiner import Joiner
from splitformer.model.subsampling import MIN_FRAMES


class ExportError(UserError):
    """A model that cannot be exported as asked, or whose file computes something else."""


@contextmanager
def refuse_frozen_values(name: str) -> Iterator[None]:
    """Raises ExportError, which names the file, where tracing within took something for a constant.

    Torch's warnings are gathered and looked at afterwards: those that it gives from C++ cannot be made exceptions.
    """
    with warnings.catch_warnings(record=True) as gathered:
        warnings.simplefilter("always")
        yield
    for each in gathered:
        if issubclass(each.category, torch.jit.TracerWarning):
            raise ExportError(f"{name}: the trace would freeze what depends on the input: {each.message}")


class CtcExport(nn.Module):
    """Features to the CTC log-probabilities of the model's last exit."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.head = model.ctc_heads[str(model.encoder.exit_layers[-1])]

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C) with x_lens (N,) to log_probs (N, T', V) and their lengths (N,), int64."""
        hidden, lengths = last_exit(self.encoder, x, x_lens)
        return self.head(hidden).log_softmax(dim=-1), lengths


class TransducerEncoderExport(nn.Module):
    """Features to the last exit's output, as its joiner takes it."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.projection = model.joiner(model.encoder.exit_layers[-1]).encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C) with x_lens (N,) to encoder_out (N, T', J) and lengths (N,), int64."""
        hidden, lengths = last_exit(self.encoder, x, x_lens)
        return self.projection(hidden), lengths


class DecoderExport(nn.Module):
    """The last tokens to what one exit's joiner takes."""

    def __init__(self, decoder: Decoder, joiner: Joiner) -> None:
        super().__init__()
        self.decoder, self.projection = decoder, joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        """y (N, context_size), int64, to (N, J). A negative token stands for none, as the blank does in training."""
        return self.projection(self.decoder(y.clamp(min=self.decoder.blank_id))).squeeze(1)


class JoinerExport(nn.Module):
    """One frame and one context, both projected, to logits."""

    def __init__(self, joiner: Joiner) -> None:
        super().__init__()
        self.output_linear = joiner.output_linear

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """(N, J) each to (N, V)."""
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class FirstStage(nn.Module):
    """Features to the first exit."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.encoder, self.layer = model.encoder, model.encoder.exit_layers[0]
        self.head = model.ctc_heads[str(self.layer)]

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, C) with x_lens (N,) to hidden (N, T', D), lengths (N,) and log_probs (N, T', V)."""
        hidden, lengths = self.encoder.front_end(at_least_one_output_frame(x), x_lens)
        hidden = self.encoder.block(self.layer, hidden, lengths)
        return hidden, lengths, self.head(hidden).log_softmax(dim=-1)


class NextStage(nn.Module):
    """One exit to the next."""

    def __init__(self, model: AsrModel, layer: int) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = model.encoder, layer, model.ctc_heads[str(layer)]

    def forward(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stage before's hidden (N, T', D) and lengths (N,) to the same three as `FirstStage`."""
        hidden = self.encoder.block(self.layer, hidden, lengths)
        # an output that is an input is no node of the graph, and ONNX wants one
        return hidden, lengths + 0, self.head(hidden).log_softmax(dim=-1)


def last_exit(encoder: Encoder, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Features x (N, T, C) with x_lens (N,) to the last exit's output (N, T', D) and lengths (N,)."""
    hidden, lengths = encoder.front_end(at_least_one_output_frame(x), x_lens)
    for layer in encoder.exit_layers:
        hidden = encoder.block(layer, hidden, lengths)
    return hidden, lengths


def at_least_one_output_frame(x: Tensor) -> Tensor:
    """x (N, T, C), padded where the front end's convolutions would not fit (T < 7).

    The frames are counted by a sum, because in a trace a size is sometimes a number and the branch would be frozen.
    """
    frames = torch.ones_like(x[0, :, 0], dtype=torch.int64).sum()
    padded = torch.nn.functional.pad(x, (0, 0, 0, MIN_FRAMES - 1))
    return padded[:, : frames.clamp(min=MIN_FRAMES)]


@dataclass(frozen=True)
class Part:
    """One file to be written.

    stem: its name, without what the format adds. example: inputs to trace with. axes: {name: {axis: what varies}}.
    metadata: what is told of this file beside what is told of all.
    """

    stem: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]
    metadata: dict[str, str] = field(default_factory=dict)


# Two utterances of unequal length, an odd number of frames: what tracing could mistake for a constant is none of them.
TRACED_LENGTHS = (67, 50)


def head_parts(model: AsrModel, head: str) -> list[Part]:
    """The files of a model that ends at its exit: one for `ctc`, three for `transducer`.

    Raises ExportError where the model has no such head.
    """
    if head not in model.heads:
        raise ExportError(f"the model has no {head} head; choose among {', '.join(model.heads)}")
    layer = model.encoder.exit_layers[-1]
    features = _traced_features(model)
    axes = {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}, "lengths": {0: "N"}}
    if head == "ctc":
        axes["log_probs"] = {0: "N", 1: "T_out"}
        parts = [
            Part(
                f"model-exit-{layer:02d}",
                CtcExport(model),
                features,
                ("x", "x_lens"),
                ("log_probs", "lengths"),
                axes,
                {"model_type": "zipformer2_ctc"},
            )
        ]
    else:
        joiner, context = model.joiner(layer), model.decoder.context_size
        joined = joiner.encoder_proj.out_features
        encoder_axes = {**axes, "encoder_out": {0: "N", 1: "T_out"}}
        state_axes = {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}, "logit": {0: "N"}}
        tokens = torch.zeros(2, context, dtype=torch.int64)
        states = (torch.randn(2, joined), torch.randn(2, joined))
        parts = [
            Part(
                f"encoder-exit-{layer:02d}",
                TransducerEncoderExport(model),
                features,
                ("x", "x_lens"),
                ("encoder_out", "lengths"),
                encoder_axes,
                {"model_type": "zipformer2"},
            ),
            Part(
                f"decoder-exit-{layer:02d}",
                DecoderExport(model.decoder, joiner),
                (tokens,),
                ("y",),
                ("decoder_out",),
                {"y": {0: "N"}, "decoder_out": {0: "N"}},
                {"context_size": str(context)},
            ),
            Part(
                f"joiner-exit-{layer:02d}",
                JoinerExport(joiner),
                states,
                ("encoder_out", "decoder_out"),
                ("logit",),
                state_axes,
                {"joiner_dim": str(joined)},
            ),
        ]
    return [_evaluating(part) for part in parts]


def stage_parts(model: AsrModel) -> list[Part]:
    """One file per exit of the model, each going on from the one before; stages count from 1.

    Raises ExportError for a model without CTC heads: what a policy reads are their log-probabilities.
    """
    if "ctc" not in model.heads:
        raise ExportError(f"stages are for exit policies, which read CTC's log-probabilities; heads: {model.heads}")
    layers = model.encoder.exit_layers
    axes = {
        "x": {0: "N", 1: "T"},
        "x_lens": {0: "N"},
        "hidden_in": {0: "N", 1: "T_out"},
        "lengths_in": {0: "N"},
        "hidden": {0: "N", 1: "T_out"},
        "lengths": {0: "N"},
        "log_probs": {0: "N", 1: "T_out"},
    }
    parts = []
    for stage, layer in enumerate(layers, 1):
        if stage == 1:
            module: nn.Module = FirstStage(model)
            example, inputs = _traced_features(model), ("x", "x_lens")
        else:
            module = NextStage(model, layer)
            example = (torch.randn(2, 15, module.head.in_features), torch.tensor([15, 11]))
            inputs = ("hidden_in", "lengths_in")
        outputs = ("hidden", "lengths", "log_probs")
        parts.append(
            Part(
                f"encoder-stage-{stage:02d}",
                module,
                example,
                inputs,
                outputs,
                {name: axes[name] for name in (*inputs, *outputs)},
                {
                    "model_type": "splitformer_stage",
                    "stage": str(stage),
                    "stages": str(len(layers)),
                    "exit_layer": str(layer),
                },
            )
        )
    return [_evaluating(part) for part in parts]


def _traced_features(model: AsrModel) -> tuple[Tensor, Tensor]:
    bins = model.encoder.num_mel_bins
    return torch.randn(len(TRACED_LENGTHS), max(TRACED_LENGTHS), bins), torch.tensor(TRACED_LENGTHS)


def _evaluating(part: Part) -> Part:
    part.module.eval()
    return part
