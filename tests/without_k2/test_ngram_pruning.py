"""Entropy pruning against the divergence of the two models, summed word by word."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest

from splitformer.corpora.ngram import BOS, EOS, NgramModel, estimate_arpa, estimate_ngrams, perplexity, read_arpa
from splitformer.corpora.ngram_pruning import prune_ngrams, with_backoffs
from tests.texts import random_sentences


def history_prob(model: NgramModel, history: tuple[str, ...]) -> float:
    prob = 1.0
    for i, word in enumerate(history):
        prob *= 10 ** (model.log10_prob(EOS, ()) if word == BOS else model.log10_prob(word, history[:i]))
    return prob


def increase_without(model: NgramModel, ngram: tuple[str, ...]) -> float:
    """The relative increase of the perplexity if only `ngram` is removed, summed over the vocabulary."""
    without = with_backoffs({n: p for n, p in model.log10_probs.items() if n != ngram}, model.order)
    history = ngram[:-1]
    divergence = sum(
        10 ** model.log10_prob(word, history)
        * (model.log10_prob(word, history) - without.log10_prob(word, history))
        * math.log(10)
        for word in model.vocabulary
    )
    return math.expm1(history_prob(model, history) * divergence)


def ngrams_of(model: NgramModel, n: int) -> set[tuple[str, ...]]:
    return {ngram for ngram in model.log10_probs if len(ngram) == n}


@pytest.mark.parametrize("seed", range(4))
def test_ngrams_below_the_threshold_are_removed(seed):
    model = estimate_ngrams(random_sentences(seed), order=2)
    increases = {ngram: increase_without(model, ngram) for ngram in ngrams_of(model, 2)}
    followers = Counter(history for history, _ in increases)
    # a history with n-grams for all words keeps them: removing any one costs nothing, removing all does
    increases = {n: r if followers[n[0]] < len(model.vocabulary) else math.inf for n, r in increases.items()}
    threshold = sorted(increases.values())[len(increases) // 2] * (1 + 1e-9)
    pruned = prune_ngrams(model, threshold)
    assert ngrams_of(pruned, 2) == {ngram for ngram, increase in increases.items() if increase >= threshold}
    assert 0 < len(ngrams_of(pruned, 2)) < len(increases)
    assert all(pruned.log10_probs[ngram] == model.log10_probs[ngram] for ngram in pruned.log10_probs)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 1e-2])
def test_every_history_still_sums_to_one_and_prefixes_stay(threshold):
    model = estimate_ngrams(random_sentences(7), order=3, extra_words=["unseen"])
    pruned = prune_ngrams(model, threshold)
    histories = {ngram[:-1] for ngram in model.log10_probs}
    for history in histories:
        assert sum(10 ** pruned.log10_prob(w, history) for w in pruned.vocabulary) == pytest.approx(1.0, abs=1e-9)
    for n in (2, 3):
        assert {ngram[:-1] for ngram in ngrams_of(pruned, n)} <= ngrams_of(pruned, n - 1)
    assert ngrams_of(pruned, 1) == ngrams_of(model, 1)


def test_a_higher_threshold_removes_more_and_increases_the_perplexity():
    sentences = random_sentences(3)
    model = estimate_ngrams(sentences, order=3)
    same = prune_ngrams(model, 0.0)
    assert same.log10_probs == model.log10_probs
    assert same.log10_backoffs == pytest.approx(model.log10_backoffs)
    few = prune_ngrams(model, math.inf)
    assert len(ngrams_of(few, 2)) < 0.3 * len(ngrams_of(model, 2))
    assert ngrams_of(few, 1) == ngrams_of(model, 1)
    sizes, perplexities = [], []
    for threshold in (0.0, 1e-4, 1e-3, 1e-2, math.inf):
        pruned = prune_ngrams(model, threshold)
        sizes.append(len(pruned.log10_probs))
        perplexities.append(perplexity(pruned, sentences).perplexity)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[-1]
    assert perplexities == sorted(perplexities)


def test_the_command_prints_how_many_are_kept(tmp_path):
    (tmp_path / "text").write_text("\n".join(map(" ".join, random_sentences(5))))
    model = estimate_arpa(tmp_path / "text", tmp_path / "3.arpa", order=3)
    command = [sys.executable, "-m", "local.prune_lm", "--arpa", tmp_path / "3.arpa", "--output", tmp_path / "p.arpa"]

    def run(threshold):
        return subprocess.run([*map(str, command), "--threshold", threshold], capture_output=True, text=True)

    done = run("1e-3")
    assert done.returncode == 0, done.stderr
    pruned = read_arpa(tmp_path / "p.arpa")
    assert 7 < len(pruned.log10_probs) < len(model.log10_probs)
    assert f"{len(model.log10_probs)} n-grams, {len(pruned.log10_probs)} of them kept" in done.stdout
    assert "threshold -1.0" in run("-1").stderr
