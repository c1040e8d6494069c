"""Modules that can be traced: what each exported file computes, as a function of tensors.

Each wraps parts of a model that `load_model(checkpoint, exit_layer=exit)` has truncated at an exit, so that the layers
above it are in no file. Inputs and outputs are in the order that sherpa-onnx expects: it identifies them by position.
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
    """A model cannot be exported as asked, or an exported file computes something else than PyTorch."""


@contextmanager
def refuse_frozen_values(name: str) -> Iterator[None]:
    """Raise an ExportError, which names the file, if tracing in the block freezes a value that depends on the input.

    The warnings are collected and examined afterwards: those that torch issues from C++ cannot be made exceptions.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, torch.jit.TracerWarning):
            raise ExportError(f"{name}: tracing would freeze a value that depends on the input: {warning.message}")


class ExitExport(nn.Module):
    """Features to the output of the model's last exit: CTC log-probabilities, or what its transducer joiner takes."""

    def __init__(self, model: AsrModel, head: str) -> None:
        super().__init__()
        self.encoder, self.head = traceable_encoder(model), head
        layer = self.encoder.exit_layers[-1]
        self.projection = model.ctc_heads[str(layer)] if head == "ctc" else model.joiner(layer).encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, C) with x_lens (N,) to log_probs (N, T', V) or encoder_out (N, T', J), and lengths (N,), int64."""
        hidden, lengths = self.encoder.front_end(at_least_one_output_frame(x), x_lens)
        for layer in self.encoder.exit_layers:
            hidden = self.encoder.block(layer, hidden, lengths)
        output = self.projection(hidden)
        return (output.log_softmax(dim=-1) if self.head == "ctc" else output), lengths


class DecoderExport(nn.Module):
    """The last tokens to the decoder output, projected for one exit's joiner."""

    def __init__(self, decoder: Decoder, joiner: Joiner) -> None:
        super().__init__()
        self.decoder, self.projection = decoder, joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        """y (N, context_size), int64, to (N, J). A negative token means no token, like the blank in training."""
        return self.projection(self.decoder(y.clamp(min=self.decoder.blank_id))).squeeze(1)


class JoinerExport(nn.Module):
    """One frame and one context, both projected, to logits."""

    def __init__(self, joiner: Joiner) -> None:
        super().__init__()
        self.output_linear = joiner.output_linear

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        """(N, J) each to (N, V)."""
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class Stage(nn.Module):
    """One exit's output to the next exit's output and CTC log-probabilities."""

    def __init__(self, model: AsrModel, layer: int) -> None:
        super().__init__()
        self.encoder, self.layer, self.head = traceable_encoder(model), layer, model.ctc_heads[str(layer)]

    def forward(self, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (N, T', D) with lengths (N,) to the next hidden, the same lengths and log_probs (N, T', V)."""
        hidden = self.encoder.block(self.layer, hidden, lengths)
        # + 0, because ONNX has no output that is an input
        return hidden, lengths + 0, self.head(hidden).log_softmax(dim=-1)


class FirstStage(Stage):
    """Features to the first exit's output and CTC log-probabilities."""

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, T, C) with x_lens (N,) to hidden (N, T', D), lengths (N,) and log_probs (N, T', V)."""
        return super().forward(*self.encoder.front_end(at_least_one_output_frame(x), x_lens))


def traceable_encoder(model: AsrModel) -> Encoder:
    """Return the model's encoder, or raise an ExportError if it is the U-Net, which cannot be traced."""
    if not isinstance(model.encoder, Encoder):
        raise ExportError("the U-Net encoder cannot be exported to ONNX or TorchScript; use --format safetensors")
    return model.encoder


def at_least_one_output_frame(x: Tensor) -> Tensor:
    """Return x (N, T, C), padded if it is too short for the front end's convolutions (T < 7).

    The frames are counted by a sum, because tracing may see `x.size(1)` as a number and freeze the branch.
    """
    frames = torch.ones_like(x[0, :, 0], dtype=torch.int64).sum()
    padded = torch.nn.functional.pad(x, (0, 0, 0, MIN_FRAMES - 1))
    return padded[:, : frames.clamp(min=MIN_FRAMES)]


FRAME_AXES = {"x": "T", "hidden_in": "T_out", "hidden": "T_out", "log_probs": "T_out", "encoder_out": "T_out"}
"""{tensor: name of its axis 1} for the tensors that have one row per frame."""


@dataclass(frozen=True)
class Part:
    """One file to be exported. Its module is set to evaluation mode.

    stem: file name without the suffix of the format.
    example: inputs to trace with.
    inputs, outputs: names of the tensors.
    metadata: what is stored in this file beside the metadata of all files.
    """

    stem: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.module.eval()

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """{tensor: {axis: name}} of the axes that vary: the batch and, where there is one, the frames."""
        single_frames = {name for name, tensor in zip(self.inputs, self.example) if tensor.dim() < 3}
        return {
            name: {0: "N", 1: FRAME_AXES[name]} if name in FRAME_AXES.keys() - single_frames else {0: "N"}
            for name in (*self.inputs, *self.outputs)
        }


def head_parts(model: AsrModel, head: str) -> list[Part]:
    """Return the files of one head of a truncated model: one file for `ctc`, three for `transducer`."""
    layer = model.encoder.exit_layers[-1]
    name, inputs = f"exit-{layer:02d}", ("x", "x_lens")
    module, features = ExitExport(model, head), _traced_features(model)
    metadata = {"exit_layer": str(layer)}
    if head == "ctc":
        metadata["model_type"] = "zipformer2_ctc"
        return [Part(f"model-{name}", module, features, inputs, ("log_probs", "lengths"), metadata)]
    joiner, context_size = model.joiner(layer), model.decoder.context_size
    dim = joiner.encoder_proj.out_features
    tokens = torch.zeros(2, context_size, dtype=torch.int64)
    states, joined = (torch.randn(2, dim), torch.randn(2, dim)), ("encoder_out", "decoder_out")
    of_encoder = metadata | {"model_type": "zipformer2"}
    of_decoder = metadata | {"context_size": str(context_size)}
    of_joiner = metadata | {"joiner_dim": str(dim)}
    decoder = DecoderExport(model.decoder, joiner)
    return [
        Part(f"encoder-{name}", module, features, inputs, ("encoder_out", "lengths"), of_encoder),
        Part(f"decoder-{name}", decoder, (tokens,), ("y",), ("decoder_out",), of_decoder),
        Part(f"joiner-{name}", JoinerExport(joiner), states, joined, ("logit",), of_joiner),
    ]


def stage_parts(model: AsrModel) -> list[Part]:
    """Return one file per exit; each takes the output of the file before it. Stages are counted from 1.

    Raise an ExportError if the model has no CTC head, whose log-probabilities exit policies read.
    """
    if "ctc" not in model.heads:
        raise ExportError(f"--stages needs a CTC head, which exit policies read; this model has {model.heads}")
    layers, parts = model.encoder.exit_layers, []
    outputs = ("hidden", "lengths", "log_probs")
    for stage, layer in enumerate(layers, 1):
        metadata = {"stage": str(stage), "stages": str(len(layers)), "exit_layer": str(layer)}
        metadata["model_type"] = "splitformer_stage"
        name, module = f"encoder-stage-{stage:02d}", (FirstStage if stage == 1 else Stage)(model, layer)
        if stage == 1:
            parts.append(Part(name, module, _traced_features(model), ("x", "x_lens"), outputs, metadata))
        else:
            hidden = torch.randn(2, 15, module.head.in_features), torch.tensor([15, 11])
            parts.append(Part(name, module, hidden, ("hidden_in", "lengths_in"), outputs, metadata))
    return parts


def _traced_features(model: AsrModel) -> tuple[Tensor, Tensor]:
    # different lengths and an odd number of frames, so that tracing mistakes none of them for a constant
    return torch.randn(2, 67, traceable_encoder(model).num_mel_bins), torch.tensor([67, 50])
