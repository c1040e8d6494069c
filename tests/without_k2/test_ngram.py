"""Modified Kneser-Ney: by hand, against the definition, sums of probabilities; ARPA files."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import product

import pytest

from splitformer.corpora.ngram import (
    BOS,
    EOS,
    _discounts,
    estimate_arpa,
    estimate_ngrams,
    perplexity,
    read_arpa,
    read_sentences,
    write_arpa,
)
from tests.texts import random_sentences


def test_bigram_computed_by_hand():
    """Text "A B", "A C".

    Bigrams: `<s> A` twice; A B, A C, B </s>, C </s> once: n_1 = 4, n_2 = 1, Y = 2/3, D_1 = 1 - 2 Y / 4 =
    2/3; D_2 would be 2 (n_3 = 0), so 1 stands in. Unigrams by predecessors: A 1, B 1, C 1, </s> 2: n_1 = 3,
    n_2 = 1, Y = 3/5, D_1 = 1 - 2 Y / 3 = 3/5, D_2 = 1; gamma = (3 x 3/5 + 1) / 5 = 0.56, uniform 1/4.
    """
    model = estimate_ngrams([["A", "B"], ["A", "C"]], order=2)
    expected = {
        ("A",): 0.4 / 5 + 0.14,
        ("B",): 0.4 / 5 + 0.14,
        ("C",): 0.4 / 5 + 0.14,
        (EOS,): 1 / 5 + 0.14,
        (BOS, "A"): 1 / 2 + 1 / 2 * 0.22,
        ("A", "B"): (1 - 2 / 3) / 2 + 2 / 3 * 0.22,
        ("A", "C"): (1 - 2 / 3) / 2 + 2 / 3 * 0.22,
        ("B", EOS): 1 / 3 + 2 / 3 * 0.34,
        ("C", EOS): 1 / 3 + 2 / 3 * 0.34,
    }
    assert model.log10_probs[BOS,] == -99
    assert {n: 10**p for n, p in model.log10_probs.items() if n != (BOS,)} == pytest.approx(expected)
    backoffs = {(BOS,): 1 / 2, ("A",): 2 / 3, ("B",): 2 / 3, ("C",): 2 / 3}
    assert {ngram: 10**b for ngram, b in model.log10_backoffs.items()} == pytest.approx(backoffs)
    assert 10 ** model.log10_prob("A", ["B"]) == pytest.approx(2 / 3 * 0.22)  # backed off
    # "A B" costs p(A|<s>) p(B|A) p(</s>|B)
    product_of_probs = 0.61 * expected["A", "B"] * expected["B", EOS]
    assert perplexity(model, [["A", "B"]]).perplexity == pytest.approx(product_of_probs ** (-1 / 3))


def test_discounts_computed_by_hand():
    # n_1..n_4 = 10, 5, 3, 2: Y = 1/2; D = 1 - 2/2 5/10, 2 - 3/2 3/5, 3 - 4/2 2/3
    counts = [1] * 10 + [2] * 5 + [3] * 3 + [4] * 2 + [17]
    assert _discounts(counts) == pytest.approx((0, 0.5, 1.1, 3 - 4 / 3))
    assert _discounts([5, 6, 7]) == [0, 0.5, 1.0, 1.5]  # no n_1: nothing to estimate from
    assert _discounts([1, 1, 2]) == pytest.approx((0, 1 - 2 * 0.5 * 1 / 2, 1.0, 1.5))  # n_3 = 0
    assert _discounts([1] * 10 + [2] + [3] * 9)[2] == 1.0  # D_2 would be negative


def by_definition(sentences, order: int, vocabulary: list[str], word: str, history: tuple) -> float:
    """p(word | history) from the definition, with every quantity counted in the text."""
    texts = [(BOS, *s, EOS) for s in sentences]
    vocabulary_size = len(vocabulary)

    def occurrences(ngram):
        n = len(ngram)
        return [(t, i) for t in texts for i in range(len(t) - n + 1) if t[i : i + n] == ngram]

    def count(ngram):
        found = occurrences(ngram)
        if len(ngram) == order or ngram[0] == BOS:
            return len(found)
        return len({t[i - 1] for t, i in found if i > 0})

    def discounts(n):
        ngrams = {t[i : i + n] for t in texts for i in range(len(t) - n + 1)} - {(BOS,)}
        return _discounts([count(ngram) for ngram in ngrams])

    def prob(word, history):
        n = len(history) + 1
        lower = prob(word, history[1:]) if history else 1 / vocabulary_size
        counts = {w: count((*history, w)) for w in vocabulary}
        total = sum(counts.values())
        if total == 0:
            return lower
        d = discounts(n)
        gamma = sum(d[min(c, 3)] for c in counts.values()) / total
        return max(counts[word] - d[min(counts[word], 3)], 0) / total + gamma * lower

    return prob(word, history[-(order - 1) :] if order > 1 else ())


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_definition(order):
    sentences = random_sentences(order, number=12)
    model = estimate_ngrams(sentences, order, extra_words=["unseen"])
    vocabulary = model.vocabulary
    rng = random.Random(0)
    words = [w for w in vocabulary if w != EOS]
    histories = [()] + [(BOS, *rng.choices(words, k=k))[-(order - 1) or 99 :] for k in (0, 1, 2, 3, 3)]
    histories += [tuple(s[i : i + order - 1]) for s in sentences[:3] for i in range(len(s))]
    for history in histories[: 12 if order < 4 else 7]:
        for word in vocabulary:
            expected = by_definition(sentences, order, vocabulary, word, history)
            assert 10 ** model.log10_prob(word, history) == pytest.approx(expected, rel=1e-9), (word, history)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_history_sums_to_one(order, seed):
    model = estimate_ngrams(random_sentences(seed), order, extra_words=["x", "y", "a", "<unk>"])
    words = [w for w in model.vocabulary if w != EOS]
    assert {"x", "y", "<unk>"} < set(words)
    histories = [h for k in range(order) for h in product(words, repeat=k)]
    histories += [(BOS, *h) for k in range(max(0, order - 1)) for h in product(words, repeat=k)]
    rng = random.Random(seed)
    for history in rng.sample(histories, min(len(histories), 300)):
        total = sum(10 ** model.log10_prob(word, history) for word in model.vocabulary)
        assert total == pytest.approx(1.0, abs=1e-9), history


def test_backoffs_belong_to_histories_and_suffixes_exist():
    model = estimate_ngrams(random_sentences(5), 3)
    assert all(ngram in model.log10_probs for ngram in model.log10_backoffs)
    for ngram in model.log10_probs:
        if len(ngram) > 1:
            assert ngram[1:] in model.log10_probs  # the back-off state of an arc
            assert ngram[:-1] in model.log10_backoffs  # the state that it leaves
        if ngram[-1] == EOS:
            assert ngram not in model.log10_backoffs
        assert BOS not in ngram[1:]


def test_extra_words_get_mass_and_change_nothing_else():
    sentences = random_sentences(7)
    model = estimate_ngrams(sentences, 3, extra_words=["x", "y", "a"])
    assert model.log10_prob("x", []) == model.log10_prob("y", []) < model.log10_prob("g", [])
    assert set(model.vocabulary) == {"x", "y", EOS} | {w for s in sentences for w in s}
    assert "<unk>" not in model.vocabulary
    assert perplexity(model, [["x", "zz", "a"]]).unknown == 1


def test_perplexity_prefers_the_training_text():
    train, other = random_sentences(1, 300), random_sentences(2, 50)
    unigram, trigram = (estimate_ngrams(train, order) for order in (1, 3))
    assert perplexity(trigram, train).perplexity < perplexity(unigram, train).perplexity
    result = perplexity(unigram, other)
    assert (result.sentences, result.words, result.unknown) == (50, sum(map(len, other)), 0)
    # a uniform model's perplexity is the size of its vocabulary
    uniform = estimate_ngrams([["a"], ["b"], ["c"]], 1, extra_words=[])
    spread = [10 ** uniform.log10_prob(w, []) for w in "abc"]
    assert spread == pytest.approx([spread[0]] * 3)


def test_arpa_round_trip_and_determinism(tmp_path):
    sentences = random_sentences(3)
    (tmp_path / "text").write_text("\n\n".join(" ".join(s) for s in sentences) + "\n")
    assert list(read_sentences(tmp_path / "text")) == sentences
    model = estimate_arpa(tmp_path / "text", tmp_path / "a.arpa", 3, extra_words=["y", "x"])
    read = read_arpa(tmp_path / "a.arpa")
    assert read.order == 3
    assert read.log10_probs == pytest.approx(model.log10_probs, abs=1e-7)
    assert read.log10_backoffs == pytest.approx(model.log10_backoffs, abs=1e-7)
    lines = (tmp_path / "a.arpa").read_text().splitlines()
    assert lines[0] == "\\data\\" and lines[-1] == "\\end\\"
    assert f"ngram 1={sum(len(n) == 1 for n in model.log10_probs)}" in lines
    write_arpa(estimate_ngrams(sentences, 3, extra_words=["x", "y"]), tmp_path / "b.arpa")
    assert (tmp_path / "a.arpa").read_bytes() == (tmp_path / "b.arpa").read_bytes()


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="order 0"):
        estimate_ngrams([["a"]], 0)
    with pytest.raises(ValueError, match="no words"):
        estimate_ngrams([], 2)
    with pytest.raises(ValueError, match="</s>"):
        estimate_ngrams([["a", "</s>", "b"]], 2)
    with pytest.raises(KeyError, match="zz"):
        estimate_ngrams([["a"]], 2).log10_prob("zz", [])
    write_arpa(estimate_ngrams(random_sentences(1), 2), tmp_path / "whole.arpa")
    whole = (tmp_path / "whole.arpa").read_text()
    (tmp_path / "cut.arpa").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.arpa"):
        read_arpa(tmp_path / "cut.arpa")
    (tmp_path / "page.arpa").write_text("<html>not found</html>\n")
    with pytest.raises(ValueError, match="not a complete ARPA"):
        read_arpa(tmp_path / "page.arpa")


def test_the_command_prints_the_perplexity(tmp_path, repo_root):
    (tmp_path / "text").write_text("A B\nA C\n")
    (tmp_path / "extra").write_text("D\nA\n")
    (tmp_path / "dev").write_text("A D\nB Z\n")
    script = repo_root / "local" / "estimate_lm.py"
    command = [
        sys.executable,
        script,
        "--text",
        tmp_path / "text",
        "--order",
        "2",
        "--arpa",
        tmp_path / "2.arpa",
    ]
    environment = {"PYTHONPATH": str(repo_root), "PATH": ""}
    good = subprocess.run(
        [*command, "--extra-words", tmp_path / "extra", "--dev-text", tmp_path / "dev"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert good.returncode == 0, good.stderr
    model = read_arpa(tmp_path / "2.arpa")
    assert model.vocabulary == [EOS, "A", "B", "C", "D"]
    value = perplexity(model, [["A", "D"], ["B", "Z"]])
    assert f"{value.perplexity:.2f}" in good.stdout and "1 unknown" in good.stdout
    bad = subprocess.run(
        [*command, "--extra-words", tmp_path / "none"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert bad.returncode != 0 and "Traceback" not in bad.stderr and "none" in bad.stderr
