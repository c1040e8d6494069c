"""HLG and the best paths of CTC lattices against an enumeration of all alignments and word sequences."""

import gzip
import itertools
import math
import random
import re
import subprocess
import sys
from dataclasses import replace

import k2
import pytest
import torch

from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import estimate_arpa
from splitformer.corpora.tokens import train_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.ctc import Beam, ctc_lattice, hlg_lattice
from splitformer.decoding.graphs import compile_hlg, ctc_topology, load_graph, load_lang_graph, save_graph
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.lang import read_symbols
from splitformer.errors import UserError
from tests.with_k2.enumeration import (
    SPELLINGS,
    TEXT,
    TOKENS,
    WIDE,
    acoustic_scores,
    alignment_score,
    graph_score,
    make_small_lang,
    random_log_probs,
    readings,
    word_sequences,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """lang_dir, words and a bigram model. In an interpolated bigram no back-off path beats the n-gram itself."""
    lang_dir = make_small_lang(tmp_path_factory.mktemp("lang"))
    model = estimate_arpa(lang_dir / "text", lang_dir / "2.arpa", order=2)
    return lang_dir, read_symbols(lang_dir / "words.txt"), model


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(("order", "hlg_scale"), [(2, 1.0), (2, 0.4), (2, 2.5), (1, 1.0)])
def test_one_best_equals_enumeration(small, modified, order, hlg_scale):
    lang_dir, words, _ = small
    model = estimate_arpa(lang_dir / "text", lang_dir / f"{order}.arpa", order)
    hlg = compile_hlg(lang_dir, lang_dir / f"{order}.arpa", modified, report=lambda line: None)
    before = hlg.scores.clone()
    for seed in range(6):
        log_probs = random_log_probs(6, len(TOKENS), seed)
        penalty = 0.5 * (seed % 3)
        penalised = log_probs.clone()
        penalised[:, :, 0] -= penalty
        totals = {
            sentence: acoustic + hlg_scale * graph_score(model, sentence)
            for tokens, acoustic in acoustic_scores(penalised[0], modified).items()
            for sentence in word_sequences(tokens)
        }
        best = max(totals, key=totals.get)
        # a tie would make the test depend on rounding
        assert sum(total > totals[best] - 1e-3 for total in totals.values()) == 1
        [found], empty = hlg_lattice(log_probs, torch.tensor([6]), hlg, words, hlg_scale, penalty, WIDE).one_best()
        assert tuple(found.words) == best
        assert found.score == pytest.approx(totals[best], abs=1e-3)
        assert found.tokens == [token for word in best for token in SPELLINGS[word]]
        assert alignment_score(penalised[0], found, modified) == pytest.approx(
            acoustic_scores(penalised[0], modified)[tuple(found.tokens)], abs=1e-4
        )
        assert empty == []
    assert torch.equal(hlg.scores, before)


def test_ctc_decoding_equals_enumeration_and_greedy():
    topology = ctc_topology(5)
    for seed in range(10):
        log_probs, lengths = random_log_probs(6, 5, seed), torch.tensor([6])
        log_probs[:, :, 1:3] -= 50  # enumerated symbols only
        [hypothesis], empty = ctc_lattice(log_probs, lengths, topology).one_best()
        scores = acoustic_scores(log_probs[0])
        best = max(scores, key=scores.get)
        assert tuple(hypothesis.tokens) == best
        assert hypothesis.score == pytest.approx(scores[best], abs=1e-4)
        [greedy] = ctc_greedy_search(log_probs, lengths)
        assert (hypothesis.tokens, hypothesis.timestamps) == (greedy.tokens, greedy.timestamps)
        assert empty == []


def only(vocab_size: int, *token_sequences: list[int]) -> k2.Fsa:
    """Return a CTC topology that accepts only these token sequences."""
    accepted = k2.union(k2.create_fsa_vec([k2.linear_fsa(tokens) for tokens in token_sequences]))
    accepted = k2.arc_sort(k2.determinize(k2.remove_epsilon(accepted)))
    return k2.connect(k2.compose(ctc_topology(vocab_size), accepted))


def test_constrained_ctc_decoding_equals_enumeration():
    choices = [[3, 3, 4], [4, 4, 4], [3, 4, 3], [4, 3]]
    graph = only(5, *choices)
    for seed in range(10):
        log_probs = random_log_probs(6, 5, seed)
        scores = {t: s for t, s in acoustic_scores(log_probs[0]).items() if list(t) in choices}
        best = max(scores, key=scores.get)
        [hypothesis], empty = ctc_lattice(log_probs, torch.tensor([6]), graph, WIDE).one_best()
        assert tuple(hypothesis.tokens) == best
        assert hypothesis.score == pytest.approx(scores[best], abs=1e-4)
        assert empty == []
        assert hypothesis.timestamps == sorted(set(hypothesis.timestamps))
        assert len(hypothesis.timestamps) == len(best) and hypothesis.timestamps[-1] < 6


def test_empty_lattices_are_named_and_fall_back():
    """Three equal tokens need five frames: with four, no path exists. The other utterances are searched."""
    graph = only(5, [3, 3, 3])
    log_probs = torch.cat([random_log_probs(6, 5, seed) for seed in range(4)])
    lengths = torch.tensor([4, 6, 0, 5])
    hypotheses, empty = ctc_lattice(log_probs, lengths, graph, WIDE).one_best()
    assert empty == [0]
    assert hypotheses[0] == ctc_greedy_search(log_probs[:1], lengths[:1])[0]
    assert hypotheses[1].tokens == hypotheses[3].tokens == [3, 3, 3]
    assert hypotheses[2].tokens == []  # without frames there is no fallback
    # all of them empty, and a batch without any frame
    assert ctc_lattice(log_probs, torch.tensor([1, 2, 3, 4]), graph, WIDE).one_best()[1] == [0, 1, 2, 3]
    hypotheses, empty = ctc_lattice(log_probs, torch.tensor([0, 0, 0, 0]), graph, WIDE).one_best()
    assert [h.tokens for h in hypotheses] == [[]] * 4 and empty == []


def test_a_narrow_beam_that_ends_inside_a_word_falls_back(small, tmp_path):
    """B is no word here: the only state that survives a narrow beam waits for the rest of "b a"."""
    lang_dir, _, _ = small
    spellings = {"BA": [4, 3], "A": [3]}
    (tmp_path / "tokens.txt").write_text((lang_dir / "tokens.txt").read_text())
    (tmp_path / "text").write_text("BA A BA\nA\n")
    prepare_lang(tmp_path, spellings, spellings.__getitem__)
    estimate_arpa(tmp_path / "text", tmp_path / "2.arpa", order=2)
    hlg = compile_hlg(tmp_path, tmp_path / "2.arpa", report=lambda line: None)
    words = read_symbols(tmp_path / "words.txt")

    log_probs = torch.full((2, 3, 5), -20.0)
    for utterance, path in enumerate([[0, 3, 4], [0, 4, 3]]):
        log_probs[utterance, torch.arange(3), torch.tensor(path)] = 0.0
    log_probs = log_probs.log_softmax(dim=2)
    narrow = Beam(search_beam=0.5, output_beam=0.5, min_active_states=1, max_active_states=2)

    found, empty = hlg_lattice(log_probs, torch.tensor([3, 3]), hlg, words, beam=narrow).one_best()
    assert empty == [0]
    assert found[0] == ctc_greedy_search(log_probs, torch.tensor([3, 3]))[0] and found[0].tokens == [3, 4]
    assert (found[1].words, found[1].tokens, found[1].timestamps) == (["BA"], [4, 3], [1, 2])
    found, empty = hlg_lattice(log_probs, torch.tensor([3, 3]), hlg, words, beam=WIDE).one_best()
    assert empty == []
    assert found[1].words == ["BA"] and found[0].words in (["A"], ["BA"], ["A", "BA"])


SENTENCES = """ENTER NINE FOUR
ERASE THE LAST LINE
THE LINE IS THE LAST ONE
GO TO LINE NINETEEN
ENTER A A B
NINE NINE FOUR ONE
"""


@pytest.fixture(scope="module", params=["bpe", "char"])
def recipe(request, tmp_path_factory):
    """Tokenizer, words and HLG as the stage scripts make them from SENTENCES, for both kinds of tokens."""
    lang_dir = tmp_path_factory.mktemp(request.param)
    (lang_dir / "text").write_text(SENTENCES)
    train_tokenizer(lang_dir / "text", lang_dir, request.param, 36 if request.param == "bpe" else None)
    tokenizer = Tokenizer(lang_dir)
    prepare_lang(lang_dir, SENTENCES.split(), tokenizer.encode)
    estimate_arpa(lang_dir / "text", lang_dir / "3.arpa", order=3)
    save_graph(compile_hlg(lang_dir, lang_dir / "3.arpa", report=lambda line: None), lang_dir / "HLG.pt")
    hlg = load_graph(lang_dir / "HLG.pt")
    assert hlg.vocab_size == tokenizer.vocab_size and hlg.modified_topology is False
    return tokenizer, read_symbols(lang_dir / "words.txt"), hlg


def spoken(tokenizer: Tokenizer, lines: list[str], noise: float = 0.0, seed: int = 0):
    """Return log_probs and lengths for the lines: every token lasts some frames, with blanks between."""
    rng = random.Random(seed)
    paths = []
    for line in lines:
        path = [0] * rng.randint(0, 3)
        for token in tokenizer.encode(line):
            path += [token] * rng.randint(1, 3) + [0] * rng.randint(1, 3)
        paths.append(path)
    lengths = torch.tensor([len(path) for path in paths])
    shape = (len(paths), int(lengths.max()), tokenizer.vocab_size)
    logits = noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for utterance, path in enumerate(paths):
        logits[utterance, torch.arange(len(path)), torch.tensor(path)] += 8.0
    return logits.log_softmax(dim=2), lengths


def test_hlg_recognises_the_lines(recipe):
    tokenizer, words, hlg = recipe
    lines = [*SENTENCES.splitlines(), "LAST NINETEEN", "A B A"]  # the last two by backing off
    found, empty = hlg_lattice(*spoken(tokenizer, lines), hlg, words).one_best()
    assert [" ".join(hypothesis.words) for hypothesis in found] == lines
    assert empty == []


def test_hlg_corrects_most_errors_of_greedy_search(recipe):
    """Noise breaks the spelling; lexicon and language model correct it more often than not."""
    tokenizer, words, hlg = recipe
    lines = SENTENCES.splitlines() * 4
    log_probs, lengths = spoken(tokenizer, lines, noise=3.0)
    found, _ = hlg_lattice(log_probs, lengths, hlg, words).one_best()
    greedy = [tokenizer.decode(h.tokens) for h in ctc_greedy_search(log_probs, lengths)]
    wrong = sum(" ".join(hypothesis.words) != line for hypothesis, line in zip(found, lines))
    assert wrong < sum(text != line for text, line in zip(greedy, lines)) / 2


def same(some: list[Hypothesis], others: list[Hypothesis]) -> bool:
    """Return whether they are equal except for rounding of scores, which depends on how k2 numbers the arcs."""
    return all(
        math.isclose(a.score, b.score, abs_tol=1e-3) and replace(a, score=0.0) == replace(b, score=0.0)
        for a, b in zip(some, others, strict=True)
    )


def test_the_order_and_the_rest_of_a_batch_change_nothing(recipe):
    tokenizer, words, hlg = recipe
    log_probs, lengths = spoken(tokenizer, SENTENCES.splitlines(), noise=2.5, seed=1)
    lengths[2] = 1
    topology = ctc_topology(tokenizer.vocab_size)
    together = hlg_lattice(log_probs, lengths, hlg, words).one_best()[0]
    tokens = ctc_lattice(log_probs, lengths, topology).one_best()[0]
    for i, length in enumerate(lengths.tolist()):
        alone = log_probs[i : i + 1, :length], lengths[i : i + 1]
        assert same(hlg_lattice(*alone, hlg, words).one_best()[0], [together[i]])
        [hypothesis], _ = ctc_lattice(*alone, topology).one_best()
        assert (hypothesis.tokens, hypothesis.timestamps) == (tokens[i].tokens, tokens[i].timestamps)
        assert hypothesis.score == pytest.approx(tokens[i].score, abs=1e-4)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        shuffled = log_probs[order], lengths[order]
        assert same(hlg_lattice(*shuffled, hlg, words).one_best()[0], [together[i] for i in order])
        assert [h.tokens for h in ctc_lattice(*shuffled, topology).one_best()[0]] == [tokens[i].tokens for i in order]


def test_wrong_arguments_are_named(recipe):
    tokenizer, words, hlg = recipe
    size = tokenizer.vocab_size
    log_probs, lengths = random_log_probs(4, size, 0), torch.tensor([4])
    with pytest.raises(ValueError, match=rf"made for {size} tokens, the model has {size - 1}"):
        ctc_lattice(log_probs[:, :, :-1], lengths, ctc_topology(size))
    with pytest.raises(ValueError, match="hlg_lattice"):
        ctc_lattice(log_probs, lengths, hlg)
    with pytest.raises(ValueError, match="ctc_lattice"):
        hlg_lattice(log_probs, lengths, ctc_topology(size), words)
    with pytest.raises(ValueError, match="hlg_scale 0"):
        hlg_lattice(log_probs, lengths, hlg, words, hlg_scale=0)
    with pytest.raises(ValueError, match="NaN"):
        hlg_lattice(log_probs * math.nan, lengths, hlg, words)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        hlg_lattice(log_probs, torch.tensor([5]), hlg, words)


@pytest.mark.parametrize("modified", [False, True])
def test_topology_reads_alignments_and_writes_tokens(modified):
    """Check the topology against the definition, for every alignment of five frames."""
    topology = k2.arc_sort(ctc_topology(3, modified))
    arcs = list(zip(topology.arcs.values().tolist(), topology.aux_labels.tolist()))
    final = topology.shape[0] - 1
    for alignment in itertools.product(range(3), repeat=5):
        reached = {(0, ())}
        for symbol in alignment:
            reached = {
                (target, tokens + ((token,) if token else ()))
                for state, tokens in reached
                for (source, target, label, _), token in arcs
                if source == state and label == symbol
            }
        finals = {source for (source, target, label, _), _ in arcs if target == final and label == -1}
        assert {tokens for state, tokens in reached if state in finals} == readings(alignment, modified)


def test_gzipped_arpa_gives_the_same_graph(small, tmp_path):
    lang_dir, _, _ = small
    packed = tmp_path / "2.arpa.gz"
    packed.write_bytes(gzip.compress((lang_dir / "2.arpa").read_bytes()))
    lines: list[str] = []
    graphs = [compile_hlg(lang_dir, path, report=lines.append) for path in (lang_dir / "2.arpa", packed)]
    assert torch.equal(graphs[0].arcs.values(), graphs[1].arcs.values())
    assert graphs[0].aux_labels.tolist() == graphs[1].aux_labels.tolist()
    assert any(re.match(rf"HLG: {graphs[0].num_arcs} arcs, .* MB, .* s", line) for line in lines)


def test_words_of_the_grammar_or_the_lexicon_alone(small, tmp_path):
    """Words of the grammar alone are left out of HLG, words of the lexicon alone are counted."""
    lang_dir, words, _ = small
    (tmp_path / "text").write_text(TEXT.replace("AA", "OTHER"))
    estimate_arpa(tmp_path / "text", tmp_path / "2.arpa", order=2)
    lines: list[str] = []
    hlg = compile_hlg(lang_dir, tmp_path / "2.arpa", report=lines.append)
    assert "5 words of the lexicon are in the grammar, 1 are not" in lines[0]
    assert {words[i] for i in hlg.aux_labels.values.tolist() if i > 0} == set(SPELLINGS) - {"AA"}
    (tmp_path / "text").write_text(TEXT.lower())
    estimate_arpa(tmp_path / "text", tmp_path / "lower.arpa", order=2)
    with pytest.raises(UserError, match="same case"):
        compile_hlg(lang_dir, tmp_path / "lower.arpa", report=lines.append)


def test_damaged_arpa_files_are_refused(small, tmp_path):
    lang_dir, _, _ = small
    whole = (lang_dir / "2.arpa").read_bytes()
    assert b"\tA B\n" in whole
    packed = gzip.compress(whole)
    damaged = {
        "cut.arpa": whole[: len(whole) // 2],
        "no_end.arpa": whole.replace(b"\\end\\", b""),
        "page.arpa": b"<html>moved</html>\n",
        "empty.arpa": b"",
        "cut.arpa.gz": packed[: len(packed) // 2],
        "plain.arpa.gz": whole,
        "edgeless.arpa": whole.replace(b"</s>", b"</x>"),
        "wordless.arpa": whole.replace(b"\tA B\n", b"\t\n"),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(name)):
            compile_hlg(lang_dir, tmp_path / name, report=lambda line: None)
    with pytest.raises(UserError, match="lm stage"):
        compile_hlg(lang_dir, tmp_path / "none.arpa", report=lambda line: None)


def test_commands(tmp_path, repo_root):
    (tmp_path / "text").write_text(SENTENCES)
    (tmp_path / "extra").write_text("EIGHT\nFOUR\n")
    environment = {"PYTHONPATH": str(repo_root), "PATH": ""}

    def run(script, *arguments):
        command = [sys.executable, repo_root / "local" / script, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    lang, text, arpa = tmp_path / "lang", tmp_path / "text", tmp_path / "3.arpa"
    # EIGHT has a G and an H only where the tokenizer's text has them
    (tmp_path / "spelling").write_text(SENTENCES + "EIGHT\n")
    for script, *arguments in (
        ("train_bpe.py", "--text", tmp_path / "spelling", "--lang-dir", lang, "--model-type", "char"),
        ("prepare_lang.py", "--lang-dir", lang, "--text", text, "--extra-words", tmp_path / "extra"),
        ("estimate_lm.py", "--text", text, "--arpa", arpa, "--extra-words", tmp_path / "extra"),
        ("compile_graphs.py", "--graph", "G", "--lang-dir", lang, "--arpa", arpa),
        ("compile_graphs.py", "--lang-dir", lang, "--arpa", arpa),
    ):
        done = run(script, *arguments)
        assert done.returncode == 0, done.stderr
        assert "[I]" not in done.stderr  # kaldilm's log
    assert "0 are not and cannot be recognised" in done.stdout
    assert "peak memory" in done.stdout

    tokenizer = Tokenizer(lang)
    words, hlg = read_symbols(lang / "words.txt"), load_lang_graph(lang, "HLG.pt")
    assert load_lang_graph(lang, "G.pt").words_txt == hlg.words_txt
    found, _ = hlg_lattice(*spoken(tokenizer, ["ENTER EIGHT FOUR"]), hlg, words).one_best()
    assert found[0].words == ["ENTER", "EIGHT", "FOUR"]

    (tmp_path / "extra").write_text("ZEBRA\n")
    failed = run("prepare_lang.py", "--lang-dir", lang, "--text", text, "--extra-words", tmp_path / "extra")
    assert failed.returncode != 0 and "ZEBRA" in failed.stderr and "Traceback" not in failed.stderr
    arpa.write_text("no language model")
    failed = run("compile_graphs.py", "--lang-dir", lang, "--arpa", arpa)
    assert failed.returncode != 0 and "no ARPA file" in failed.stderr and "Traceback" not in failed.stderr
