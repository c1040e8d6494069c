"""Greedy searches for CTC (best path) and the transducer, and the `Hypothesis` that every search returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


@dataclass(frozen=True)
class Hypothesis:
    """What a search found for one utterance.

    tokens: token ids, blanks and repetitions already removed.
    timestamps: for each token the output frame at which it starts (an output frame is four feature frames).
    score: log-probability in nats, with whatever weights the search gave to its parts; of the best path, or, where
      the search sums over alignments, of the tokens.
    words: where a graph with a lexicon chose them; elsewhere the tokens are to be spelled.
    """

    tokens: list[int]
    timestamps: list[int]
    score: float
    words: list[str] | None = None


def check_log_probs(log_probs: Tensor, lengths: Tensor) -> None:
    """Raises ValueError unless `log_probs` is (N, T', V) and `lengths` (N,) holds integers in 0..T'."""
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}; expected (N, T', V)")
    _check_lengths(lengths, log_probs, "log_probs")


def check_encoder_out(encoder_out: Tensor, lengths: Tensor, decoder: Decoder, joiner: Joiner) -> None:
    """Raises ValueError unless `encoder_out` is (N, T', D) with the joiner's D, `lengths` (N,) holds integers in 0..T',
    and decoder and joiner have one vocabulary with the blank at 0.
    """
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out has shape {tuple(encoder_out.shape)}; expected (N, T', D)")
    _check_lengths(lengths, encoder_out, "encoder_out")
    d_model = joiner.encoder_proj.in_features
    if encoder_out.shape[2] != d_model:
        raise ValueError(f"encoder_out has D = {encoder_out.shape[2]}, the joiner takes {d_model}: of another model?")
    tokens = joiner.output_linear.out_features
    if decoder.vocab_size != tokens:
        raise ValueError(f"the decoder has {decoder.vocab_size} tokens, the joiner {tokens}: take both from one model")
    if decoder.blank_id != 0:
        raise ValueError(f"the decoder's blank_id is {decoder.blank_id}; the searches expect 0, as in tokens.txt")


def _check_lengths(lengths: Tensor, frames_of: Tensor, name: str) -> None:
    batch, frames = frames_of.shape[:2]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({batch},), as {name}")
    if lengths.is_floating_point():
        raise ValueError(f"lengths is {lengths.dtype}; expected whole output frames (an integer type)")
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > frames):
        raise ValueError(f"lengths {lengths.tolist()} leave 0..{frames}, the output frames of {name}")
