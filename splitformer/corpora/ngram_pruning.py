"""Entropy pruning of n-gram models (Stolcke, "Entropy-based pruning of backoff language models", 1998).

Leaving out the n-gram `h w` makes the model back off there: p'(w | h) = a' p(w | h'), with a new weight a' that also
changes the other words that h has no n-gram for. The relative entropy between the two models is

    D = -p(h) { p(w | h) [log p(w | h') + log a' - log p(w | h)] + (log a' - log a) B }

where h' is h without its first word, B the mass that h gives to words it has no n-gram for, and

    a  = B / (1 - sum of p(v | h') over the words v that h has n-grams for)
    a' = (B + p(w | h)) / (the same without w)

exp(D) - 1 is the relative rise of the perplexity. n-grams below a threshold go, the longest ones first, all of an order
by the model as it was before; one that begins a longer one that is left stays, because readers of ARPA files want it.
"""

from __future__ import annotations

import math
from collections import defaultdict

from splitformer.corpora.ngram import BOS, EOS, Ngram, NgramModel


def prune_ngrams(model: NgramModel, threshold: float) -> NgramModel:
    """`model` without the n-grams each of which is worth less than `threshold`, a relative rise of the perplexity.

    Unigrams stay. Graphs shrink about as the number of n-grams does: 1e-8 to 1e-6 are usual.

    Raises:
      ValueError: for a threshold below 0.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold {threshold}: a relative rise of the perplexity is 0 or above, such as 1e-7")
    kept = dict(model.log10_probs)
    prefixes: set[Ngram] = set()
    for n in range(model.order, 1, -1):
        words_of = _words_by_history(kept, n)
        for history, words in words_of.items():
            for word in _worthless(model, history, words, threshold):
                if (*history, word) not in prefixes:
                    del kept[(*history, word)]
        prefixes = {ngram[:-1] for ngram in kept if len(ngram) == n}
    return _with_backoffs(kept, model.order)


def _words_by_history(log10_probs: dict[Ngram, float], n: int) -> dict[Ngram, list[str]]:
    words: dict[Ngram, list[str]] = defaultdict(list)
    for ngram in log10_probs:
        if len(ngram) == n:
            words[ngram[:-1]].append(ngram[-1])
    return words


def _worthless(model: NgramModel, history: Ngram, words: list[str], threshold: float) -> list[str]:
    """The words whose n-gram after `history` may go."""
    probs = [10 ** model.log10_prob(word, history) for word in words]
    lower = [10 ** model.log10_prob(word, history[1:]) for word in words]
    left, left_lower = 1.0 - math.fsum(probs), 1.0 - math.fsum(lower)
    if min(left, left_lower) < 1e-12:
        return []  # the history has n-grams for all words: any one of them is free to leave out, but not all
    weight = _history_prob(model, history)
    found = []
    for word, prob, backed_off in zip(words, probs, lower):
        new = math.log((left + prob) / (left_lower + backed_off))
        change = (new - math.log(left / left_lower)) * left
        divergence = -weight * (prob * (math.log(backed_off) + new - math.log(prob)) + change)
        if math.expm1(divergence) < threshold:
            found.append(word)
    return found


def _history_prob(model: NgramModel, history: Ngram) -> float:
    """p(history); a sentence begins as often as one ends."""
    prob = 1.0
    for position, word in enumerate(history):
        prob *= 10 ** (model.log10_prob(EOS, ()) if word == BOS else model.log10_prob(word, history[:position]))
    return prob


def _with_backoffs(log10_probs: dict[Ngram, float], order: int) -> NgramModel:
    """The model of these probabilities with the weights that make each history's sum to one, the shortest first."""
    model = NgramModel(order, log10_probs, {})
    for n in range(2, order + 1):
        for history, words in _words_by_history(log10_probs, n).items():
            left = 1.0 - math.fsum(10 ** log10_probs[(*history, word)] for word in words)
            left_lower = 1.0 - math.fsum(10 ** model.log10_prob(word, history[1:]) for word in words)
            # where nothing is left for other words, there are none
            model.log10_backoffs[history] = math.log10(left / left_lower) if min(left, left_lower) > 1e-12 else 0.0
    return model
