"""Greedy search of CTC (best path decoding) and of the transducer."""

from __future__ import annotations

import torch
from torch import Tensor

from splitformer.decoding.hypothesis import Hypothesis, check_encoder_out, check_log_probs
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, blank_id: int = 0) -> list[Hypothesis]:
    """Take the best symbol of every frame, merge repetitions and remove blanks.

    This is best path decoding (Graves et al., ICML 2006, section 3.2).

    Args:
      log_probs: (N, T', V), log-probabilities.
      lengths: (N,), output frames of each utterance; frames behind them are ignored.
      blank_id: index of the blank in V.
    Returns:
      N hypotheses in the order of the batch. `score` is the sum of the best path's log-probabilities.
    Raises:
      ValueError: shapes or lengths do not fit together.
    """
    check_log_probs(log_probs, lengths)
    frames = torch.arange(log_probs.shape[1], device=log_probs.device)
    inside = frames < lengths.to(log_probs.device).unsqueeze(1)
    best, symbols = log_probs.max(dim=2)
    scores = best.masked_fill(~inside, 0.0).sum(dim=1, dtype=torch.float64)
    starts = inside & (symbols != blank_id)
    starts[:, 1:] &= symbols[:, 1:] != symbols[:, :-1]
    # one transfer for the whole batch, where the scores live on a GPU
    return [Hypothesis.from_frames(*each) for each in zip(symbols.cpu(), starts.cpu(), scores.tolist())]


@torch.no_grad()
def transducer_greedy_search(
    decoder: Decoder, joiner: Joiner, encoder_out: Tensor, lengths: Tensor, blank_penalty: float = 0.0
) -> list[Hypothesis]:
    """Take the best symbol of every frame, given the tokens before it: at most one token per frame, as in icefall.

    Args:
      decoder, joiner: of one model and one of its exits.
      encoder_out: (N, T', D), the output of that exit, on their device.
      lengths: (N,), output frames of each utterance; frames behind them are ignored.
      blank_penalty: subtracted from the log-probability of the blank in every frame (nats); above 0, fewer deletions.
    Returns:
      N hypotheses in the order of the batch. `score` is the quantity that the search maximises frame by frame: the sum
      of the log-probabilities of the chosen symbols, less blank_penalty for each blank.
    Raises:
      ValueError: shapes, lengths, decoder and joiner do not fit together.
    """
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    batch = encoder_out.shape[0]
    lengths = lengths.to(encoder_out.device)
    frames = int(lengths.max()) if batch else 0
    encoder_projected = joiner.encoder_proj(encoder_out[:, :frames])
    state = DecoderState(decoder, joiner, batch)

    symbols = torch.zeros(batch, frames, dtype=torch.int64, device=encoder_out.device)
    scores = torch.zeros(batch, dtype=torch.float64, device=encoder_out.device)
    for frame in range(frames):
        log_probs = joiner(encoder_projected[:, frame], state.projected).float().log_softmax(dim=-1)
        log_probs[:, 0] -= blank_penalty
        best, symbol = log_probs.max(dim=1)
        outside = frame >= lengths
        symbols[:, frame] = symbol.masked_fill(outside, 0)
        scores += best.masked_fill(outside, 0.0)
        state.emit(symbols[:, frame])

    symbols = symbols.cpu()
    return [Hypothesis.from_frames(*each) for each in zip(symbols, symbols != 0, scores.tolist())]


class DecoderState:
    """The last tokens of R hypotheses, and `projected` (R, joiner_dim): the decoder's projected output after them."""

    def __init__(self, decoder: Decoder, joiner: Joiner, num_hypotheses: int) -> None:
        self._decoder, self._joiner = decoder, joiner
        self._context = decoder.start(num_hypotheses)
        self.projected = self._project(self._context)

    def select(self, rows: Tensor) -> None:
        """Continue with the hypotheses of these `rows` (R,); a row may be selected repeatedly."""
        self._context, self.projected = self._context[rows], self.projected[rows]

    def emit(self, symbols: Tensor) -> None:
        """Append `symbols` (R,) to the hypotheses, in place; 0 appends nothing."""
        rows = symbols.nonzero().squeeze(1)  # few, so that the decoder runs for these alone
        if len(rows):
            self._context[rows] = torch.cat([self._context[rows, 1:], symbols[rows].unsqueeze(1)], dim=1)
            self.projected[rows] = self._project(self._context[rows])

    def _project(self, context: Tensor) -> Tensor:
        return self._joiner.decoder_proj(self._decoder(context)).squeeze(1)
