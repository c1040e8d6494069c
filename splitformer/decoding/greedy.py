"""Greedy searches for CTC (best path) and the transducer, and the `Hypothesis` that every search returns."""

from __future__ import annotations

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis, check_encoder_out, check_log_probs
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


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
