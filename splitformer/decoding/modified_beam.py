"""`modified_beam_search`: the transducer with a beam and at most one token a frame. This module needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.hypothesis import Hypothesis, check_encoder_out
from splitformer.decoding.prefixes import Prefixes, check_no_nan
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


@torch.no_grad()
def modified_beam_search(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    beam_size: int = 4,
    blank_penalty: float = 0.0,
    context: ContextGraph | None = None,
    length_norm: bool = True,
) -> list[Hypothesis]:
    """The most probable token sequence, summed over alignments that emit at most one token a frame.

    Beam search of Graves, "Sequence transduction with recurrent neural networks", 2012, without its expansion within a
    frame, as icefall's search of this name. In each frame equal token sequences are merged first and the best
    `beam_size` kept then (icefall prunes first, so that its beam may hold fewer). Hypotheses of all utterances are
    tensors; the only loop is over frames.

    Args:
      decoder, joiner: of one model and one of its exits.
      encoder_out: (N, T', D), that exit's output, on their device.
      lengths: (N,), output frames of each utterance, in any order; what lies behind them is ignored.
      beam_size: B, token sequences kept for each utterance.
      blank_penalty: subtracted from the blank's log-probability in every frame (nats); above 0, fewer deletions.
      context: phrases to favour, built for the joiner's vocabulary.
      length_norm: at the end choose the highest score / (tokens + decoder.context_size), as icefall does, so that long
        sequences are not at a disadvantage; otherwise the highest score.
    Returns:
      N hypotheses in the order of the batch. `score`, not normalised, is the log of the summed probability of the
      alignments that survived the beam, less blank_penalty for each blank, plus the score of the context graph.
      `timestamps` are of the best of these alignments.
    Raises:
      ValueError: where shapes, lengths, decoder, joiner or the context graph's vocabulary do not fit, for NaN, and for
        beam_size below 1.
    """
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    batch, device, vocab_size = encoder_out.shape[0], encoder_out.device, decoder.vocab_size
    prefixes = Prefixes(batch, beam_size, vocab_size, context, device)
    if batch == 0:
        return []
    lengths = lengths.to(device)
    frames = int(lengths.max())
    inside = torch.arange(frames, device=device) < lengths.unsqueeze(1)
    check_no_nan(encoder_out[:, :frames], inside, "encoder_out")
    # behind its end an utterance goes on with a blank of probability 1, which changes nothing
    certain_blank = torch.full((vocab_size,), -math.inf, dtype=torch.float64, device=device)
    certain_blank[0] = 0.0

    encoder_projected = joiner.encoder_proj(encoder_out[:, :frames]).unsqueeze(2)  # (N, T', 1, joiner_dim)
    # of N * B hypotheses: what the decoder sees, and its projected output
    y = decoder.start(batch * beam_size)
    decoder_projected = joiner.decoder_proj(decoder(y)).squeeze(1)
    first_row = torch.arange(batch, device=device).unsqueeze(1) * beam_size

    log_prob = prefixes.only_first()  # (N, B), summed over alignments
    path_log_prob = log_prob  # (N, B), of the best alignment, for timestamps
    for frame in range(frames):
        logits = joiner(encoder_projected[:, frame], decoder_projected.view(batch, beam_size, -1))
        symbol_log_prob = logits.float().log_softmax(dim=-1).double()  # (N, B, V)
        symbol_log_prob[:, :, 0] -= blank_penalty
        symbol_log_prob = torch.where(inside[:, frame, None, None], symbol_log_prob, certain_blank)

        # column 0: the prefix is kept, by a blank or by its last token from its parent
        candidates = log_prob.unsqueeze(2) + symbol_log_prob
        from_parent = prefixes.through_parents(candidates).logsumexp(dim=1)
        prefixes.drop_merged(candidates)
        candidates[:, :, 0] = torch.logaddexp(candidates[:, :, 0], from_parent)
        paths = path_log_prob.unsqueeze(2) + symbol_log_prob
        path_from_parent, parent = prefixes.through_parents(paths).max(dim=1)
        emits = path_from_parent > paths[:, :, 0]
        paths[:, :, 0] = torch.maximum(paths[:, :, 0], path_from_parent)

        choice = prefixes.advance(candidates)
        log_prob = candidates.flatten(1).gather(1, choice.index)
        path_log_prob = paths.flatten(1).gather(1, choice.index)
        emits = emits.gather(1, choice.source) & (choice.symbol == 0)
        prefixes.record(
            torch.where(emits, parent.gather(1, choice.source), choice.source),
            torch.where(emits, prefixes.last, choice.symbol),
        )

        # the decoder's output changes only where a prefix was extended
        source, symbol = (first_row + choice.source).flatten(), choice.symbol.flatten()
        y, decoder_projected = y[source], decoder_projected[source]
        rows = symbol.nonzero().squeeze(1)
        if len(rows):
            y[rows] = torch.cat([y[rows, 1:], symbol[rows].unsqueeze(1)], dim=1)
            decoder_projected[rows] = joiner.decoder_proj(decoder(y[rows])).squeeze(1)

    score = log_prob + prefixes.context_total()
    ranked = score / (prefixes.num_tokens + decoder.context_size) if length_norm else score
    slot = ranked.argmax(dim=1)
    score = score.gather(1, slot.unsqueeze(1)).squeeze(1).tolist()
    return [Hypothesis(*found, total) for found, total in zip(prefixes.trace(slot), score)]
