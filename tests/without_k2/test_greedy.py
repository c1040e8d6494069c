"""Greedy searches against their definitions, and batches against single utterances."""

import math

import pytest
import torch

from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


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


def tiny_transducer(seed: int, vocab_size: int = 6, context_size: int = 2) -> tuple[Decoder, Joiner]:
    """Weights are larger than at the start of training, so that the context matters."""
    torch.manual_seed(seed)
    decoder, joiner = Decoder(vocab_size, 8, context_size), Joiner(5, 8, 7, vocab_size)
    for parameter in (*decoder.parameters(), *joiner.parameters()):
        parameter.data.mul_(3.0)
    joiner.output_linear.bias.data[0] += 2.0  # as after training, most frames are blanks
    return decoder, joiner


@pytest.mark.parametrize("context_size", [1, 2])
@pytest.mark.parametrize("blank_penalty", [0.0, 1.5])
def test_transducer_takes_the_best_symbol_of_each_frame(context_size, blank_penalty):
    emitted = 0
    for seed in range(5):
        decoder, joiner = tiny_transducer(seed, context_size=context_size)
        encoder_out = torch.randn(1, 12, 5)
        tokens, timestamps, score = [], [], 0.0
        for frame in range(12):
            context = torch.tensor([([0] * context_size + tokens)[-context_size:]])
            logits = joiner(joiner.encoder_proj(encoder_out[0, frame]), joiner.decoder_proj(decoder(context)[0, 0]))
            log_probs = logits.log_softmax(dim=0).tolist()
            log_probs[0] -= blank_penalty
            symbol = max(range(6), key=log_probs.__getitem__)
            score += log_probs[symbol]
            if symbol:
                tokens.append(symbol)
                timestamps.append(frame)
        [found] = transducer_greedy_search(decoder, joiner, encoder_out, torch.tensor([12]), blank_penalty)
        assert (found.tokens, found.timestamps) == (tokens, timestamps)
        assert found.score == pytest.approx(score, abs=1e-4)
        emitted += len(tokens)
    assert 0 < emitted < 60  # frames of both kinds


def test_transducer_batch_equals_single():
    decoder, joiner = tiny_transducer(0)
    encoder_out, lengths = torch.randn(6, 17, 5), torch.tensor([16, 1, 0, 9, 16, 5])
    encoder_out[3, 9:] = math.nan  # ignored, whatever it is
    batch = transducer_greedy_search(decoder, joiner, encoder_out, lengths)
    for utterance, length in enumerate(lengths.tolist()):
        alone_out = encoder_out[utterance, :length].unsqueeze(0)
        [alone] = transducer_greedy_search(decoder, joiner, alone_out, torch.tensor([length]))
        assert (batch[utterance].tokens, batch[utterance].timestamps) == (alone.tokens, alone.timestamps)
        assert batch[utterance].score == pytest.approx(alone.score, abs=1e-4)
    assert batch[2].tokens == [] and batch[2].timestamps == [] and batch[2].score == 0.0
    assert transducer_greedy_search(decoder, joiner, encoder_out[:0], lengths[:0]) == []


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 5), torch.tensor([3, 3]), r"expected \(N, T', D\)"),
        ((2, 3, 4), torch.tensor([3, 3]), "D = 4, the joiner takes 5"),
        ((2, 3, 5), torch.tensor([3]), r"expected \(2,\), as encoder_out"),
        ((2, 3, 5), torch.tensor([3, 4]), r"0\.\.3, the output frames of encoder_out"),
        ((1, 3, 5), torch.tensor([0.5]), "whole output frames"),
    ],
)
def test_wrong_shapes_for_the_transducer_are_named(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        transducer_greedy_search(*tiny_transducer(0), torch.zeros(shape), lengths)


def test_decoder_and_joiner_that_do_not_fit_are_named():
    _, joiner = tiny_transducer(0)
    encoder_out, lengths = torch.zeros(1, 3, 5), torch.tensor([3])
    with pytest.raises(ValueError, match="the decoder has 9 tokens, the joiner 6"):
        transducer_greedy_search(Decoder(9, 8, 2), joiner, encoder_out, lengths)
    with pytest.raises(ValueError, match="blank_id is 5; the searches expect 0"):
        transducer_greedy_search(Decoder(6, 8, 2, blank_id=5), joiner, encoder_out, lengths)
