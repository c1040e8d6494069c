"""Back-off n-gram language models: modified Kneser-Ney estimation, the ARPA format, perplexity.

Estimation is interpolated modified Kneser-Ney as in Chen & Goodman, "An Empirical Study of Smoothing
Techniques for Language Modeling", Harvard TR-10-98, 1998, section 3. With history h = w_1..w_{n-1} and
h' = w_2..w_{n-1},

    p(w | h) = (c(hw) - D(c(hw))) / c(h.) + gamma(h) p(w | h')
    gamma(h) = (D_1 N_1(h.) + D_2 N_2(h.) + D_3 N_3+(h.)) / c(h.)

where N_k(h.) is the number of words seen k times after h. At the highest order, and for n-grams that begin
with `<s>`, which nothing can precede, c is the count; at lower orders it is the number of different words
seen before the n-gram. The recursion ends in the uniform distribution over the vocabulary. The discounts of
each order come from its counts of counts, n_k = number of n-grams with c = k:

    Y = n_1 / (n_1 + 2 n_2),   D_k = k - (k + 1) Y n_{k+1} / n_k   for k = 1, 2, 3 (3 stands for 3 and more).

Every n-gram is held in memory (some 200 bytes each): made for transcripts of up to a few million words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitformer.files import atomic_write

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
NO_PROBABILITY = -99.0  # what ARPA files write for log10(0): `<s>` is never predicted

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class NgramModel:
    """A back-off model as an ARPA file holds it, in log10.

    log10_probs: for n-grams of every order up to `order`.
    log10_backoffs: for those of them that are histories; 0 for all others.
    """

    order: int
    log10_probs: dict[Ngram, float]
    log10_backoffs: dict[Ngram, float]

    @property
    def vocabulary(self) -> list[str]:
        """The words that the model can predict, `</s>` among them, sorted."""
        return sorted(ngram[0] for ngram in self.log10_probs if len(ngram) == 1 and ngram[0] != BOS)

    def log10_prob(self, word: str, history: Sequence[str]) -> float:
        """log10 p(word | history), of which the last `order - 1` words count.

        Raises KeyError for a word outside the vocabulary.
        """
        if word == BOS or (word,) not in self.log10_probs:
            raise KeyError(f"{word!r} is no word of this language model")
        history = tuple(history[max(0, len(history) - self.order + 1) :])
        backoff = 0.0
        while (*history, word) not in self.log10_probs:
            backoff += self.log10_backoffs.get(history, 0.0)
            history = history[1:]
        return backoff + self.log10_probs[(*history, word)]


@dataclass(frozen=True)
class Perplexity:
    """perplexity: per word and sentence end, unknown words left out; words, sentences, unknown: how many."""

    perplexity: float
    words: int
    sentences: int
    unknown: int


def read_sentences(path: str | Path) -> Iterator[list[str]]:
    """The words of each line of a UTF-8 text; lines without words are left out."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if words := line.split():
                yield words


def estimate_arpa(
    text: str | Path,
    arpa: str | Path,
    order: int,
    extra_words: Iterable[str] = (),
    unknown_word: str | None = None,
) -> NgramModel:
    """Estimate a model on the lines of `text` and write it to `arpa`; see estimate_ngrams."""
    model = estimate_ngrams(read_sentences(text), order, extra_words, unknown_word)
    write_arpa(model, arpa)
    return model


def estimate_ngrams(
    sentences: Iterable[Sequence[str]],
    order: int,
    extra_words: Iterable[str] = (),
    unknown_word: str | None = None,
) -> NgramModel:
    """Interpolated modified Kneser-Ney over a closed vocabulary. The result depends on the sentences alone.

    Args:
      sentences: each a sequence of words, without `<s>` and `</s>`.
      order: 1 or more.
      extra_words: words that belong to the vocabulary although the sentences may lack them; they get their
        share of the unigrams' back-off mass.
      unknown_word: such as "<unk>", treated as one more extra word. None: the model has no unknown word.
    Raises:
      ValueError: for an order below 1, no sentences, or `<s>`, `</s>` among the words.
    """
    if order < 1:
        raise ValueError(f"order {order}: an n-gram model has order 1 or more")
    counts = _counts(sentences, order)
    vocabulary = {ngram[0] for ngram in counts[1]} | set(extra_words)
    if unknown_word is not None:
        vocabulary.add(unknown_word)
    vocabulary.discard(BOS)

    probs: dict[Ngram, float] = {(word,): 1.0 / len(vocabulary) for word in vocabulary}
    backoffs: dict[Ngram, float] = {}
    for n in range(1, order + 1):
        discounts = _discounts(counts[n].values())
        totals: Counter[Ngram] = Counter()
        discounted: Counter[Ngram] = Counter()
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
    log10_probs[(BOS,)] = NO_PROBABILITY  # readers want it among the unigrams
    return NgramModel(order, log10_probs, {ngram: math.log10(weight) for ngram, weight in backoffs.items()})


def _counts(sentences: Iterable[Sequence[str]], order: int) -> dict[int, Counter[Ngram]]:
    """For each order its n-grams with c of the module's docstring. No n-gram ends in `<s>`."""
    counts: dict[int, Counter[Ngram]] = {n: Counter() for n in range(1, order + 1)}
    for sentence in sentences:
        for reserved in (BOS, EOS):
            if reserved in sentence:
                raise ValueError(f"{reserved} is a sentence's edge and cannot be a word of: {' '.join(sentence)}")
        words = (BOS, *sentence, EOS)
        for end in range(2, len(words) + 1):
            # the longest n-gram that ends here is counted; the shorter ones follow from the longer ones below
            start = max(0, end - order)
            counts[end - start][words[start:end]] += 1
    if not any(counts.values()):
        raise ValueError("the text holds no words to estimate a language model on")
    for n in range(order, 1, -1):
        for ngram in counts[n]:
            counts[n - 1][ngram[1:]] += 1
    return counts


def _discounts(counts: Iterable[int]) -> tuple[float, float, float, float]:
    """D by count class 0, 1, 2, 3+. k / 2 stands in where the estimate of D_k is undefined or outside (0, k).

    That happens on small texts, and at the unigrams of a text whose every word is frequent.
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
    return tuple(discounts)


def perplexity(model: NgramModel, sentences: Iterable[Sequence[str]]) -> Perplexity:
    """Perplexity of the sentences, each with its end. Unknown words are left out and counted.

    After an unknown word the history starts anew, as in other tools.
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
    """Write `model` in the ARPA format, n-grams sorted, so that equal models give equal files."""
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
    """Read an ARPA file. Raises ValueError, with the line, for a file that is none or that ends too early."""
    announced: dict[int, int] = {}
    found: Counter[int] = Counter()
    log10_probs: dict[Ngram, float] = {}
    log10_backoffs: dict[Ngram, float] = {}
    section = ""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            try:
                if not line:
                    continue
                if line.startswith("\\") and line.endswith(("\\", "-grams:")):
                    section = line
                    if section == "\\end\\":
                        break
                elif section == "\\data\\":
                    order, count = line.removeprefix("ngram ").split("=")
                    announced[int(order)] = int(count)
                elif section:
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
                raise ValueError(f"{path}, line {number}: {line!r} is out of place: {error}") from None
    if section != "\\end\\" or dict(found) != {n: count for n, count in announced.items() if count}:
        raise ValueError(f"{path} is no whole ARPA file: {announced} n-grams announced, {dict(found)} found")
    return NgramModel(max(announced), log10_probs, log10_backoffs)
