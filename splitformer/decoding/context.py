"""Hot words: `ContextGraph`, phrases that a search favours, as one deterministic automaton over tokens.

This is shallow-fusion biasing (Zhao et al., Interspeech 2019). While a hypothesis spells a phrase, each token earns a
boost. Where it turns away from the phrase, the boost is taken back. The automaton is that of Aho & Corasick (1975) with
resolved failure links, so that each state has one arc per token and searches can index it as a tensor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContextGraph:
    """Phrases as an automaton with S states over V tokens; state 0 is the start, token 0 the blank.

    next_state: (S, V) int64, the state after each token. The blank changes no state.
    score: (S, V) float32, nats for each token; 0 for the blank.
    final_score: (S,) float32, nats for ending in a state.

    The score of a token sequence, `final_score` included, is

        sum over phrases and over their occurrences in the sequence: boost x tokens of the phrase

    Every occurrence counts, whether it overlaps with others or lies inside one. A search that prunes needs boosts
    early, so an unfinished phrase is credited in advance. That credit is a potential of the state,

        potential(s) = max over the phrases that s has begun and not ended: boost x tokens matched so far

    (0 without such a phrase). An arc from s to r scores potential(r) - potential(s) + the phrases that end at r. Over a
    sequence the potentials cancel out; `final_score` = -potential takes back the last one.
    """

    next_state: Tensor
    score: Tensor
    final_score: Tensor

    @classmethod
    def build(cls, phrases: Sequence[Sequence[int]], vocab_size: int, boost: float | Sequence[float]) -> ContextGraph:
        """Build the graph of `phrases`. It takes 12 bytes per state and token, and has at most one state per token.

        Args:
          phrases: token ids of each phrase, as the tokenizer spells it. A repeated phrase counts once, with its highest
            boost.
          vocab_size: V, tokens including the blank.
          boost: nats per token, above 0; one for all phrases or one for each.
        Raises:
          ValueError: there is no phrase or an empty one, a token is outside 1..vocab_size - 1, or boosts are not finite
            and above 0, or not as many as phrases.
        """
        boosts = _checked_boosts(phrases, vocab_size, boost)

        # the trie: a node for each prefix of a phrase
        children: list[dict[int, int]] = [{}]
        depth, highest_boost, reward = [0], [0.0], [0.0]
        for phrase, phrase_boost in boosts.items():
            node = 0
            for token in phrase:
                highest_boost[node] = max(highest_boost[node], phrase_boost)
                if token not in children[node]:
                    children[node][token] = len(children)
                    children.append({})
                    depth.append(depth[node] + 1)
                    highest_boost.append(0.0)
                    reward.append(0.0)
                node = children[node][token]
            reward[node] = phrase_boost * len(phrase)

        # Breadth first: the failure state of a node (its longest proper suffix in the trie) is less deep, so its row is
        # complete. A row is that of the failure state, except for the tokens that continue a phrase.
        next_state = torch.zeros(len(children), vocab_size, dtype=torch.int64)
        failure = [0] * len(children)
        potential = [0.0] * len(children)
        queue = deque([0])
        while queue:
            node = queue.popleft()
            if node:
                next_state[node] = next_state[failure[node]]
                reward[node] += reward[failure[node]]
                potential[node] = max(depth[node] * highest_boost[node], potential[failure[node]])
            for token, child in children[node].items():
                failure[child] = int(next_state[node, token])
                next_state[node, token] = child
                queue.append(child)

        leaving = torch.tensor(potential, dtype=torch.float64)
        entering = leaving + torch.tensor(reward, dtype=torch.float64)
        score = entering[next_state] - leaving.unsqueeze(1)
        next_state[:, 0] = torch.arange(len(children))
        score[:, 0] = 0.0
        return cls(next_state, score.float(), -leaving.float())

    @property
    def vocab_size(self) -> int:
        return self.next_state.shape[1]

    def to(self, device: torch.device | str) -> ContextGraph:
        return ContextGraph(self.next_state.to(device), self.score.to(device), self.final_score.to(device))

    def arcs(self) -> Tensor:
        """Return the arcs for k2.Fsa, sorted by source state: (S * V, 4) int32 of source, target, token and score bits.

        There is none for the blank. Each state has one with token -1 and its `final_score` to the final state S.
        """
        states, tokens = self.next_state.shape
        device = self.next_state.device
        source = torch.arange(states, device=device).repeat_interleave(tokens)
        label = torch.cat([torch.arange(1, tokens, device=device), torch.tensor([-1], device=device)]).repeat(states)
        final = torch.full((states, 1), states, device=device)
        target = torch.cat([self.next_state[:, 1:], final], dim=1).flatten()
        score = torch.cat([self.score[:, 1:], self.final_score.unsqueeze(1)], dim=1).flatten()
        arcs = torch.stack([source, target, label], dim=1).to(torch.int32)
        return torch.cat([arcs, score.view(torch.int32).unsqueeze(1)], dim=1)


def _checked_boosts(
    phrases: Sequence[Sequence[int]], vocab_size: int, boost: float | Sequence[float]
) -> dict[tuple[int, ...], float]:
    """Return {phrase: its boost}."""
    if len(phrases) == 0:
        raise ValueError("phrases is empty: give one or more, or search without a context graph")
    boosts = [float(boost)] * len(phrases) if isinstance(boost, (int, float)) else [float(b) for b in boost]
    if len(boosts) != len(phrases):
        raise ValueError(f"{len(boosts)} boosts for {len(phrases)} phrases: give one boost for all, or one for each")
    checked: dict[tuple[int, ...], float] = {}
    for number, (phrase, phrase_boost) in enumerate(zip(map(tuple, phrases), boosts)):
        if not phrase:
            raise ValueError(f"phrase {number} of {len(phrases)} is empty: leave it out")
        if not all(0 < token < vocab_size for token in phrase):
            raise ValueError(f"phrase {number}, {list(phrase)}, has tokens outside 1..{vocab_size - 1}")
        if not (math.isfinite(phrase_boost) and phrase_boost > 0):
            raise ValueError(f"boost {phrase_boost} of phrase {number} must be finite and above 0, in nats per token")
        checked[phrase] = max(phrase_boost, checked.get(phrase, 0.0))
    return checked
