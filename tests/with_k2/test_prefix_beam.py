"""CTC prefix beam search and alignment against an enumeration of all alignments; small beams against a plain search."""

from __future__ import annotations

import math

import pytest
import torch

from splitformer.decoding.alignment import ctc_alignment
from splitformer.decoding.context import ContextGraph
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.prefix_beam import prefix_beam_search
from tests.with_k2.enumeration import PHRASES, enumerated, phrase_score


def random_log_probs(batch: int, frames: int, vocab_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(batch, frames, vocab_size, generator=generator)).log_softmax(dim=2)


def starts(alignment: tuple[int, ...]) -> list[int]:
    return [t for t, symbol in enumerate(alignment) if symbol and (t == 0 or alignment[t - 1] != symbol)]


@pytest.mark.parametrize("blank_penalty", [0.0, 1.0])
@pytest.mark.parametrize("boost", [None, 1.0])
def test_a_wide_beam_equals_enumeration(blank_penalty, boost):
    context = None if boost is None else ContextGraph.build(PHRASES, 4, boost)
    changed = 0
    log_probs = random_log_probs(8, 5, 4, seed=0)
    found = prefix_beam_search(log_probs, torch.full((8,), 5), 400, blank_penalty, context)
    for utterance, hypothesis in enumerate(found):
        plain = {tokens: entry[0] for tokens, entry in enumerated(log_probs[utterance], blank_penalty).items()}
        totals = {tokens: score + phrase_score(tokens, boost or 0.0) for tokens, score in plain.items()}
        best = max(totals, key=totals.get)
        assert tuple(hypothesis.tokens) == best
        assert hypothesis.score == pytest.approx(totals[best], abs=1e-5)
        changed += best != max(plain, key=plain.get)
        aligned = enumerated(log_probs[utterance])[best][2]
        assert hypothesis.timestamps == starts(aligned)
    assert (changed > 0) == (boost is not None)


def plain_search(rows: list[list[float]], beam_size: int, boost: float) -> tuple[tuple[int, ...], float]:
    """Search one utterance with a dictionary of prefixes."""

    def credit(prefix):  # of the context graph, walked from its start
        state, total = 0, 0.0
        for token in prefix:
            total += float(graph.score[state, token])
            state = int(graph.next_state[state, token])
        return total, total + float(graph.final_score[state])

    graph = ContextGraph.build(PHRASES, len(rows[0]), boost)
    beam = {(): [1.0, 0.0]}  # probabilities of ending in a blank and in the last token
    for row in rows:
        probabilities = [math.exp(value) for value in row]
        following: dict[tuple[int, ...], list[float]] = {}
        for prefix, (blank, token_end) in beam.items():
            kept = following.setdefault(prefix, [0.0, 0.0])
            kept[0] += (blank + token_end) * probabilities[0]
            if prefix:
                kept[1] += token_end * probabilities[prefix[-1]]
            for token in range(1, len(row)):
                repeated = prefix and prefix[-1] == token
                extended = following.setdefault((*prefix, token), [0.0, 0.0])
                extended[1] += (blank if repeated else blank + token_end) * probabilities[token]
        ranking = sorted(following, key=lambda p: -sum(following[p]) * math.exp(credit(p)[0]))
        beam = {prefix: following[prefix] for prefix in ranking[:beam_size]}
    totals = {prefix: math.log(sum(ends)) + credit(prefix)[1] for prefix, ends in beam.items()}
    best = max(totals, key=totals.get)
    return best, totals[best]


@pytest.mark.parametrize("beam_size", [1, 2, 3, 8])
@pytest.mark.parametrize("boost", [1e-6, 0.8])
def test_a_small_beam_equals_a_plain_search(beam_size, boost):
    log_probs = random_log_probs(12, 14, 5, seed=beam_size)
    context = ContextGraph.build(PHRASES, 5, boost)
    found = prefix_beam_search(log_probs, torch.full((12,), 14), beam_size, context=context)
    for utterance, hypothesis in enumerate(found):
        tokens, score = plain_search(log_probs[utterance].tolist(), beam_size, boost)
        assert tuple(hypothesis.tokens) == tokens
        assert hypothesis.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("context", [None, ContextGraph.build(PHRASES, 6, 0.7)])
def test_batch_equals_single(context):
    log_probs, lengths = random_log_probs(6, 17, 6, seed=3), torch.tensor([16, 1, 0, 9, 16, 5])
    for utterance, length in enumerate(lengths.tolist()):
        log_probs[utterance, length:] = math.nan  # ignored, whatever it is
    batch = prefix_beam_search(log_probs, lengths, 4, 0.3, context)
    for utterance, length in enumerate(lengths.tolist()):
        alone_log_probs, alone_length = log_probs[utterance, :length].unsqueeze(0), torch.tensor([length])
        [alone] = prefix_beam_search(alone_log_probs, alone_length, 4, 0.3, context)
        assert (batch[utterance].tokens, batch[utterance].timestamps) == (alone.tokens, alone.timestamps)
        assert batch[utterance].score == pytest.approx(alone.score, abs=1e-6)
    assert batch[2].tokens == [] and batch[2].timestamps == [] and batch[2].score == 0.0
    assert prefix_beam_search(log_probs[:0], lengths[:0]) == []


def test_it_finds_a_sequence_that_greedy_search_misses():
    # the best alignment is blank, blank; the token has more alignments (Graves et al., figure 2)
    log_probs = torch.tensor([[[0.55, 0.45], [0.55, 0.45]]]).log()
    [greedy], [found] = (search(log_probs, torch.tensor([2])) for search in (ctc_greedy_search, prefix_beam_search))
    assert greedy.tokens == [] and found.tokens == [1]
    assert found.score == pytest.approx(math.log(1 - 0.55**2), abs=1e-5)


def test_log_probs_are_not_modified():
    log_probs = random_log_probs(2, 6, 5, seed=1).double()
    before = log_probs.clone()
    prefix_beam_search(log_probs, torch.tensor([6, 4]), blank_penalty=1.0)
    assert torch.equal(log_probs, before)


def test_alignment_equals_enumeration():
    log_probs, lengths = random_log_probs(3, 6, 4, seed=5), torch.tensor([6, 5, 3])
    cases = [enumerated(row[:length]) for row, length in zip(log_probs, lengths.tolist())]
    for _ in range(40):
        tokens = [next(iter(case)) for case in cases]
        for found, case, key in zip(ctc_alignment(log_probs, lengths, tokens), cases, tokens):
            assert found == starts(case[key][2])
            if len(case) > 1:
                del case[key]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1]], "tokens of 1 utterances for log_probs of 2"),
        ([[1], [0]], r"\[0\] of utterance 1 are outside 1\.\.3"),
        ([[4], [1]], r"\[4\] of utterance 0 are outside 1\.\.3"),
        ([[1], [2, 2]], "the 2 tokens of utterance 1 have no alignment with its 2 output frames"),
    ],
)
def test_tokens_that_cannot_be_aligned_are_named(tokens, message):
    with pytest.raises(ValueError, match=message):
        ctc_alignment(random_log_probs(2, 3, 4, seed=0), torch.tensor([3, 2]), tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size 0 must be 1 or more"),
        ({"context": ContextGraph.build([[1]], 7, 1.0)}, "built for 7 tokens, the model has 4"),
        ({"lengths": torch.tensor([3])}, r"expected \(2,\)"),
        ({"lengths": torch.tensor([3, 4])}, r"0\.\.3"),
        ({"log_probs": torch.zeros(2, 3)}, r"expected \(N, T', V\)"),
        ({"log_probs": torch.full((2, 3, 4), math.nan)}, "log_probs hold NaN"),
    ],
)
def test_wrong_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        prefix_beam_search(**{"log_probs": torch.zeros(2, 3, 4), "lengths": torch.tensor([3, 3]), **options})
