"""Whether an exported file computes what PyTorch does: the same inputs through both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis
from splitformer.export.wrappers import ExportError
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput
from splitformer.model.subsampling import MIN_FRAMES

Function = Callable[..., "tuple[Tensor, ...] | Tensor"]
"""An exported file as a function of tensors."""

TOLERANCE = 1e-3
"""Largest difference of a log-probability that an fp32 file may have."""

Features = tuple[Tensor, Tensor]
"""x (N, T, C) with x_lens (N,)"""


def random_features(num_mel_bins: int, seed: int = 0) -> list[Features]:
    """Batches as filterbanks of speech are in size, for where there is no speech: mixed lengths, alone, very short."""
    generator = torch.Generator().manual_seed(seed)

    def batch(*lengths: int) -> Features:
        x = 3.0 * torch.randn(len(lengths), max(lengths), num_mel_bins, generator=generator) - 8.0
        return x, torch.tensor(lengths)

    return [batch(301, 150, 77), batch(203), batch(8, 7, 3), batch(5)]


@torch.no_grad()
def reference_exits(model: AsrModel, x: Tensor, x_lens: Tensor) -> dict[int, ExitOutput]:
    """{layer: output} of every exit, in PyTorch; features too short for the front end are padded."""
    x = torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
    return {each.layer: each for each in model.encoder(x, x_lens)}


@torch.no_grad()
def ctc_difference(run: Function, model: AsrModel, layer: int, batches: Iterable[Features]) -> float:
    """Largest difference between the file's log-probabilities and those of `model` at the exit after `layer`.

    Raises ExportError where lengths or shapes differ.
    """
    largest = 0.0
    for x, x_lens in batches:
        expected = reference_exits(model, x, x_lens)[layer]
        log_probs, lengths = run(x, x_lens)
        largest = max(largest, difference(log_probs, lengths, model.ctc_log_probs(expected), expected.lengths))
    return largest


@torch.no_grad()
def transducer_differences(
    encoder: Function, decoder: Function, joiner: Function, model: AsrModel, layer: int, batches: Iterable[Features]
) -> tuple[float, float, float]:
    """Largest differences of the three files' outputs; for the joiner of log-probabilities.

    The joiner is given the files' own frames and contexts, so that its difference is what a search would see.
    """
    with_joiner, size = model.joiner(layer), model.decoder.context_size
    vocabulary = torch.arange(model.decoder.vocab_size)
    contexts = torch.stack([vocabulary.roll(shift) for shift in range(size)], dim=1)
    contexts[0] = model.decoder.blank_id
    expected_decoder = with_joiner.decoder_proj(model.decoder(contexts)).squeeze(1)
    contexts[0, :-1] = -1  # what sherpa-onnx starts with; a context of one token starts with the blank
    found_decoder = _single(decoder(contexts))
    of_decoder = float((found_decoder - expected_decoder).abs().max())
    of_encoder = of_joiner = 0.0
    for x, x_lens in batches:
        expected = reference_exits(model, x, x_lens)[layer]
        projected = with_joiner.encoder_proj(expected.encoder_out)
        found, lengths = encoder(x, x_lens)
        of_encoder = max(of_encoder, difference(found, lengths, projected, expected.lengths))
        for row, length in enumerate(lengths.tolist()):
            if not length:
                continue
            which = torch.arange(length) % len(contexts)
            logits = _single(joiner(found[row, :length].contiguous(), found_decoder[which]))
            wanted = with_joiner(projected[row, :length], expected_decoder[which])
            of_joiner = max(of_joiner, float((logits.log_softmax(-1) - wanted.log_softmax(-1)).abs().max()))
    return of_encoder, of_decoder, of_joiner


@torch.no_grad()
def stage_differences(stages: Sequence[Function], model: AsrModel, batches: Iterable[Features]) -> list[float]:
    """Largest difference of each stage's log-probabilities, run one after the other."""
    largest = [0.0] * len(stages)
    for x, x_lens in batches:
        state: tuple[Tensor, Tensor] = (x, x_lens)
        for stage, (run, expected) in enumerate(zip(stages, reference_exits(model, x, x_lens).values(), strict=True)):
            hidden, lengths, log_probs = run(*state)
            state = hidden, lengths
            found = difference(log_probs, lengths, model.ctc_log_probs(expected), expected.lengths)
            largest[stage] = max(largest[stage], found)
    return largest


def difference(found: Tensor, found_lengths: Tensor, expected: Tensor, lengths: Tensor) -> float:
    """Largest absolute difference over valid frames of (N, T', D) with lengths (N,); infinite where there is a NaN.

    Raises ExportError where lengths or shapes differ.
    """
    if found_lengths.dtype != torch.int64 or found_lengths.tolist() != lengths.tolist():
        raise ExportError(f"lengths are {found_lengths.dtype} {found_lengths.tolist()}, and int64 {lengths.tolist()}"
                          " in PyTorch")  # fmt: skip
    if found.shape != expected.shape:
        raise ExportError(f"the output has shape {tuple(found.shape)}, and {tuple(expected.shape)} in PyTorch")
    largest = 0.0
    for row, length in enumerate(lengths.tolist()):
        if length:
            worst = float((found[row, :length] - expected[row, :length]).abs().max())
            largest = max(largest, worst if worst == worst else float("inf"))
    return largest


@torch.no_grad()
def transducer_greedy(
    encoder: Function, decoder: Function, joiner: Function, context_size: int, x: Tensor, x_lens: Tensor
) -> list[Hypothesis]:
    """Greedy search through the three files, at most one token a frame; batches of any size, one row at a time."""
    frames, lengths = encoder(x, x_lens)
    hypotheses = []
    for row, length in enumerate(lengths.tolist()):
        tokens, timestamps, score = [0] * context_size, [], 0.0
        state = _single(decoder(torch.tensor([tokens])))
        for frame in range(length):
            log_probs = _single(joiner(frames[row, frame : frame + 1].contiguous(), state)).log_softmax(-1)
            best, symbol = log_probs[0].max(dim=0)
            score += float(best)
            if symbol:
                tokens.append(int(symbol))
                timestamps.append(frame)
                state = _single(decoder(torch.tensor([tokens[-context_size:]])))
        hypotheses.append(Hypothesis(tokens[context_size:], timestamps, score))
    return hypotheses


def _single(outputs: tuple[Tensor, ...] | Tensor) -> Tensor:
    """The one output: onnxruntime gives a tuple, TorchScript the tensor."""
    return outputs[0] if isinstance(outputs, tuple) else outputs
