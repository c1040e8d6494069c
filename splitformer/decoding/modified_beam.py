"""`modified_beam_search`: beam search of the transducer, with at most one token per frame."""

from __future__ import annotations

import torch
from torch import Tensor

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.greedy import DecoderState
from splitformer.decoding.hypothesis import Hypothesis, check_encoder_out, check_no_nan
from splitformer.decoding.prefixes import Prefixes, certain_blank
from splitformer.model.conformer import valid_frames
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
    """Return the most probable token sequences, summed over alignments with at most one token per frame.

    This is the beam search of Graves, "Sequence transduction with recurrent neural networks", 2012, without its
    expansion within a frame, as icefall's search of this name. In each frame, equal token sequences are merged before
    the best `beam_size` are kept (icefall prunes first, so that its beam may hold fewer). The hypotheses of all
    utterances are tensors; the only loop is over frames.

    Args:
      decoder, joiner, encoder_out, lengths, blank_penalty: as for transducer_greedy_search.
      beam_size: B, token sequences kept for each utterance.
      context: phrases to favour, built for the vocabulary of the joiner.
      length_norm: choose the highest score / (tokens + decoder.context_size) in the end, as icefall does, so that long
        sequences are at no disadvantage; otherwise the highest score.
    Returns:
      N hypotheses in the order of the batch. `score`, which is not normalised, is the log of the summed probability of
      the alignments that survived the beam, less blank_penalty for each blank, plus the score of the context graph.
      `timestamps` are those of the best of these alignments.
    Raises:
      ValueError: arguments do not fit together, there are NaN, or beam_size is below 1.
    """
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    batch, device, vocab_size = encoder_out.shape[0], encoder_out.device, decoder.vocab_size
    prefixes = Prefixes(batch, beam_size, vocab_size, context, device)
    if batch == 0:
        return []
    lengths = lengths.to(device)
    frames = int(lengths.max())
    inside = valid_frames(lengths, frames)
    check_no_nan(encoder_out[:, :frames], inside, "encoder_out")
    outside_log_prob = certain_blank(vocab_size, device)

    encoder_projected = joiner.encoder_proj(encoder_out[:, :frames]).unsqueeze(2)  # (N, T', 1, joiner_dim)
    state = DecoderState(decoder, joiner, batch * beam_size)
    first_row = torch.arange(batch, device=device).unsqueeze(1) * beam_size

    log_prob = prefixes.only_first()  # (N, B), summed over alignments
    path_log_prob = log_prob  # (N, B), of the best alignment, for timestamps
    for frame in range(frames):
        logits = joiner(encoder_projected[:, frame], state.projected.view(batch, beam_size, -1))
        symbol_log_prob = logits.float().log_softmax(dim=-1).double()  # (N, B, V)
        symbol_log_prob[:, :, 0] -= blank_penalty
        symbol_log_prob = torch.where(inside[:, frame, None, None], symbol_log_prob, outside_log_prob)

        candidates = _merged_candidates(prefixes, log_prob.unsqueeze(2) + symbol_log_prob)
        paths, emits, parent = _best_paths(prefixes, path_log_prob.unsqueeze(2) + symbol_log_prob)
        choice = prefixes.advance(candidates)
        log_prob = candidates.flatten(1).gather(1, choice.index)
        path_log_prob = paths.flatten(1).gather(1, choice.index)
        emits = emits.gather(1, choice.source) & (choice.symbol == 0)
        prefixes.record(
            torch.where(emits, parent.gather(1, choice.source), choice.source),
            torch.where(emits, prefixes.last, choice.symbol),
        )
        state.select((first_row + choice.source).flatten())
        state.emit(choice.symbol.flatten())

    score = log_prob + prefixes.context_total()
    ranked = score / (prefixes.num_tokens + decoder.context_size) if length_norm else score
    slot = ranked.argmax(dim=1)
    scores = score.gather(1, slot.unsqueeze(1)).squeeze(1).tolist()
    return [Hypothesis(*found, total) for found, total in zip(prefixes.trace(slot), scores)]


def _merged_candidates(prefixes: Prefixes, candidates: Tensor) -> Tensor:
    """Merge equal token sequences among `candidates` (N, B, V), in place.

    Column 0 keeps a prefix: by a blank, or by its last token from its parent.
    """
    from_parent = prefixes.through_parents(candidates).logsumexp(dim=1)
    prefixes.drop_merged(candidates)
    candidates[:, :, 0] = torch.logaddexp(candidates[:, :, 0], from_parent)
    return candidates


def _best_paths(prefixes: Prefixes, paths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge like `_merged_candidates`, by the best alignment instead of the sum.

    Returns:
      `paths` (N, B, V); (N, B), whether the best alignment of a kept prefix emits its last token in this frame, and the
      slot of the parent that it then comes from.
    """
    from_parent, parent = prefixes.through_parents(paths).max(dim=1)
    emits = from_parent > paths[:, :, 0]
    paths[:, :, 0] = torch.maximum(paths[:, :, 0], from_parent)
    return paths, emits, parent
