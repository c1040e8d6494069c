"""Greedy CTC search against the definition, batch against single."""

import math

import pytest
import torch

from splitformer.greedy import ctc_greedy_search


def log_probs_of(path: list[int], vocab_size: int = 5, best: float = 0.6) -> torch.Tensor:
    """(T', V) log-probabilities whose best path is `path`, with probability `best` at each frame."""
    log_probs = torch.full((len(path), vocab_size), math.log((1 - best) / (vocab_size - 1)))
    log_probs[torch.arange(len(path)), torch.tensor(path, dtype=torch.long)] = math.log(best)
    return log_probs


@pytest.mark.parametrize(
    ("path", "tokens", "timestamps"),
    [
        ([0, 3, 3, 0, 3, 4, 4, 0], [3, 3, 4], [1, 4, 5]),  # a blank separates equal tokens
        ([2, 2, 2], [2], [0]),
        ([0, 0], [], []),
        ([1, 2, 1], [1, 2, 1], [0, 1, 2]),
    ],
)
def test_collapses_the_best_path(path, tokens, timestamps):
    [hypothesis] = ctc_greedy_search(log_probs_of(path).unsqueeze(0), torch.tensor([len(path)]))
    assert hypothesis.tokens == tokens
    assert hypothesis.timestamps == timestamps
    assert hypothesis.score == pytest.approx(len(path) * math.log(0.6), abs=1e-5)


def test_blank_may_be_any_symbol():
    [hypothesis] = ctc_greedy_search(log_probs_of([4, 0, 0, 4]).unsqueeze(0), torch.tensor([4]), blank_id=4)
    assert hypothesis.tokens == [0]
    assert hypothesis.timestamps == [1]


def test_frames_behind_the_length_are_ignored():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(6, 17, 9, generator=generator).log_softmax(dim=2)
    lengths = torch.tensor([17, 1, 0, 9, 16, 5])
    batch = ctc_greedy_search(log_probs, lengths)
    for utterance, length in enumerate(lengths.tolist()):
        [alone] = ctc_greedy_search(log_probs[utterance, :length].unsqueeze(0), torch.tensor([length]))
        assert batch[utterance].tokens == alone.tokens
        assert batch[utterance].timestamps == alone.timestamps
        assert batch[utterance].score == pytest.approx(alone.score, abs=1e-5)
        assert all(t < length for t in alone.timestamps)
    assert batch[2].tokens == [] and batch[2].score == 0.0


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 3), torch.tensor([3, 3]), r"expected \(N, T', V\)"),
        ((2, 3, 4), torch.tensor([3]), r"expected \(2,\)"),
        ((2, 3, 4), torch.tensor([3, 4]), r"0\.\.3"),
        ((1, 3, 4), torch.tensor([0.5]), "whole output frames"),
    ],
)
def test_wrong_shapes_are_named(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        ctc_greedy_search(torch.zeros(shape), lengths)
