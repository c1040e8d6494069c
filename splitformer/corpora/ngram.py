"""Back-off n-gram language models: modified Kneser-Ney estimation, the ARPA format, perplexity.

The estimate is interpolated modified Kneser-Ney as in Chen & Goodman, "An Empirical Study of Smoothing Techniques for
Language Modeling", Harvard TR-10-98, 1998, section 3. With history h = w_1..w_{n-1} and h' = w_2..w_{n-1},

    p(w | h) = (c(hw) - D(c(hw))) / c(h.) + gamma(h) p(w | h')
    gamma(h) = (D_1 N_1(h.) + D_2 N_2(h.) + D_3 N_3+(h.)) / c(h.)

where N_k(h.) is the number of words seen k times after h. At the highest order, and for n-grams that begin with `<s>`,
which nothing can precede, c is the count; at lower orders it is the number of different words seen before the n-gram.
The recursion ends in the uniform distribution over the vocabulary. The discounts of each order come from its counts of
counts, n_k = number of n-grams with c = k:

    Y = n_1 / (n_1 + 2 n_2),   D_k = k - (k + 1) Y n_{k+1} / n_k   for k = 1, 2, 3 (3 stands for 3 and more).

All n-grams are in memory (some 200 bytes each), which suits transcripts of up to a few million words.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitformer.errors import UserError
from splitformer.files import atomic_write

BOS, EOS = "<s>", "</s>"
NO_PROBABILITY = -99.0
"""log10(0) in ARPA files: `<s>` is never predicted."""

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class NgramModel:
    """A back-off model as in an ARPA file, in log10."""

    order: int
    log10_probs: dict[Ngram, float]
    """of n-grams of every order up to `order`"""
    log10_backoffs: dict[Ngram, float]
    """of the n-grams that are histories; 0 for all others"""

    @property
    def vocabulary(self) -> list[str]:
        """The words that the model can predict, including `</s>`, sorted."""
        return sorted(ngram[0] for ngram in self.log10_probs if len(ngram) == 1 and ngram[0] != BOS)

    def log10_prob(self, word: str, history: Sequence[str]) -> float:
        """Return log10 p(word | history); of the history, the last `order - 1` words count.

        Raises:
          KeyError: the word is not in the vocabulary.
        """
        if word == BOS or (word,) not in self.log10_probs:
            raise KeyError(f"{word!r} is not a word of this language model")
        ngram = (*history[max(0, len(history) - self.order + 1) :], word)
        backoff = 0.0
        while ngram not in self.log10_probs:
            backoff += self.log10_backoffs.get(ngram[:-1], 0.0)
            ngram = ngram[1:]
        return backoff + self.log10_probs[ngram]


@dataclass(frozen=True)
class Perplexity:
    """perplexity: per word and sentence end, without unknown words; words, sentences, unknown: their numbers."""

    perplexity: float
    words: int
    sentences: int
    unknown: int


def read_sentences(path: str | Path) -> Iterator[list[str]]:
    """Yield the words of each line of a UTF-8 text, without empty lines."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if words := line.split():
                yield words


def estimate_arpa(text: str | Path, arpa: str | Path, order: int, extra_words: Iterable[str] = ()) -> NgramModel:
    """Estimate a model on the lines of `text` and write it to `arpa`; see estimate_ngrams."""
    model = estimate_ngrams(read_sentences(text), order, extra_words)
    write_arpa(model, arpa)
    return model


def estimate_ngrams(sentences: Iterable[Sequence[str]], order: int, extra_words: Iterable[str] = ()) -> NgramModel:
    """Return an interpolated modified Kneser-Ney model with a closed vocabulary.

    Args:
      sentences: each a sequence of words, without `<s>` and `</s>`.
      order: 1 or more.
      extra_words: words of the vocabulary that the sentences may lack; they get a share of the unigrams' back-off mass.
    Raises:
      UserError: the order is below 1, there are no sentences, or `<s>` or `</s>` is among the words.
    """
    if order < 1:
        raise UserError(f"order {order}: an n-gram model has order 1 or more")
    counts = _counts(sentences, order)
    vocabulary = ({ngram[0] for ngram in counts[1]} | set(extra_words)) - {BOS}
    probs: dict[Ngram, float] = {(word,): 1.0 / len(vocabulary) for word in vocabulary}
    backoffs: dict[Ngram, float] = {}
    for n in range(1, order + 1):
        discounts = _discounts(counts[n].values())
        totals: dict[Ngram, int] = defaultdict(int)
        discounted: dict[Ngram, float] = defaultdict(float)
        for ngram, count in counts[n].items():
            totals[ngram[:-1]] += count
            discounted[ngram[:-1]] += discounts[min(count, 3)]
        if n == 1:  # words that were never seen keep their uniform share
            gamma = discounted[()] / totals[()]
            probs = {ngram: gamma * uniform for ngram, uniform in probs.items()}
            for ngram, count in counts[1].items():
                probs[ngram] += (count - discounts[min(count, 3)]) / totals[()]
            continue
        for history, total in totals.items():
            backoffs[history] = discounted[history] / total
        for ngram, count in counts[n].items():
            history = ngram[:-1]
            seen = (count - discounts[min(count, 3)]) / totals[history]
            probs[ngram] = seen + backoffs[history] * probs[ngram[1:]]

    log10_probs = {ngram: math.log10(prob) for ngram, prob in probs.items()}
    log10_probs[(BOS,)] = NO_PROBABILITY  # readers expect it among the unigrams
    return NgramModel(order, log10_probs, {ngram: math.log10(weight) for ngram, weight in backoffs.items()})


def _counts(sentences: Iterable[Sequence[str]], order: int) -> dict[int, Counter[Ngram]]:
    """Return c of the module's docstring for the n-grams of each order. No n-gram ends in `<s>`."""
    counts: dict[int, Counter[Ngram]] = {n: Counter() for n in range(1, order + 1)}
    for sentence in sentences:
        for reserved in (BOS, EOS):
            if reserved in sentence:
                raise UserError(f"{reserved} is reserved and cannot be a word of: {' '.join(sentence)}")
        words = (BOS, *sentence, EOS)
        for end in range(2, len(words) + 1):
            # the longest n-gram that ends here is counted; the shorter ones follow from the longer ones below
            start = max(0, end - order)
            counts[end - start][words[start:end]] += 1
    if not any(counts.values()):
        raise UserError("the text has no words to estimate a language model on")
    for n in range(order, 1, -1):
        for ngram in counts[n]:
            counts[n - 1][ngram[1:]] += 1
    return counts


def _discounts(counts: Iterable[int]) -> list[float]:
    """Return D for the counts 0, 1, 2, 3+; k / 2 replaces an estimate of D_k that is undefined or outside (0, k).

    That happens with small texts, and with the unigrams of a text in which every word is frequent.
    """
    of_count = Counter(count for count in counts if count <= 4)
    discounts = [0.0, 0.5, 1.0, 1.5]
    if of_count[1] and of_count[2]:
        y = of_count[1] / (of_count[1] + 2 * of_count[2])
        for k in (1, 2, 3):
            if of_count[k]:
                estimate = k - (k + 1) * y * of_count[k + 1] / of_count[k]
                if 0 < estimate < k:
                    discounts[k] = estimate
    return discounts


def perplexity(model: NgramModel, sentences: Iterable[Sequence[str]]) -> Perplexity:
    """Return the perplexity of the sentences, including their ends.

    Unknown words are left out and counted. After one, the history is empty, as in other tools.
    """
    total, words, count, unknown = 0.0, 0, 0, 0
    for sentence in sentences:
        count += 1
        history: list[str] = [BOS]
        for word in (*sentence, EOS):
            if (word,) not in model.log10_probs:
                unknown += 1
                history = []
                continue
            total += model.log10_prob(word, history)
            history.append(word)
        words += len(sentence)
    predicted = words + count - unknown
    return Perplexity(10 ** (-total / predicted) if predicted else math.nan, words, count, unknown)


def write_arpa(model: NgramModel, path: str | Path) -> None:
    """Write `model` in the ARPA format, sorted, so that equal models give equal files."""
    orders: dict[int, list[Ngram]] = {n: [] for n in range(1, model.order + 1)}
    for ngram in sorted(model.log10_probs):
        orders[len(ngram)].append(ngram)
    with atomic_write(path) as file:
        file.write("\\data\\\n")
        for n, ngrams in orders.items():
            file.write(f"ngram {n}={len(ngrams)}\n")
        for n, ngrams in orders.items():
            file.write(f"\n\\{n}-grams:\n")
            for ngram in ngrams:
                backoff = f"\t{model.log10_backoffs[ngram]:.7f}" if ngram in model.log10_backoffs else ""
                file.write(f"{model.log10_probs[ngram]:.7f}\t{' '.join(ngram)}{backoff}\n")
        file.write("\n\\end\\\n")


def read_arpa(path: str | Path) -> NgramModel:
    """Read an ARPA file. Raises UserError, with the line, if it is malformed or incomplete."""
    announced: dict[int, int] = {}
    found: Counter[int] = Counter()
    log10_probs: dict[Ngram, float] = {}
    log10_backoffs: dict[Ngram, float] = {}
    section = ""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(map(str.strip, file), 1):
            try:
                if line.startswith("\\") and line.endswith(("\\", "-grams:")):
                    section = line
                    if section == "\\end\\":
                        break
                elif line and section == "\\data\\":
                    order, count = line.removeprefix("ngram ").split("=")
                    announced[int(order)] = int(count)
                elif line and section:
                    n = int(section[1:].removesuffix("-grams:"))
                    log10_prob, *fields = line.split()
                    if len(fields) not in (n, n + 1):
                        raise ValueError("wrong number of fields")
                    ngram = tuple(fields[:n])
                    log10_probs[ngram] = float(log10_prob)
                    if len(fields) > n:
                        log10_backoffs[ngram] = float(fields[n])
                    found[n] += 1
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {line!r} is out of place: {error}") from None
    if section != "\\end\\" or dict(found) != {n: count for n, count in announced.items() if count}:
        raise UserError(f"{path} is not a complete ARPA file: it announces {announced} n-grams and has {dict(found)}")
    return NgramModel(max(announced), log10_probs, log10_backoffs)
