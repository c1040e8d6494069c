"""The lattice searches against an enumeration of all alignments and word sequences."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from kaldialign import edit_distance

from splitformer.corpora.ngram import estimate_arpa
from splitformer.decoding.ctc import NBEST_BEAM, Beam, hlg_lattice
from splitformer.decoding.graphs import compile_g, compile_hlg, load_lang_graph, save_graph
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.lang import read_symbols
from splitformer.decoding.nbest import nbest, nbest_rescoring, whole_lattice_rescoring
from splitformer.errors import UserError
from tests.with_k2.enumeration import (
    SPELLINGS,
    TOKENS,
    acoustic_scores,
    graph_score,
    make_small_lang,
    one_best,
    random_log_probs,
    word_sequences,
)

# All alignments of a few frames. The output beam is as wide as the search beam, so that nothing is lost.
ALL = Beam(search_beam=200.0, output_beam=200.0, min_active_states=1000, max_active_states=100000)
LM_SCALES = (0.3, 1.0, 2.0)
FRAMES = 5


@pytest.fixture(scope="module")
def lang_dir(tmp_path_factory):
    folder = make_small_lang(tmp_path_factory.mktemp("lang"))
    for order in (1, 2, 3, 4):
        estimate_arpa(folder / "text", folder / f"{order}.arpa", order)
    return folder


@pytest.fixture(scope="module")
def words(lang_dir):
    return read_symbols(lang_dir / "words.txt")


@pytest.fixture(scope="module")
def graphs(lang_dir):
    """A function: (order, modified) -> (HLG, model), order -> (G, model). Each is made once."""
    made = {}

    def silent(line):
        pass

    def get(order, modified=None):
        if (order, modified) not in made:
            arpa = lang_dir / f"{order}.arpa"
            model = estimate_arpa(lang_dir / "text", lang_dir / "again.arpa", order)
            if modified is None:
                graph = compile_g(lang_dir, arpa, silent)
            else:
                graph = compile_hlg(lang_dir, arpa, modified, silent)
            made[order, modified] = graph, model
        return made[order, modified]

    return get


def totals(log_probs, modified, model, weight, penalty=0.0):
    """Return {words: acoustic + weight * graph} of all word sequences in log_probs (1, T', V)."""
    penalised = log_probs[0].clone()
    penalised[:, 0] -= penalty
    return {
        sentence: acoustic + weight * graph_score(model, sentence)
        for tokens, acoustic in acoustic_scores(penalised, modified).items()
        for sentence in word_sequences(tokens)
    }


def check(found, fallbacks, expected):
    """Check that `found` is the best of `expected`, and consistent."""
    best = max(expected, key=expected.get)
    # a tie would make the test depend on rounding
    assert sum(total > expected[best] - 1e-3 for total in expected.values()) == 1
    assert fallbacks == []
    assert tuple(found.words) == best
    assert found.score == pytest.approx(expected[best], abs=1e-3)
    assert found.tokens == [token for word in best for token in SPELLINGS[word]]
    assert found.timestamps == sorted(set(found.timestamps)) and set(found.timestamps) <= set(range(FRAMES))


@pytest.mark.parametrize(("modified", "order", "hlg_scale"), [(False, 2, 1.0), (True, 2, 0.4), (False, 3, 2.0)])
def test_nbest_equals_enumeration(graphs, words, modified, order, hlg_scale):
    hlg, model = graphs(order, modified)
    before = hlg.scores.clone()
    for seed in range(4):
        log_probs, lengths = random_log_probs(FRAMES, len(TOKENS), seed), torch.tensor([FRAMES])
        weights = {"hlg_scale": hlg_scale, "blank_penalty": 0.5 * seed, "beam": ALL}
        [found], fallbacks = nbest(hlg_lattice(log_probs, lengths, hlg, words, **weights), 2000)
        check(found, fallbacks, totals(log_probs, modified, model, hlg_scale, 0.5 * seed))
        [best], _ = one_best(log_probs, lengths, hlg, words, **weights)
        assert (found.words, found.tokens, found.timestamps) == (best.words, best.tokens, best.timestamps)
        assert found.score == pytest.approx(best.score, abs=1e-3)
    assert torch.equal(hlg.scores, before) and not hasattr(hlg, "lm_scores")


@pytest.mark.parametrize(
    ("modified", "order", "g_order", "hlg_scale"), [(False, 2, 3, 1.0), (True, 2, 4, 0.5), (False, 3, 1, 2.0)]
)
def test_rescoring_equals_enumeration(graphs, words, modified, order, g_order, hlg_scale):
    hlg, _ = graphs(order, modified)
    g, model = graphs(g_order)
    for seed in range(4):
        log_probs, lengths = random_log_probs(FRAMES, len(TOKENS), seed), torch.tensor([FRAMES])
        weights = {"hlg_scale": hlg_scale, "blank_penalty": 0.3 * seed, "beam": ALL}
        lattice = hlg_lattice(log_probs, lengths, hlg, words, **weights)
        for lm_scale in LM_SCALES:
            expected = totals(log_probs, modified, model, lm_scale, 0.3 * seed)
            for [found], fallbacks in (
                nbest_rescoring(lattice, g, lm_scale, num_paths=4000, nbest_scale=0.1),
                whole_lattice_rescoring(lattice, g, lm_scale),
            ):
                check(found, fallbacks, expected)


def test_backing_off_needs_no_frame_of_its_own(graphs, words):
    """Words start in every frame; G backs off several times between two of them, before the first, after the last."""
    g, model = graphs(4)
    hlg, _ = graphs(2, True)
    for alignment in itertools.product((3, 4), repeat=FRAMES):
        log_probs = torch.full((1, FRAMES, len(TOKENS)), -60.0)
        log_probs[0, torch.arange(FRAMES), torch.tensor(alignment)] = 0.0
        lattice = hlg_lattice(log_probs, torch.tensor([FRAMES]), hlg, words, beam=ALL)
        expected = totals(log_probs, True, model, 0.6)
        drawn = nbest_rescoring(lattice, g, 0.6, num_paths=4000, nbest_scale=0.1)
        for [found], fallbacks in (drawn, whole_lattice_rescoring(lattice, g, 0.6)):
            check(found, fallbacks, expected)


def test_rescoring_with_the_same_model_changes_nothing(graphs, words):
    hlg, g = graphs(2, False)[0], graphs(2)[0]
    batch = torch.cat([random_log_probs(40, len(TOKENS), seed) for seed in range(6)]), torch.full((6,), 40)
    for scale in (0.5, 2.0):
        lattice = hlg_lattice(*batch, hlg, words, scale, beam=NBEST_BEAM)
        best, _ = one_best(*batch, hlg, words, hlg_scale=scale)
        same, _ = whole_lattice_rescoring(lattice, g, scale)
        for found, expected in zip(same, best):
            assert found.words == expected.words and found.score == pytest.approx(expected.score, abs=1e-3)
        others, _ = whole_lattice_rescoring(lattice, graphs(3)[0], scale)
        assert [h.words for h in others] != [h.words for h in best]


def test_oracle_is_a_lower_bound_of_nbest(graphs, words):
    hlg, _ = graphs(2, False)
    log_probs = torch.cat([random_log_probs(8, len(TOKENS), seed) for seed in range(12)])
    lengths = torch.tensor([8, 7, 6, 5] * 3)
    references = [["A", "B"], ["BA"], ["AB", "AB"], ["B", "A", "A2"]] * 3
    lattice = hlg_lattice(log_probs, lengths, hlg, words, beam=ALL)
    found, _ = nbest(lattice, 50)
    oracle, fallbacks = nbest(lattice, 50, references=references)
    assert fallbacks == []
    ours = [edit_distance(ref, h.words)["total"] for ref, h in zip(references, found)]
    bound = [edit_distance(ref, h.words)["total"] for ref, h in zip(references, oracle)]
    assert all(b <= o for b, o in zip(bound, ours)) and sum(bound) < sum(ours)
    assert all(h.score <= best.score + 1e-3 for h, best in zip(oracle, found))
    # with the result of nbest as references it returns that result
    same, _ = nbest(lattice, 50, references=[h.words for h in found])
    assert [h.words for h in same] == [h.words for h in found]
    with pytest.raises(ValueError, match="2 references for 12"):
        nbest(lattice, references=references[:2])


def every_search(log_probs, lengths, hlg, words, g, references, **options):
    """Return {name: result} with few paths, so that drawing other ones would show."""
    lattice = hlg_lattice(log_probs, lengths, hlg, words, **options)
    return {
        "nbest": nbest(lattice, 20),
        "oracle": nbest(lattice, 20, references=references),
        "rescored nbest": nbest_rescoring(lattice, g, 0.7, 20),
        "rescored lattice": whole_lattice_rescoring(lattice, g, 0.7),
    }


def test_batch_equals_single(graphs, words):
    hlg, (g, _) = graphs(2, False)[0], graphs(3)
    log_probs = torch.cat([random_log_probs(9, len(TOKENS), seed) for seed in range(4)])
    lengths = torch.tensor([7, 9, 0, 4])
    references = [["A"], ["B", "A"], ["A"], ["AB"]]
    together = every_search(log_probs, lengths, hlg, words, g, references, beam=ALL)
    for i, length in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = every_search(log_probs[one, :length], lengths[one], hlg, words, g, references[one], beam=ALL)
        for name, ([found], fallbacks) in alone.items():
            expected = together[name][0][i]
            assert fallbacks == [] == together[name][1]
            assert (found.words, found.tokens, found.timestamps) == (
                expected.words, expected.tokens, expected.timestamps
            ), name  # fmt: skip
            assert found.score == pytest.approx(expected.score, abs=1e-3)
            assert (found.words is None) == (length == 0)


def test_empty_lattices_fall_back_and_are_counted(graphs, lang_dir, words, tmp_path):
    """AA is the only word of this HLG and needs three frames, with a blank in the middle."""
    shutil.copytree(lang_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "text").write_text("AA\nAA AA\n")
    estimate_arpa(tmp_path / "text", tmp_path / "aa.arpa", 2)
    hlg = compile_hlg(tmp_path, tmp_path / "aa.arpa", report=lambda line: None)
    g, _ = graphs(3)
    log_probs = torch.cat([random_log_probs(6, len(TOKENS), seed) for seed in range(4)])
    log_probs[:, :, 0] -= 30  # blanks are unlikely, so that the empty sentence, which G has too, does not win
    options = {"beam": Beam(search_beam=1.0, output_beam=1.0, min_active_states=0, max_active_states=2)}
    options |= {"hlg_scale": 0.8, "blank_penalty": 0.1}  # greedy search has neither
    greedy = ctc_greedy_search(log_probs, torch.tensor([2, 6, 0, 1]))
    found = every_search(log_probs, torch.tensor([2, 6, 0, 1]), hlg, words, g, [["AA"]] * 4, **options)
    for name, (hypotheses, fallbacks) in found.items():
        assert fallbacks and 2 not in fallbacks, name
        for i in {*fallbacks, 2}:
            assert hypotheses[i] == greedy[i] and hypotheses[i].words is None, name
        assert all(hypotheses[i].words is not None for i in {0, 1, 3} - {*fallbacks}), name
    # none of the batch
    for length in (0, 1):
        lengths = torch.full((4,), length)
        for name, (hypotheses, fallbacks) in every_search(
            log_probs, lengths, hlg, words, g, [["AA"]] * 4, **options
        ).items():
            assert hypotheses == ctc_greedy_search(log_probs, lengths), name
            assert fallbacks == ([0, 1, 2, 3] if length else []), name


def test_words_that_g_lacks_are_no_candidates(graphs, lang_dir, words):
    (lang_dir / "other").write_text("B\nBA B\nAB\n")
    estimate_arpa(lang_dir / "other", lang_dir / "other.arpa", 2)
    g = compile_g(lang_dir, lang_dir / "other.arpa", lambda line: None)
    hlg, _ = graphs(2, False)
    log_probs = torch.full((2, 4, len(TOKENS)), -5.0)
    log_probs[0, torch.arange(4), torch.tensor([0, 3, 0, 0])] = 0.0
    log_probs[1, torch.arange(4), torch.tensor([0, 4, 0, 0])] = 0.0
    batch = (log_probs.log_softmax(2), torch.tensor([4, 4]), hlg, words)
    assert one_best(*batch, beam=ALL)[0][0].words[0].startswith("A")
    tight = Beam(search_beam=4.0, output_beam=1.0, min_active_states=1, max_active_states=1000)
    for search in (nbest_rescoring, whole_lattice_rescoring):
        found, fallbacks = search(hlg_lattice(*batch, beam=ALL), g, 0.0)
        assert fallbacks == [] and set(found[0].words) <= {"B", "BA", "AB"}
        for lm_scale in (0.0, 1.0):
            found, fallbacks = search(hlg_lattice(*batch, hlg_scale=0.1, beam=tight), g, lm_scale)
            assert fallbacks == [0] and found[1].words == ["B"]


def test_graphs_of_another_lang_dir_are_refused(graphs, lang_dir, words, tmp_path):
    shutil.copytree(lang_dir, tmp_path / "lang")
    save_graph(graphs(2, False)[0], tmp_path / "lang" / "HLG.pt")
    save_graph(graphs(2)[0], tmp_path / "lang" / "G.pt")
    for name in ("HLG.pt", "G.pt"):
        loaded = load_lang_graph(tmp_path / "lang", name)
        assert loaded.words_txt == graphs(2)[0].words_txt
    log_probs, lengths = random_log_probs(FRAMES, len(TOKENS), 0), torch.tensor([FRAMES])
    lattice = hlg_lattice(log_probs, lengths, graphs(2, False)[0], words, beam=NBEST_BEAM)
    same = whole_lattice_rescoring(lattice, load_lang_graph(tmp_path / "lang", "G.pt"), 1.0)
    assert same == whole_lattice_rescoring(lattice, graphs(2)[0], 1.0)

    other = tmp_path / "lang" / "words.txt"
    other.write_text(other.read_text().replace("BA ", "CA "))
    for name in ("HLG.pt", "G.pt"):
        with pytest.raises(ValueError, match=rf"{name} was made with another words.txt than .*lang/words.txt"):
            load_lang_graph(tmp_path / "lang", name)

    shutil.copy(lang_dir / "words.txt", other)
    with open(tmp_path / "lang" / "tokens.txt", "a") as file:
        file.write(f"c {len(TOKENS)}\n")
    with pytest.raises(ValueError, match=r"HLG\.pt was made for 5 tokens, .*tokens\.txt has 6"):
        load_lang_graph(tmp_path / "lang", "HLG.pt")
    with pytest.raises(UserError, match="graphs stage"):
        load_lang_graph(tmp_path / "lang", "LG.pt")


def test_wrong_arguments_are_named(graphs, words):
    hlg, _ = graphs(2, False)
    log_probs, lengths = random_log_probs(FRAMES, len(TOKENS), 0), torch.tensor([FRAMES])
    for options in ({"num_paths": 0}, {"nbest_scale": 0.0}):
        with pytest.raises(ValueError, match="above 0"):
            nbest(hlg_lattice(log_probs, lengths, hlg, words), **options)
    with pytest.raises(ValueError, match="NaN"):
        hlg_lattice(log_probs * math.nan, lengths, hlg, words)
    with pytest.raises(ValueError, match="made for 5 tokens, the model has 4"):
        hlg_lattice(log_probs[..., :4], lengths, hlg, words)
    with pytest.raises(ValueError, match="made for 5 tokens, the model has 6"):
        hlg_lattice(torch.cat([log_probs, log_probs[..., :1]], 2), lengths, hlg, words)
