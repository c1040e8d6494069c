"""Greedy searches for CTC (best path) and the transducer, and the `Hypothesis` that every search returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """Take the best symbol of every frame, merge repetitions, drop blanks.

    This is best path decoding of Graves et al., ICML 2006, section 3.2.

    Args:
      log_probs: (N, T', V), log-probabilities.
      lengths: (N,), output frames of each utterance; what lies behind them is ignored.
      blank_id: index of the blank in V.
    Returns:
      N hypotheses in the order of the batch. `score` is the sum of the best path's log-probabilities.
    Raises:
      ValueError: where shapes or lengths do not fit together.
    """
    check_log_probs(log_probs, lengths)
    frames = torch.arange(log_probs.shape[1], device=log_probs.device)
    inside = frames < lengths.to(log_probs.device).unsqueeze(1)
    best, symbols = log_probs.max(dim=2)
    scores = best.masked_fill(~inside, 0.0).sum(dim=1, dtype=torch.float64)
    starts = inside & (symbols != blank_id)
    starts[:, 1:] &= symbols[:, 1:] != symbols[:, :-1]

    # one transfer for the whole batch, where the scores live on a GPU
    symbols, starts, scores = symbols.cpu(), starts.cpu(), scores.tolist()
    hypotheses = []
    for utterance, score in enumerate(scores):
        timestamps = starts[utterance].nonzero().squeeze(1)
        hypotheses.append(Hypothesis(symbols[utterance, timestamps].tolist(), timestamps.tolist(), score))
    return hypotheses


@torch.no_grad()
def transducer_greedy_search(
    decoder: Decoder, joiner: Joiner, encoder_out: Tensor, lengths: Tensor, blank_penalty: float = 0.0
) -> list[Hypothesis]:
    """Take the best symbol of every frame, given the tokens before it: at most one token a frame.

    Graves, "Sequence transduction with recurrent neural networks", 2012, with one symbol a frame, as in icefall.

    Args:
      decoder, joiner: of one model and one of its exits.
      encoder_out: (N, T', D), that exit's output, on their device.
      lengths: (N,), output frames of each utterance; what lies behind them is ignored.
      blank_penalty: subtracted from the blank's log-probability in every frame (nats); above 0, fewer deletions.
    Returns:
      N hypotheses in the order of the batch. `score` sums the log-probabilities (of softmax over all symbols) of what
      was taken in each frame, less blank_penalty for each blank: it is what the search maximised frame by frame.
    Raises:
      ValueError: where shapes, lengths, decoder and joiner do not fit together.
    """
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    batch = encoder_out.shape[0]
    lengths = lengths.to(encoder_out.device)
    frames = int(lengths.max()) if batch else 0
    encoder_projected = joiner.encoder_proj(encoder_out[:, :frames])
    context = decoder.start(batch)
    decoder_projected = joiner.decoder_proj(decoder(context)).squeeze(1)

    symbols = torch.zeros(batch, frames, dtype=torch.int64, device=encoder_out.device)
    scores = torch.zeros(batch, dtype=torch.float64, device=encoder_out.device)
    for frame in range(frames):
        log_probs = joiner(encoder_projected[:, frame], decoder_projected).float().log_softmax(dim=-1)
        log_probs[:, 0] -= blank_penalty
        best, symbol = log_probs.max(dim=1)
        outside = frame >= lengths
        symbols[:, frame] = symbol.masked_fill(outside, 0)
        scores += best.masked_fill(outside, 0.0)
        # the decoder's state changes only where a token was said, which is in few frames
        rows = symbols[:, frame].nonzero().squeeze(1)
        if len(rows):
            context[rows] = torch.cat([context[rows, 1:], symbol[rows].unsqueeze(1)], dim=1)
            decoder_projected[rows] = joiner.decoder_proj(decoder(context[rows])).squeeze(1)

    symbols, scores = symbols.cpu(), scores.tolist()
    hypotheses = []
    for utterance, score in enumerate(scores):
        timestamps = symbols[utterance].nonzero().squeeze(1)
        hypotheses.append(Hypothesis(symbols[utterance, timestamps].tolist(), timestamps.tolist(), score))
    return hypotheses
