"""Modified beam search against an enumeration of all alignments; small beams against a plain search."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.greedy import transducer_greedy_search
from splitformer.decoding.modified_beam import modified_beam_search
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner
from tests.with_k2.enumeration import PHRASES, phrase_score


def tiny_transducer(seed: int, vocab_size: int = 4, context_size: int = 2) -> tuple[Decoder, Joiner]:
    """Weights are larger than at the start of training, so that the context matters."""
    torch.manual_seed(seed)
    decoder, joiner = Decoder(vocab_size, 8, context_size), Joiner(5, 8, 7, vocab_size)
    for parameter in (*decoder.parameters(), *joiner.parameters()):
        parameter.data.mul_(2.0)
    joiner.output_linear.bias.data[0] += 1.0
    return decoder, joiner


@torch.no_grad()
def scorer(decoder: Decoder, joiner: Joiner, encoder_out: torch.Tensor, blank_penalty: float) -> Callable:
    """Return a function of frame and tokens: the log-probabilities of the frame's symbols in one utterance (T', D)."""
    known: dict[tuple, list[float]] = {}
    frames = joiner.encoder_proj(encoder_out)

    def log_probs(frame: int, tokens: tuple[int, ...]) -> list[float]:
        context = ((0,) * decoder.context_size + tokens)[-decoder.context_size :]
        if (frame, context) not in known:
            with torch.no_grad():
                logits = joiner(frames[frame], joiner.decoder_proj(decoder(torch.tensor([context]))[0, 0]))
            row = logits.double().log_softmax(dim=0).tolist()
            known[frame, context] = [row[0] - blank_penalty, *row[1:]]
        return known[frame, context]

    return log_probs


def enumerated(log_probs: Callable, frames: int, vocab_size: int) -> dict[tuple[int, ...], list]:
    """Return {tokens: [summed log-probability, that of the best alignment, frames of its tokens]}."""
    found: dict[tuple[int, ...], list] = {}
    for alignment in itertools.product(range(vocab_size), repeat=frames):
        tokens, score = (), 0.0
        for frame, symbol in enumerate(alignment):
            score += log_probs(frame, tokens)[symbol]
            tokens = (*tokens, symbol) if symbol else tokens
        entry = found.setdefault(tokens, [0.0, -math.inf, None])
        entry[0] += math.exp(score)
        if score > entry[1]:
            entry[1:] = [score, [frame for frame, symbol in enumerate(alignment) if symbol]]
    for entry in found.values():
        entry[0] = math.log(entry[0])
    return found


@pytest.mark.parametrize("blank_penalty", [0.0, 0.8])
@pytest.mark.parametrize("boost", [None, 1.0])
@pytest.mark.parametrize("length_norm", [False, True])
def test_a_wide_beam_equals_enumeration(blank_penalty, boost, length_norm):
    context = None if boost is None else ContextGraph.build(PHRASES, 4, boost)
    decoder, joiner = tiny_transducer(0)
    encoder_out = torch.randn(8, 4, 5)
    found = modified_beam_search(
        decoder, joiner, encoder_out, torch.full((8,), 4), 400, blank_penalty, context, length_norm
    )
    changed = 0
    for utterance, hypothesis in enumerate(found):
        every = enumerated(scorer(decoder, joiner, encoder_out[utterance], blank_penalty), 4, 4)

        def ranked(tokens, boost, every=every):
            total = every[tokens][0] + phrase_score(tokens, boost)
            return total / (len(tokens) + 2) if length_norm else total

        best = max(every, key=lambda tokens: ranked(tokens, boost or 0.0))
        assert tuple(hypothesis.tokens) == best
        assert hypothesis.score == pytest.approx(every[best][0] + phrase_score(best, boost or 0.0), abs=1e-4)
        assert hypothesis.timestamps == every[best][2]
        changed += best != max(every, key=lambda tokens: ranked(tokens, 0.0))
    assert (changed > 0) == (boost is not None)


def plain_search(log_probs: Callable, frames: int, vocab_size: int, beam_size: int, boost: float):
    """Search one utterance with a dictionary of token sequences."""

    def credit(tokens):  # of the context graph, walked from its start
        state, total = 0, 0.0
        for token in tokens:
            total += float(graph.score[state, token])
            state = int(graph.next_state[state, token])
        return total, total + float(graph.final_score[state])

    graph = ContextGraph.build(PHRASES, vocab_size, boost)
    beam = {(): 1.0}
    for frame in range(frames):
        following: dict[tuple[int, ...], float] = {}
        for tokens, probability in beam.items():
            for symbol, log_prob in enumerate(log_probs(frame, tokens)):
                extended = (*tokens, symbol) if symbol else tokens
                following[extended] = following.get(extended, 0.0) + probability * math.exp(log_prob)
        ranking = sorted(following, key=lambda tokens: -following[tokens] * math.exp(credit(tokens)[0]))
        beam = {tokens: following[tokens] for tokens in ranking[:beam_size]}
    totals = {tokens: math.log(probability) + credit(tokens)[1] for tokens, probability in beam.items()}
    best = max(totals, key=totals.get)
    return best, totals[best]


@pytest.mark.parametrize("beam_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("boost", "context_size"), [(1e-6, 1), (0.8, 2)])
def test_a_small_beam_equals_a_plain_search(beam_size, boost, context_size):
    decoder, joiner = tiny_transducer(beam_size, 5, context_size)
    encoder_out = torch.randn(8, 12, 5)
    context = ContextGraph.build(PHRASES, 5, boost)
    found = modified_beam_search(
        decoder, joiner, encoder_out, torch.full((8,), 12), beam_size, context=context, length_norm=False
    )
    for utterance, hypothesis in enumerate(found):
        log_probs = scorer(decoder, joiner, encoder_out[utterance], 0.0)
        tokens, score = plain_search(log_probs, 12, 5, beam_size, boost)
        assert tuple(hypothesis.tokens) == tokens
        assert hypothesis.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("blank_penalty", [0.0, 1.0])
def test_a_beam_of_one_is_greedy_search(blank_penalty):
    decoder, joiner = tiny_transducer(1, 7)
    encoder_out, lengths = torch.randn(10, 15, 5), torch.arange(6, 16)
    greedy = transducer_greedy_search(decoder, joiner, encoder_out, lengths, blank_penalty)
    beam = modified_beam_search(decoder, joiner, encoder_out, lengths, 1, blank_penalty)
    assert [(h.tokens, h.timestamps) for h in beam] == [(h.tokens, h.timestamps) for h in greedy]
    assert [h.score for h in beam] == pytest.approx([h.score for h in greedy], abs=1e-4)
    assert any(h.tokens for h in greedy)


@pytest.mark.parametrize("context", [None, ContextGraph.build(PHRASES, 6, 0.7)])
def test_batch_equals_single(context):
    decoder, joiner = tiny_transducer(2, 6)
    encoder_out, lengths = torch.randn(6, 17, 5), torch.tensor([16, 1, 0, 9, 16, 5])
    for utterance, length in enumerate(lengths.tolist()):
        encoder_out[utterance, length:] = math.nan  # ignored, whatever it is
    batch = modified_beam_search(decoder, joiner, encoder_out, lengths, 4, 0.3, context)
    for utterance, length in enumerate(lengths.tolist()):
        alone_out, alone_length = encoder_out[utterance, :length].unsqueeze(0), torch.tensor([length])
        [alone] = modified_beam_search(decoder, joiner, alone_out, alone_length, 4, 0.3, context)
        assert (batch[utterance].tokens, batch[utterance].timestamps) == (alone.tokens, alone.timestamps)
        assert batch[utterance].score == pytest.approx(alone.score, abs=1e-4)
    assert batch[2].tokens == [] and batch[2].timestamps == [] and batch[2].score == 0.0
    assert modified_beam_search(decoder, joiner, encoder_out[:0], lengths[:0]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size 0 must be 1 or more"),
        ({"context": ContextGraph.build([[1]], 7, 1.0)}, "built for 7 tokens, the model has 4"),
        ({"lengths": torch.tensor([3])}, r"expected \(2,\)"),
        ({"lengths": torch.tensor([3, 4])}, r"0\.\.3, the output frames of encoder_out"),
        ({"encoder_out": torch.zeros(2, 3)}, r"expected \(N, T', D\)"),
        ({"encoder_out": torch.zeros(2, 3, 4)}, "D = 4, the joiner takes 5"),
        ({"encoder_out": torch.full((2, 3, 5), math.nan)}, "encoder_out hold NaN"),
    ],
)
def test_wrong_input_is_named(options, message):
    decoder, joiner = tiny_transducer(0)
    arguments = {"encoder_out": torch.zeros(2, 3, 5), "lengths": torch.tensor([3, 3]), **options}
    with pytest.raises(ValueError, match=message):
        modified_beam_search(decoder, joiner, **arguments)
