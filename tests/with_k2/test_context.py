"""The context graph against a count of the phrases in token sequences."""

import random

import k2
import pytest
import torch

from splitformer.decoding.context import ContextGraph

VOCAB_SIZE = 5
PHRASE_SETS = [
    [[1]],
    [[1, 2, 3]],
    [[1, 1], [1, 1, 1]],  # overlaps with itself
    [[1, 2, 3, 4], [2, 3], [3], [2, 3, 1]],  # inside one another, and abandoned half-way
    [[1, 2], [1, 2, 1, 2, 3], [2, 1]],
]


def random_phrases(rng: random.Random) -> list[list[int]]:
    return [[rng.randint(1, 3) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 6))]


def counted(tokens: list[int], phrases: list[list[int]], boosts: list[float]) -> float:
    """Return the score by definition: each occurrence of a phrase gives its boost per token."""
    boost_of = {}
    for phrase, boost in zip(map(tuple, phrases), boosts):
        boost_of[phrase] = max(boost, boost_of.get(phrase, 0.0))
    return sum(
        boost * len(phrase)
        for phrase, boost in boost_of.items()
        for start in range(len(tokens))
        if tuple(tokens[start : start + len(phrase)]) == phrase
    )


def walk(graph: ContextGraph, tokens: list[int]) -> tuple[int, list[float]]:
    state, scores = 0, []
    for token in tokens:
        scores.append(float(graph.score[state, token]))
        state = int(graph.next_state[state, token])
    return state, scores


@pytest.mark.parametrize("seed", range(len(PHRASE_SETS) + 10))
def test_total_equals_counted_occurrences(seed):
    rng = random.Random(seed)
    phrases = PHRASE_SETS[seed] if seed < len(PHRASE_SETS) else random_phrases(rng)
    boosts = [rng.choice([0.5, 1.0, 2.25]) for _ in phrases]
    graph = ContextGraph.build(phrases, VOCAB_SIZE, boosts)
    for _ in range(100):
        tokens = [rng.randint(1, 4) for _ in range(rng.randint(0, 12))]
        state, scores = walk(graph, tokens)
        total = sum(scores) + float(graph.final_score[state])
        assert total == pytest.approx(counted(tokens, phrases, boosts), abs=1e-4)
        # blanks anywhere change nothing
        with_blanks = [symbol for token in tokens for symbol in [0] * rng.randint(0, 2) + [token]] + [0]
        assert walk(graph, with_blanks)[0] == state
        assert sum(walk(graph, with_blanks)[1]) == pytest.approx(sum(scores), abs=1e-4)


def test_credit_is_given_early_and_taken_back_unless_the_phrase_is_complete():
    graph = ContextGraph.build([[1, 2, 3]], VOCAB_SIZE, 1.5)
    assert graph.next_state.shape == (4, VOCAB_SIZE)
    assert walk(graph, [1, 2, 3, 4]) == (0, [1.5, 1.5, 1.5, 0.0])
    assert walk(graph, [1, 2, 4]) == (0, [1.5, 1.5, -3.0])
    state, scores = walk(graph, [1, 2, 1])  # one token of a new match replaces two of the old one
    assert scores == [1.5, 1.5, -1.5] and float(graph.final_score[state]) == -1.5
    assert float(graph.final_score[walk(graph, [1, 2, 3])[0]]) == 0.0


def test_one_boost_for_all_is_that_boost_for_each():
    one, each = (ContextGraph.build(PHRASE_SETS[3], VOCAB_SIZE, boost) for boost in (2, [2.0] * 4))
    assert torch.equal(one.score, each.score) and torch.equal(one.next_state, each.next_state)


def test_k2_scores_the_arcs_alike():
    rng = random.Random(0)
    phrases = PHRASE_SETS[3]
    graph = ContextGraph.build(phrases, VOCAB_SIZE, 0.75)
    fsa = k2.Fsa(graph.arcs())
    assert fsa.shape[0] == len(graph.next_state) + 1
    for _ in range(10):
        tokens = [rng.randint(1, 4) for _ in range(rng.randint(1, 8))]
        paths = k2.intersect(k2.arc_sort(fsa), k2.linear_fsa(tokens), treat_epsilons_specially=False)
        total = k2.create_fsa_vec([paths]).get_tot_scores(use_double_scores=True, log_semiring=True)
        assert float(total) == pytest.approx(counted(tokens, phrases, [0.75] * 4), abs=1e-4)


@pytest.mark.parametrize(
    ("phrases", "boost", "message"),
    [
        ([], 1.0, "phrases is empty: give one or more"),
        ([[1], []], 1.0, "phrase 1 of 2 is empty"),
        ([[1, 0]], 1.0, r"\[1, 0\], has tokens outside 1\.\.4"),
        ([[5]], 1.0, r"\[5\], has tokens outside 1\.\.4"),
        ([[-1]], 1.0, r"\[-1\], has tokens outside 1\.\.4"),
        ([[1]], 0.0, "boost 0.0 of phrase 0 must be finite and above 0"),
        ([[1], [2]], [1.0, float("inf")], "boost inf of phrase 1"),
        ([[1], [2]], [1.0], "1 boosts for 2 phrases"),
    ],
)
def test_wrong_phrases_are_named(phrases, boost, message):
    with pytest.raises(ValueError, match=message):
        ContextGraph.build(phrases, VOCAB_SIZE, boost)
