"""Greedy (best-path) CTC search, and the `Hypothesis` that every search returns."""

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
    score: log-probability of the best path, in nats, with whatever weights the search gave to its parts.
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
    batch, frames, _ = log_probs.shape
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({batch},), as log_probs")
    if lengths.is_floating_point():
        raise ValueError(f"lengths is {lengths.dtype}; expected whole output frames (an integer type)")
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > frames):
        raise ValueError(f"lengths {lengths.tolist()} leave 0..{frames}, the output frames of log_probs")


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


def transducer_greedy_search(
    decoder: Decoder, joiner: Joiner, encoder_out: Tensor, lengths: Tensor, blank_penalty: float = 0.0
) -> list[Hypothesis]:
    """Stand-in: at most one symbol a frame, the best one."""
    hypotheses = []
    for encoded, length in zip(joiner.encoder_proj(encoder_out), lengths.tolist()):
        tokens: list[int] = []
        timestamps: list[int] = []
        score, context = 0.0, decoder.start(1)
        for frame in range(length):
            logits = joiner(encoded[frame], joiner.decoder_proj(decoder(context)[0, 0]))
            log_probs = logits.float().log_softmax(dim=0)
            log_probs[0] -= blank_penalty
            best = int(log_probs.argmax())
            score += log_probs[best].item()
            if best != 0:
                tokens.append(best)
                timestamps.append(frame)
                context = torch.cat([context[:, 1:], context.new_tensor([[best]])], dim=1)
        hypotheses.append(Hypothesis(tokens, timestamps, score))
    return hypotheses
