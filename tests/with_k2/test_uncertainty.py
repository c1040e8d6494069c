"""The uncertainty of a hypothesis, given by its competitors, against enumeration of all of them."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import estimate_arpa
from splitformer.decoding.ctc import Beam
from splitformer.decoding.graphs import compile_hlg
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.lang import read_symbols
from splitformer.decoding.nbest import NO_PATH_UNCERTAINTY
from splitformer.decoding.prefix_beam import prefix_beam_search, prefix_beam_uncertainty
from tests.with_k2.enumeration import (
    SPELLINGS,
    TEXT,
    TOKENS,
    acoustic_scores,
    enumerated,
    graph_score,
    make_small_lang,
    one_best,
    one_best_with_uncertainty,
    random_log_probs,
    word_sequences,
)

# The output beam is the whole search's, so that no word sequence is lost.
ALL = Beam(search_beam=200.0, output_beam=200.0, min_active_states=1000, max_active_states=100000)
FRAMES = 5


@pytest.fixture(scope="module")
def lang_dir(tmp_path_factory):
    """Without A2: of homophones that lead to the same state of the language model, HLG keeps only the likeliest."""
    folder = make_small_lang(tmp_path_factory.mktemp("lang"))
    (folder / "text").write_text(TEXT.replace("A2", "A"))
    spellings = {word: spelling for word, spelling in SPELLINGS.items() if word != "A2"}
    prepare_lang(folder, spellings, spellings.__getitem__)
    return folder


@pytest.fixture(scope="module")
def words(lang_dir):
    return read_symbols(lang_dir / "words.txt")


@pytest.fixture(scope="module")
def model(lang_dir):
    return estimate_arpa(lang_dir / "text", lang_dir / "2.arpa", 2)


@pytest.fixture(scope="module")
def hlg(lang_dir, model):
    return compile_hlg(lang_dir, lang_dir / "2.arpa", report=lambda line: None)


def enumerated_uncertainty(log_probs, model, hlg_scale, blank_penalty):
    """Return minus the log of the best word sequence's share, each by its best alignment; log_probs (T', V)."""
    penalised = log_probs.clone()
    penalised[:, 0] -= blank_penalty
    totals = torch.tensor(
        [
            acoustic + hlg_scale * graph_score(model, sentence)
            for tokens, acoustic in acoustic_scores(penalised).items()
            for sentence in word_sequences(tokens)
            if "A2" not in sentence
        ],
        dtype=torch.float64,
    )
    return (totals.logsumexp(dim=0) - totals.max()).item()


@pytest.mark.parametrize(("hlg_scale", "blank_penalty"), [(1.0, 0.0), (0.4, 0.5), (2.0, 1.0)])
def test_the_uncertainty_of_a_lattice_equals_enumeration(hlg, words, model, hlg_scale, blank_penalty):
    weights = {"hlg_scale": hlg_scale, "blank_penalty": blank_penalty, "beam": ALL}
    uncertainties = []
    # from random models to certain ones
    for seed, sharpness in enumerate((0.1, 0.5, 1.0, 2.0, 4.0, 8.0)):
        log_probs = random_log_probs(FRAMES, len(TOKENS), seed, sharpness)
        # enumeration leaves out two symbols; the lexicon has no words with them
        log_probs[..., 1:3] -= 30.0
        batch = (log_probs, torch.tensor([FRAMES]), hlg, words)
        [hypothesis], fallbacks, uncertainty = one_best_with_uncertainty(
            *batch, num_paths=20000, nbest_scale=0.1, **weights
        )
        expected = enumerated_uncertainty(log_probs[0], model, hlg_scale, blank_penalty)
        assert uncertainty.tolist() == pytest.approx([expected], abs=2e-3)
        uncertainties.append(expected)
        [best], _ = one_best(*batch, **weights)
        assert fallbacks == []
        assert (hypothesis.words, hypothesis.tokens, hypothesis.timestamps) == (
            best.words,
            best.tokens,
            best.timestamps,
        )
        assert hypothesis.score == pytest.approx(best.score, abs=1e-3)
        # the default list is shorter: it has fewer competitors, the best ones among them
        *_, short = one_best_with_uncertainty(*batch, **weights)
        assert 0.0 <= short.item() <= expected + 1e-3
    assert max(uncertainties) > 1.5 * min(uncertainties) > 0.0


def test_without_competitors_the_uncertainty_is_0(hlg, words):
    log_probs = torch.full((1, FRAMES, len(TOKENS)), -math.inf)
    for frame, symbol in enumerate((0, 4, 4, 0, 0)):
        log_probs[0, frame, symbol] = 0.0
    [hypothesis], fallbacks, uncertainty = one_best_with_uncertainty(log_probs, torch.tensor([FRAMES]), hlg, words)
    assert hypothesis.words == ["B"] and fallbacks == [] and uncertainty.tolist() == [0.0]


def test_the_best_words_count_where_no_sampled_path_has_them(hlg, words):
    """The one path that is sampled may have other words, which then compete with the best ones."""
    missed = 0
    for seed in range(20):
        log_probs, lengths = random_log_probs(7, len(TOKENS), seed, 1.0), torch.tensor([7])
        options = {"beam": ALL, "num_paths": 1, "nbest_scale": 0.1}
        [hypothesis], _, uncertainty = one_best_with_uncertainty(log_probs, lengths, hlg, words, **options)
        [best], _ = one_best(log_probs, lengths, hlg, words, beam=ALL)
        assert hypothesis.words == best.words
        assert 0.0 <= uncertainty.item() < math.log(2)  # of two, the better
        missed += uncertainty.item() > 0.0
    assert missed > 0


def test_a_batch_of_lattices_equals_single_ones(hlg, words):
    log_probs = torch.cat([random_log_probs(9, len(TOKENS), seed, 1.0) for seed in range(5)])
    lengths = torch.tensor([7, 9, 0, 4, 1])
    for utterance, length in enumerate(lengths.tolist()):
        log_probs[utterance, length:] = math.nan  # ignored, whatever stands there
    before = hlg.scores.clone()
    options = {"num_paths": 30, "hlg_scale": 0.7, "blank_penalty": 0.3}
    together, fallbacks, uncertainties = one_best_with_uncertainty(log_probs, lengths, hlg, words, **options)
    best, _ = one_best(log_probs, lengths, hlg, words, hlg_scale=0.7, blank_penalty=0.3)
    assert fallbacks == [] and uncertainties.shape == (5,)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        [alone], _, uncertainty = one_best_with_uncertainty(
            log_probs[one, :length], lengths[one], hlg, words, **options
        )
        assert uncertainties[i].item() == pytest.approx(uncertainty.item(), abs=1e-4)
        for other in (together[i], best[i]):
            assert (alone.words, alone.tokens, alone.timestamps) == (other.words, other.tokens, other.timestamps)
            assert alone.score == pytest.approx(other.score, abs=1e-3)
    assert uncertainties[2] == 0.0 and together[2].words is None and (uncertainties[:2] > 0.1).all()
    assert torch.equal(hlg.scores, before) and not hasattr(hlg, "lm_scores")
    with pytest.raises(ValueError, match="log_probs hold NaN"):
        one_best_with_uncertainty(log_probs, lengths + torch.tensor([0, 0, 0, 1, 0]), hlg, words)
    # without frames
    *_, uncertainties = one_best_with_uncertainty(log_probs, torch.zeros_like(lengths), hlg, words)
    assert uncertainties.tolist() == [0.0] * 5


def test_an_empty_lattice_has_the_largest_uncertainty(lang_dir, words, tmp_path):
    """AA is the only word here. It needs three frames, with a blank in the middle."""
    shutil.copytree(lang_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text").write_text("AA\nAA AA\n")
    estimate_arpa(tmp_path / "text", tmp_path / "aa.arpa", 2)
    hlg = compile_hlg(tmp_path, tmp_path / "aa.arpa", report=lambda line: None)
    log_probs = torch.cat([random_log_probs(6, len(TOKENS), seed) for seed in range(4)])
    log_probs[..., 0] -= 30  # blanks are unlikely
    lengths = torch.tensor([2, 6, 0, 1])
    tight = Beam(search_beam=1.0, output_beam=1.0, min_active_states=0, max_active_states=2)
    hypotheses, fallbacks, uncertainties = one_best_with_uncertainty(log_probs, lengths, hlg, words, beam=tight)
    greedy = ctc_greedy_search(log_probs, lengths)
    assert {0, 3} <= set(fallbacks) and 2 not in fallbacks
    for i in range(4):
        assert (uncertainties[i] == NO_PATH_UNCERTAINTY) == (i in fallbacks)
        if i in {*fallbacks, 2}:
            assert hypotheses[i] == greedy[i]
    assert uncertainties[2] == 0.0
    assert one_best(log_probs, lengths, hlg, words, beam=tight)[1] == fallbacks


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_uncertainty_of_a_wide_beam_equals_enumeration(sharpness):
    log_probs = (sharpness * random_log_probs(5, 4, 0).repeat(6, 1, 1)).clone()
    log_probs += sharpness * torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    log_probs = log_probs.log_softmax(dim=2)
    lengths = torch.tensor([5, 5, 4, 3, 1, 0])
    uncertainties = prefix_beam_uncertainty(log_probs, lengths, beam_size=400)
    for utterance, length in enumerate(lengths.tolist()):
        totals = [entry[0] for entry in enumerated(log_probs[utterance, :length]).values()]
        assert uncertainties[utterance].item() == pytest.approx(-max(totals), abs=1e-5)  # all of them sum to 1
    assert uncertainties[5] == 0.0 < uncertainties[0]
    # a narrower beam has fewer competitors, so that its uncertainty is lower
    narrow = [prefix_beam_uncertainty(log_probs, lengths, size) for size in (1, 2, 8)]
    assert narrow[0].abs().max() == 0.0 and (narrow[2] <= uncertainties + 1e-6).all()
    assert narrow[1].sum() < narrow[2].sum() < uncertainties.sum()


def test_a_batch_of_beams_equals_single_ones():
    log_probs = torch.cat([random_log_probs(17, 6, seed, 1.5) for seed in range(6)])
    lengths = torch.tensor([16, 1, 0, 9, 17, 5])
    for utterance, length in enumerate(lengths.tolist()):
        log_probs[utterance, length:] = math.nan  # ignored, whatever stands there
    uncertainties = prefix_beam_uncertainty(log_probs, lengths, 4)
    for utterance, length in enumerate(lengths.tolist()):
        alone = prefix_beam_uncertainty(log_probs[utterance : utterance + 1, :length], torch.tensor([length]), 4)
        assert uncertainties[utterance].item() == pytest.approx(alone.item(), abs=1e-6)
    assert uncertainties[2] == 0.0 and (uncertainties[torch.tensor([0, 3, 4])] > 0.1).all()
    assert prefix_beam_uncertainty(log_probs[:0], lengths[:0]).tolist() == []


def test_certain_log_probs_have_no_uncertainty():
    path = [0, 3, 3, 0, 3, 1]
    log_probs = torch.full((2, len(path), 5), -math.inf)
    log_probs[0, range(len(path)), path] = 0.0
    log_probs[1] = log_probs[0].clamp(min=-200.0)
    lengths = torch.tensor([6, 6])
    assert prefix_beam_uncertainty(log_probs, lengths).tolist() == [0.0, 0.0]
    assert [hypothesis.tokens for hypothesis in prefix_beam_search(log_probs, lengths)] == [[3, 3, 1]] * 2
    with pytest.raises(ValueError, match="log_probs hold NaN"):
        prefix_beam_uncertainty(log_probs * math.nan, lengths)
