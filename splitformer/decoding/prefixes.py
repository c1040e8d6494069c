"""The beam of `prefix_beam_search` and `modified_beam_search`: token sequences ("prefixes") as tensors (N, B).

In each frame a prefix is kept as it is or extended by one token. The prefixes of a beam differ, so two candidates are
equal in one case only: a prefix was kept, and its parent (the prefix less its last token), also in the beam, was
extended by that token. Merging therefore compares B x B keys instead of B x V sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from splitformer.decoding.context import ContextGraph

_EMPTY_KEY, _NO_KEY = 1, -1
_SPREAD, _MIX, _POSITIVE = 0x9E3779B97F4A7C1, 0x5851F42D4C957F2D, 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """The B best candidates of a frame, the best first; the last slots may hold some of log-probability -inf.

    index: (N, B), the position among the B x V candidates of the utterance.
    source: (N, B), the slot of the beam that the candidate was made from.
    symbol: (N, B), the token that it adds; 0 for a prefix that was kept.
    """

    index: Tensor
    source: Tensor
    symbol: Tensor


class Prefixes:
    """The token sequences of a beam; the search keeps their probabilities. A beam starts with the empty prefix.

    A prefix is identified by a 63-bit hash of its tokens. Two different prefixes collide with a probability of about
    1e-19 for each pair that is compared.

    last: (N, B), the last token; 0 for the empty prefix.
    num_tokens: (N, B).
    """

    def __init__(
        self, batch: int, beam_size: int, vocab_size: int, context: ContextGraph | None, device: torch.device
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size {beam_size} must be 1 or more, the hypotheses kept for each utterance")
        if context is not None and context.vocab_size != vocab_size:
            raise ValueError(
                f"the context graph was built for {context.vocab_size} tokens, the model has {vocab_size}: build it "
                "from phrases that the model's tokenizer spelled"
            )
        self._context = None if context is None else context.to(device)
        self._beam_size = beam_size
        self.last = torch.zeros(batch, beam_size, dtype=torch.int64, device=device)
        self.num_tokens = torch.zeros_like(self.last)
        self._key = torch.full_like(self.last, _EMPTY_KEY)
        self._parent_key = torch.full_like(self.last, _NO_KEY)
        self._state = torch.zeros_like(self.last)
        self._bonus = torch.zeros(batch, beam_size, dtype=torch.float64, device=device)
        self._trace: list[tuple[Tensor, Tensor]] = []

    def only_first(self) -> Tensor:
        """Return the initial log-probabilities (N, B) float64: 0 in the first slot, -inf in the others."""
        log_prob = torch.full_like(self._bonus, -math.inf)
        log_prob[:, 0] = 0.0
        return log_prob

    def through_parents(self, candidates: Tensor) -> Tensor:
        """Return (N, B, B): at [n, j, i] the candidate that extends prefix j to prefix i, -inf if j is not its parent.

        Args:
          candidates: (N, B, V), each prefix extended by each token.
        """
        extended = candidates.gather(2, self.last.unsqueeze(1).expand(-1, self._beam_size, -1))
        return extended.masked_fill(~self._is_parent(), -math.inf)

    def drop_merged(self, candidates: Tensor) -> None:
        """Set the candidates that `through_parents` returns to -inf, in place: their sequences are in the beam."""
        # added and not assigned: other prefixes may end in the same token and are no children of j
        removed = torch.zeros_like(candidates[:, :, :1]).masked_fill(self._is_parent(), -math.inf)
        candidates.scatter_add_(2, self.last.unsqueeze(1).expand(-1, self._beam_size, -1), removed)

    def _is_parent(self) -> Tensor:
        return self._key.unsqueeze(2) == self._parent_key.unsqueeze(1)

    def advance(self, candidates: Tensor) -> Choice:
        """Replace the beam by the B best candidates, each ranked with its score in the context graph, and return them.

        Args:
          candidates: (N, B, V) float64, log-probabilities; column 0 is the prefix kept as it is.
        """
        vocab_size = candidates.shape[2]
        if self._context is None:
            ranked = candidates
        else:
            ranked = candidates + self._bonus.unsqueeze(2) + self._context.score[self._state]
        value, index = ranked.flatten(1).topk(self._beam_size, dim=1)
        source, symbol = torch.div(index, vocab_size, rounding_mode="floor"), index % vocab_size
        possible, kept = value > -math.inf, symbol == 0

        key = self._key.gather(1, source)
        # a slot of log-probability -inf may copy the prefix of another slot, to which alone the parent's mass belongs
        parent_key = torch.where(kept, self._parent_key.gather(1, source), key)
        self._parent_key = parent_key.masked_fill(~possible, _NO_KEY)
        self._key = torch.where(kept, key, _extended_key(key, symbol))
        self.last = torch.where(kept, self.last.gather(1, source), symbol)
        self.num_tokens = self.num_tokens.gather(1, source) + (~kept).long()
        if self._context is not None:
            state = self._state.gather(1, source)
            self._bonus = self._bonus.gather(1, source) + self._context.score[state, symbol]
            self._state = self._context.next_state[state, symbol]
        return Choice(index, source, symbol)

    def context_total(self) -> Tensor | float:
        """Return the scores (N, B) of the prefixes in the context graph if they end now; 0 without a graph."""
        return 0.0 if self._context is None else self._bonus + self._context.final_score[self._state]

    def record(self, source: Tensor, symbol: Tensor) -> None:
        """Remember for a frame the slot that each hypothesis came from and its token (0: none), each (N, B)."""
        self._trace.append((source, symbol))

    def trace(self, slot: Tensor) -> list[tuple[list[int], list[int]]]:
        """Return for each utterance the tokens that led to `slot` (N,), and the frames in which they were recorded."""
        slot = slot.cpu().unsqueeze(1)
        symbols = torch.zeros(len(slot), len(self._trace), dtype=torch.int64)
        if self._trace:
            # one transfer, where the search ran on a GPU
            sources, emitted = (torch.stack(parts).cpu() for parts in zip(*self._trace))
            for frame in range(len(self._trace) - 1, -1, -1):
                symbols[:, frame] = emitted[frame].gather(1, slot).squeeze(1)
                slot = sources[frame].gather(1, slot)
        frames = [row.nonzero().squeeze(1) for row in symbols]
        return [(row[at].tolist(), at.tolist()) for row, at in zip(symbols, frames)]


def _extended_key(key: Tensor, symbol: Tensor) -> Tensor:
    """Return the hash of a prefix with one more token. Products wrap around; the result is never negative (_NO_KEY)."""
    mixed = (key ^ ((symbol + 1) * _SPREAD)) * _MIX
    return (mixed ^ (mixed >> 29)) & _POSITIVE


def certain_blank(vocab_size: int, device: torch.device) -> Tensor:
    """Return log-probabilities (V,) float64 for frames behind the end, which change nothing: the blank is certain."""
    log_prob = torch.full((vocab_size,), -math.inf, dtype=torch.float64, device=device)
    log_prob[0] = 0.0
    return log_prob
