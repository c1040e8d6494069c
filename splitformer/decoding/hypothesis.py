"""The result of a search, and checks of what searches are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from splitformer.errors import UserError
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


@dataclass(frozen=True)
class Hypothesis:
    """The result of a search for one utterance.

    tokens: token ids, without blanks and repetitions.
    timestamps: for each token, the output frame in which it starts.
    score: log-probability in nats, weighted as the search weighs its parts: of the best path or, for a search that sums
      over alignments, of the token sequence.
    words: the words that a graph with a lexicon chose. None: spell the tokens.
    """

    tokens: list[int]
    timestamps: list[int]
    score: float
    words: list[str] | None = None

    @classmethod
    def from_frames(cls, symbols: Tensor, starts: Tensor, score: float) -> Hypothesis:
        """The hypothesis whose tokens are the `symbols` (T',) of the frames marked in `starts` (T',)."""
        timestamps = starts.nonzero().squeeze(1)
        return cls(symbols[timestamps].tolist(), timestamps.tolist(), score)


def words_of(hypothesis: Hypothesis, spell: Callable[[list[int]], str]) -> list[str]:
    """Return the words that a lexicon chose, or those that `spell` makes of the tokens."""
    return spell(hypothesis.tokens).split() if hypothesis.words is None else hypothesis.words


class SearchResult(NamedTuple):
    """The result of a search for a batch."""

    hypotheses: list[Hypothesis]
    """one for each utterance, in the order of the batch"""
    fallbacks: list[int]
    """indices of the utterances whose lattice was empty; their hypotheses are those of greedy search"""


class UncertainResult(NamedTuple):
    """A SearchResult with uncertainty (N,): minus the log of the n-best posterior (arXiv 2309.09546, section 3)."""

    hypotheses: list[Hypothesis]
    fallbacks: list[int]
    uncertainty: Tensor


def check_log_probs(log_probs: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless `log_probs` is (N, T', V) and `lengths` (N,) holds integers in 0..T'."""
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}; expected (N, T', V)")
    _check_lengths(lengths, log_probs, "log_probs")


def check_encoder_out(encoder_out: Tensor, lengths: Tensor, decoder: Decoder, joiner: Joiner) -> None:
    """Raise ValueError unless `encoder_out` is (N, T', D) with the joiner's D, `lengths` (N,) holds integers in 0..T',
    and decoder and joiner share a vocabulary whose blank is 0.
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
        raise ValueError(f"lengths {lengths.tolist()} are outside 0..{frames}, the output frames of {name}")


def check_no_nan(values: Tensor, inside: Tensor, name: str) -> None:
    """Raise UserError if `values` (N, T', ...) hold NaN in a frame that `inside` (N, T') marks as valid."""
    if (torch.isnan(values).any(dim=2) & inside).any():
        raise UserError(f"{name} hold NaN: has the training diverged?")
