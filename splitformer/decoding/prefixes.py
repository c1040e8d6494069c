"""The beam of prefix_beam_search and modified_beam_search: token sequences ("prefixes") as tensors (N, B).

In each frame a prefix is kept as it is or extended by one token. Prefixes in a beam differ, so that two candidates
are equal in one case alone: a prefix was kept, and its parent (the prefix less its last token), in the beam too, was
extended by that token. Hence merging compares B x B keys and not B x V sequences. This module needs torch alone.
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
    """The B best candidates of a frame, the best first; each is (N, B).

    index: where in the V x B candidates of the utterance they were.
    source: the slot of the beam that they were made from.
    symbol: the token that they add; 0 for a prefix that was kept.

    Where there are fewer candidates than slots, the last slots hold some of log-probability -inf, and do so for good.
    """

    index: Tensor
    source: Tensor
    symbol: Tensor


class Prefixes:
    """What the prefixes of a beam are; how probable they are is the search's. It starts with the empty prefix.

    last: (N, B), the last token; 0 for the empty prefix.
    num_tokens: (N, B).

    A prefix is known by a 63-bit hash of its tokens: that two differ and have one hash has a chance of about 1e-19 for
    each pair that is compared.

    Raises:
      ValueError: where beam_size is below 1 or the context graph is of another vocabulary.
    """

    def __init__(
        self, batch: int, beam_size: int, vocab_size: int, context: ContextGraph | None, device: torch.device
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size {beam_size} must be 1 or more, the hypotheses kept for each utterance")
        if context is not None:
            context.check_vocabulary(vocab_size)
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
        """(N, B) float64: log-probability 0 in the first slot, -inf in the others. A beam starts so."""
        log_prob = torch.full_like(self._bonus, -math.inf)
        log_prob[:, 0] = 0.0
        return log_prob

    def through_parents(self, candidates: Tensor) -> Tensor:
        """(N, B, B): at [n, j, i] the candidate that makes prefix i of its parent j, -inf where j is not its parent.

        candidates: (N, B, V), each prefix extended by each token.
        """
        extended = candidates.gather(2, self.last.unsqueeze(1).expand(-1, self._beam_size, -1))
        return extended.masked_fill(~self._is_parent(), -math.inf)

    def drop_merged(self, candidates: Tensor) -> None:
        """Set to -inf, in place, the candidates that `through_parents` gives: what they say is in the beam already."""
        # added and not assigned: other prefixes may end in the same token and are no children of j
        removed = torch.zeros_like(candidates[:, :, :1]).masked_fill(self._is_parent(), -math.inf)
        candidates.scatter_add_(2, self.last.unsqueeze(1).expand(-1, self._beam_size, -1), removed)

    def _is_parent(self) -> Tensor:
        return self._key.unsqueeze(2) == self._parent_key.unsqueeze(1)

    def advance(self, candidates: Tensor) -> Choice:
        """Choose the best B candidates, each with its score in the context graph, and let the beam be them.

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
        # A slot of log-probability -inf may hold a copy of a prefix that another slot holds: the parent's mass is
        # for that one alone.
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
        """(N, B), what the prefixes get from the context graph if they end now; 0 without one."""
        return 0.0 if self._context is None else self._bonus + self._context.final_score[self._state]

    def record(self, source: Tensor, symbol: Tensor) -> None:
        """Remember for a frame, each (N, B), from which slot a hypothesis came, and what was emitted (0: nothing)."""
        self._trace.append((source, symbol))

    def trace(self, slot: Tensor) -> list[tuple[list[int], list[int]]]:
        """For each utterance the tokens that led to slot (N,), and the frames in which they were recorded."""
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
    """The hash of a prefix with one more token. Products wrap around; the result is not negative, as _NO_KEY is."""
    mixed = (key ^ ((symbol + 1) * _SPREAD)) * _MIX
    return (mixed ^ (mixed >> 29)) & _POSITIVE


def check_no_nan(values: Tensor, inside: Tensor, name: str) -> None:
    """Raises ValueError where values (N, T', ...) hold NaN in a frame that is `inside` (N, T') its utterance."""
    if (torch.isnan(values).any(dim=2) & inside).any():
        raise ValueError(f"{name} hold NaN: has the training diverged?")
