"""Search methods by name, without k2: what runs with torch alone, and what the others say."""

from __future__ import annotations

import sys

import pytest
import torch

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.decoding.methods import METHODS, default_methods, methods_of
from splitformer.decoding.modified_beam import modified_beam_search
from splitformer.decoding.prefix_beam import prefix_beam_search, prefix_beam_uncertainty
from splitformer.decoding.searches import ExitView, HotWords, Weights, make_method, make_methods
from splitformer.errors import UserError
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner

CPU = torch.device("cpu")
WITHOUT_K2 = ("greedy_search", "prefix_beam_search", "transducer-greedy_search", "modified_beam_search")
NEED_K2 = [name for name in METHODS if name not in (*WITHOUT_K2, "greedy_search+lexicon")]


@pytest.fixture(autouse=True)
def no_k2(monkeypatch):
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.delitem(sys.modules, "splitformer.decoding.graph_searches", raising=False)


@pytest.fixture
def view():
    """One exit's output for three utterances, with both heads and a vocabulary of 6."""
    torch.manual_seed(0)
    decoder, joiner = Decoder(6, 8, 2), Joiner(5, 8, 7, 6)
    log_probs = (2 * torch.randn(3, 12, 6)).log_softmax(dim=2)
    return ExitView(torch.tensor([12, 7, 0]), log_probs, torch.randn(3, 12, 5), decoder, joiner, [])


def test_methods_run_the_searches_of_their_names(view):
    phrases = [[1, 2], [3]]
    context = ContextGraph.build(phrases, 6, 2.0)
    weights = Weights(blank_penalties=(0.0, 1.5))
    methods = make_methods(WITHOUT_K2, None, 6, CPU, weights, HotWords(phrases, 2.0))
    penalty = {"blank_penalty": 1.5}
    expected = {
        "greedy_search": ctc_greedy_search(*view.ctc),
        "prefix_beam_search": prefix_beam_search(*view.ctc, context=context, **penalty),
        "transducer-greedy_search": transducer_greedy_search(*view.transducer, **penalty),
        "modified_beam_search": modified_beam_search(*view.transducer, context=context, **penalty),
    }
    for method in methods:
        assert method.head == METHODS[method.name].head and method.follows is None
        assert method.run(view, method.variants[-1]) == (expected[method.name], [])
        assert method.variants == (((),) if method.name == "greedy_search" else tuple(
            (("blank_penalty", value),) for value in (0.0, 1.5)
        ))  # fmt: skip
        hot = method.name in ("prefix_beam_search", "modified_beam_search")
        assert method.recorded == ({"context_boost": 2.0, "context_phrases": 2} if hot else {})


def test_the_uncertainty_is_that_of_the_prefix_beam(view):
    hypotheses, fallbacks, uncertainty = make_method("greedy_search", None, 6, CPU).run_with_uncertainty(view, ())
    assert hypotheses == ctc_greedy_search(*view.ctc) and fallbacks == []
    assert torch.equal(uncertainty, prefix_beam_uncertainty(*view.ctc))
    method = make_method("transducer-greedy_search", None, 6, CPU)
    with pytest.raises(UserError, match="transducer-greedy_search: n-best posteriors are of the CTC head"):
        method.run_with_uncertainty(view._replace(log_probs=None), ())


def test_a_word_list_corrects_words(tmp_path):
    (tmp_path / "words.txt").write_text("<eps> 0\nCAT 1\nDOG 2\n")
    (tmp_path / "list").write_text("CAT\nCOW\n")
    for options, recorded in (({}, ("words.txt", 2)), ({"word_list": tmp_path / "list"}, ("list", 2))):
        [method] = make_methods(["greedy_search+lexicon"], tmp_path, 6, CPU, **options)
        assert method.correct is not None and method.correct(["CAR", "CAT"]) == ["CAT", "CAT"]
        assert (method.recorded["word_list"], method.recorded["word_list_words"]) == recorded
    (tmp_path / "list").write_text("cat\n")
    with pytest.raises(UserError, match=r"list has no word of .*words\.txt"):
        make_methods(["greedy_search+lexicon"], tmp_path, 6, CPU, word_list=tmp_path / "list")
    (tmp_path / "words.txt").unlink()
    with pytest.raises(UserError, match=r"words\.txt does not exist: run \./prepare\.sh, whose lang stage makes it"):
        make_method("greedy_search+lexicon", tmp_path, 6, CPU)


@pytest.mark.parametrize("name", NEED_K2)
def test_a_method_that_needs_k2_says_so(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name}: this search needs k2, .* or choose among greedy_search,"):
        make_methods(["greedy_search", name], tmp_path, 6, CPU)


def test_methods_that_read_words_need_a_lang_dir():
    with pytest.raises(UserError, match=r"1best, fast_beam_search_nbest_LG: give the lang_dir"):
        make_methods(["greedy_search", "1best", "fast_beam_search_nbest_LG"], None, 6, CPU)


def test_methods_are_chosen_by_the_heads_of_a_model():
    assert default_methods(["ctc"]) == ["greedy_search", "ctc-decoding", "1best"]
    assert default_methods(["ctc", "transducer"]) == list(METHODS)
    assert [method.name for method in methods_of(["nbest", "1best"], ["ctc"])] == ["nbest", "1best"]
    for name in ("modified_beam_search", "viterbi"):
        with pytest.raises(UserError, match=rf"--methods {name}: the model has ctc heads; choose among greedy_search,"):
            methods_of(["greedy_search", name], ["ctc"])
