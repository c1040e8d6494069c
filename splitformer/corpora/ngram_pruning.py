"""Entropy pruning of n-gram models (Stolcke, "Entropy-based pruning of backoff language models", 1998).

Without the n-gram `h w` the model backs off there: p'(w | h) = a' p(w | h'), with a new weight a' that also changes the
other words for which h has no n-gram. The relative entropy between the two models is

    D = -p(h) { p(w | h) [log p(w | h') + log a' - log p(w | h)] + (log a' - log a) B }

where h' is h without its first word, B the mass that h gives to words for which it has no n-gram, and

    a  = B / (1 - sum of p(v | h') over the words v for which h has n-grams)
    a' = (B + p(w | h)) / (the same without w)

exp(D) - 1 is the relative increase of the perplexity. n-grams below a threshold are removed, the longest first; those
of one order are compared with the model as it was before. An n-gram that begins a longer one that is kept stays,
because readers of ARPA files want it.
"""

from __future__ import annotations

import math
from collections import defaultdict

from splitformer.corpora.ngram import BOS, EOS, Ngram, NgramModel
from splitformer.errors import UserError


def prune_ngrams(model: NgramModel, threshold: float) -> NgramModel:
    """Return `model` without the n-grams whose removal increases the perplexity by less than `threshold`, relatively.

    Unigrams stay. Graphs shrink about as the number of n-grams does; 1e-8 to 1e-6 are usual.

    Raises:
      UserError: the threshold is negative.
    """
    if not threshold >= 0:
        raise UserError(f"threshold {threshold}: a relative increase of the perplexity is 0 or more, such as 1e-7")
    kept = dict(model.log10_probs)
    prefixes: set[Ngram] = set()
    for n in range(model.order, 1, -1):
        for history, words in _words_by_history(kept, n).items():
            for word in _removable(model, history, words, threshold):
                ngram = (*history, word)
                if ngram not in prefixes:
                    del kept[ngram]
        prefixes = {ngram[:-1] for ngram in kept if len(ngram) == n}
    return with_backoffs(kept, model.order)


def _words_by_history(log10_probs: dict[Ngram, float], n: int) -> dict[Ngram, list[str]]:
    words: dict[Ngram, list[str]] = defaultdict(list)
    for ngram in log10_probs:
        if len(ngram) == n:
            words[ngram[:-1]].append(ngram[-1])
    return words


def _removable(model: NgramModel, history: Ngram, words: list[str], threshold: float) -> list[str]:
    """Return the words whose n-gram after `history` is below the threshold."""
    probs = [10 ** model.log10_prob(word, history) for word in words]
    lower = [10 ** model.log10_prob(word, history[1:]) for word in words]
    rest, rest_lower = 1.0 - math.fsum(probs), 1.0 - math.fsum(lower)
    if min(rest, rest_lower) < 1e-12:
        return []  # the history has n-grams for all words: removing any one costs nothing, removing all does
    weight = _history_prob(model, history)
    removable = []
    for word, prob, backed_off in zip(words, probs, lower):
        new = math.log((rest + prob) / (rest_lower + backed_off))
        change = (new - math.log(rest / rest_lower)) * rest
        divergence = -weight * (prob * (math.log(backed_off) + new - math.log(prob)) + change)
        if math.expm1(divergence) < threshold:
            removable.append(word)
    return removable


def _history_prob(model: NgramModel, history: Ngram) -> float:
    """Return p(history); a sentence begins as often as one ends."""
    prob = 1.0
    for position, word in enumerate(history):
        prob *= 10 ** (model.log10_prob(EOS, ()) if word == BOS else model.log10_prob(word, history[:position]))
    return prob


def with_backoffs(log10_probs: dict[Ngram, float], order: int) -> NgramModel:
    """Return the model of these probabilities, with the back-off weights that make each history sum to one."""
    model = NgramModel(order, log10_probs, {})
    for n in range(2, order + 1):
        for history, words in _words_by_history(log10_probs, n).items():
            rest = 1.0 - math.fsum(10 ** model.log10_prob(word, history) for word in words)
            rest_lower = 1.0 - math.fsum(10 ** model.log10_prob(word, history[1:]) for word in words)
            # without rest there are no other words
            model.log10_backoffs[history] = math.log10(rest / rest_lower) if min(rest, rest_lower) > 1e-12 else 0.0
    return model
