"""Compare exported files with PyTorch: the same inputs through both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis
from splitformer.export.wrappers import ExportError
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import valid_frames
from splitformer.model.encoder import ExitOutput
from splitformer.model.subsampling import MIN_FRAMES

Function = Callable[..., "tuple[Tensor, ...] | Tensor"]
"""An exported file as a function of tensors."""

Features = tuple[Tensor, Tensor]
"""x (N, T, C) with x_lens (N,)"""


class CheckBatch(NamedTuple):
    """Features with what PyTorch computes from them: {layer: output} of all exits of the whole model."""

    x: Tensor
    x_lens: Tensor
    exits: dict[int, ExitOutput]


@dataclass
class Comparison:
    """Differences of a file's outputs from PyTorch's, over all valid frames added so far.

    has_symbols: the outputs are scores of symbols, of which the best is compared.
    difference: largest absolute difference.
    frames, agreeing: number of frames, and of those in which the best symbol is the same.
    """

    has_symbols: bool = True
    difference: float = 0.0
    frames: int = 0
    agreeing: int = 0

    @property
    def agreement(self) -> float:
        """Share of frames with the same best symbol; 1 without frames or symbols."""
        return self.agreeing / self.frames if self.frames else 1.0

    def add(self, found: Tensor, found_lengths: Tensor, expected: Tensor, lengths: Tensor) -> None:
        """Add outputs (N, T', D) with lengths (N,). Raise an ExportError if lengths or shapes differ, or for NaN."""
        if found_lengths.dtype != torch.int64 or found_lengths.tolist() != lengths.tolist():
            raise ExportError(f"lengths are {found_lengths.dtype} {found_lengths.tolist()}, not {lengths.tolist()}")
        if found.shape != expected.shape:
            raise ExportError(f"the output has shape {tuple(found.shape)}, in PyTorch {tuple(expected.shape)}")
        valid = valid_frames(lengths, expected.size(1))
        self.add_frames(found[valid], expected[valid])

    def add_frames(self, found: Tensor, expected: Tensor) -> None:
        """Add outputs (M, D) of M frames."""
        if not len(expected):
            return
        difference = float((found - expected).abs().max())
        if math.isnan(difference):
            raise ExportError("the output holds NaN")
        self.difference = max(self.difference, difference)
        if self.has_symbols:
            self.frames += len(expected)
            self.agreeing += int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())


def random_features(num_mel_bins: int, seed: int = 0) -> list[Features]:
    """Return batches of noise with the range of log-mel features: mixed lengths, one utterance, two very short ones."""
    generator = torch.Generator().manual_seed(seed)

    def batch(*lengths: int) -> Features:
        x = 3.0 * torch.randn(len(lengths), max(lengths), num_mel_bins, generator=generator) - 8.0
        return x, torch.tensor(lengths)

    return [batch(301, 150, 77), batch(203), batch(8, 7, 3), batch(5)]


@torch.no_grad()
def run_pytorch(model: AsrModel, features: Iterable[Features]) -> list[CheckBatch]:
    """Return the batches with the outputs of all exits; features too short for the front end are padded."""
    batches = []
    for x, x_lens in features:
        padded = torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
        batches.append(CheckBatch(x, x_lens, {each.layer: each for each in model.encoder(padded, x_lens)}))
    return batches


@torch.no_grad()
def compare_ctc(
    functions: Sequence[Function], model: AsrModel, layer: int, batches: Iterable[CheckBatch]
) -> list[Comparison]:
    """Compare the log-probabilities of one file with those of `model` at the exit after `layer`."""
    [run] = functions
    comparison = Comparison()
    for x, x_lens, exits in batches:
        log_probs, lengths = run(x, x_lens)
        comparison.add(log_probs, lengths, model.ctc_log_probs(exits[layer]), exits[layer].lengths)
    return [comparison]


@torch.no_grad()
def compare_transducer(
    functions: Sequence[Function], model: AsrModel, layer: int, batches: Iterable[CheckBatch]
) -> list[Comparison]:
    """Compare the outputs of encoder, decoder and joiner; of the joiner its log-probabilities.

    The joiner gets the frames and contexts that the other two files computed, so that its comparison covers all three.
    """
    run_encoder, run_decoder, run_joiner = functions
    of_encoder, of_decoder, of_joiner = Comparison(has_symbols=False), Comparison(has_symbols=False), Comparison()
    joiner, size = model.joiner(layer), model.decoder.context_size
    vocabulary = torch.arange(model.decoder.vocab_size)
    contexts = torch.stack([vocabulary.roll(shift) for shift in range(size)], dim=1)
    contexts[0] = model.decoder.blank_id
    decoder_out = joiner.decoder_proj(model.decoder(contexts)).squeeze(1)
    contexts[0, :-1] = -1  # sherpa-onnx starts with this; a context of one token starts with the blank
    decoder_found = _single(run_decoder(contexts))
    of_decoder.add_frames(decoder_found, decoder_out)
    for x, x_lens, exits in batches:
        encoder_out, lengths = joiner.encoder_proj(exits[layer].encoder_out), exits[layer].lengths
        encoder_found, found_lengths = run_encoder(x, x_lens)
        of_encoder.add(encoder_found, found_lengths, encoder_out, lengths)
        valid = valid_frames(lengths, encoder_out.size(1))
        which = torch.arange(int(valid.sum())) % len(contexts)
        if len(which):
            found = _single(run_joiner(encoder_found[valid], decoder_found[which]))
            expected = joiner(encoder_out[valid], decoder_out[which])
            of_joiner.add_frames(found.log_softmax(-1), expected.log_softmax(-1))
    return [of_encoder, of_decoder, of_joiner]


@torch.no_grad()
def compare_stages(
    functions: Sequence[Function], model: AsrModel, batches: Iterable[CheckBatch]
) -> list[Comparison]:
    """Compare the log-probabilities of each stage, run one after the other."""
    comparisons = [Comparison() for _ in functions]
    for x, x_lens, exits in batches:
        state = x, x_lens
        for run, layer, comparison in zip(functions, exits, comparisons):
            hidden, lengths, log_probs = run(*state)
            state = hidden, lengths
            comparison.add(log_probs, lengths, model.ctc_log_probs(exits[layer]), exits[layer].lengths)
    return comparisons


@torch.no_grad()
def transducer_greedy(
    functions: Sequence[Function], context_size: int, x: Tensor, x_lens: Tensor
) -> list[Hypothesis]:
    """Search greedily through encoder, decoder and joiner files, with at most one token per frame; x (N, T, C)."""
    run_encoder, run_decoder, run_joiner = functions
    frames, lengths = run_encoder(x, x_lens)
    hypotheses = []
    for row, length in enumerate(lengths.tolist()):
        tokens, timestamps, score = [0] * context_size, [], 0.0
        state = _single(run_decoder(torch.tensor([tokens])))
        for frame in range(length):
            log_probs = _single(run_joiner(frames[row, frame : frame + 1].contiguous(), state)).log_softmax(-1)
            best, symbol = log_probs[0].max(dim=0)
            score += float(best)
            if symbol:
                tokens.append(int(symbol))
                timestamps.append(frame)
                state = _single(run_decoder(torch.tensor([tokens[-context_size:]])))
        hypotheses.append(Hypothesis(tokens[context_size:], timestamps, score))
    return hypotheses


def _single(outputs: tuple[Tensor, ...] | Tensor) -> Tensor:
    """Return the only output: onnxruntime gives a tuple, TorchScript the tensor."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
