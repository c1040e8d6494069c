"""The transducer's k2 searches against an enumeration of all alignments, paths of the graph and word sequences."""

import itertools
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import k2
import pytest
import torch

from splitformer.corpora.lexicon import prepare_lang
from splitformer.corpora.ngram import EOS, NgramModel, estimate_arpa
from splitformer.decoding.context import ContextGraph
from splitformer.decoding.fast_beam import FAST_BEAM, FastBeam, transducer_lattice
from splitformer.decoding.graphs import (
    compile_lg,
    context_graph_fsa,
    load_graph,
    save_graph,
    trivial_graph,
    with_end_symbol,
)
from splitformer.decoding.greedy import transducer_greedy_search
from splitformer.decoding.lang import read_symbols
from splitformer.decoding.lattice import Lattice
from splitformer.decoding.modified_beam import modified_beam_search
from splitformer.decoding.nbest import most_probable
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner
from tests.with_k2.enumeration import SPELLINGS, TEXT, TOKENS, word_sequences

WIDE = FastBeam(beam=1000.0, max_contexts=1000, max_states=100000)
V, D = 4, 6


def transducer(seed: int, vocab_size: int = V, context_size: int = 2, peaky: float = 3.0) -> tuple[Decoder, Joiner]:
    torch.manual_seed(seed)
    decoder, joiner = Decoder(vocab_size, 5, context_size), Joiner(D, 5, 7, vocab_size)
    with torch.no_grad():  # at their initial size the weights would make all tokens alike
        for weight in (*decoder.parameters(), *joiner.parameters()):
            weight.mul_(peaky)
        decoder.embedding.weight[0] = 0.0
    return decoder, joiner


def frames_of(seed: int, batch: int, frames: int) -> torch.Tensor:
    return torch.randn(batch, frames, D, generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def alignments(decoder, joiner, encoded, symbols, blank_penalty=0.0) -> dict[tuple[int, ...], float]:
    """Return {alignment: its log-probability} for frames (T', D); each frame has a blank or one of `symbols`."""
    table = {}

    def log_probs(frame: int, context: tuple[int, ...]) -> list[float]:
        if (frame, context) not in table:
            predicted = decoder(torch.tensor([context]))[0, 0]
            logits = joiner(joiner.encoder_proj(encoded[frame]), joiner.decoder_proj(predicted))
            table[frame, context] = logits.double().log_softmax(dim=0).tolist()
        return table[frame, context]

    scores = {}
    for alignment in itertools.product((0, *symbols), repeat=len(encoded)):
        context, score = (0,) * decoder.context_size, 0.0
        for frame, symbol in enumerate(alignment):
            score += log_probs(frame, context)[symbol] - (blank_penalty if symbol == 0 else 0.0)
            if symbol:
                context = (*context[1:], symbol)
        scores[alignment] = score
    return scores


def tokens_of(alignment: tuple[int, ...]) -> list[int]:
    return [symbol for symbol in alignment if symbol]


def token_frames(alignment: tuple[int, ...]) -> list[int]:
    return [frame for frame, symbol in enumerate(alignment) if symbol]


def log_sum(scores) -> float:
    return torch.tensor(list(scores), dtype=torch.float64).logsumexp(dim=0).item()


def summed(scores) -> dict[tuple, float]:
    """Return {key: log-sum of its scores} for (key, score) pairs."""
    groups = defaultdict(list)
    for key, score in scores:
        groups[key].append(score)
    return {key: log_sum(group) for key, group in groups.items()}


def winner(totals: dict) -> tuple:
    best = max(totals, key=totals.get)
    # a tie would make the test depend on rounding
    assert sum(total > totals[best] - 1e-4 for total in totals.values()) == 1
    return best


def single(found):
    [hypothesis], fallbacks = found
    assert fallbacks == []
    return hypothesis


@pytest.mark.parametrize("context_size", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_best_path_equals_enumeration(context_size, frames):
    graph = trivial_graph(V)
    tokens_in_last_frame = 0
    for seed in range(6):
        decoder, joiner = transducer(seed, context_size=context_size)
        encoder_out, penalty = frames_of(seed, 1, frames), 0.7 * (seed % 3)
        scores = alignments(decoder, joiner, encoder_out[0], range(1, V), penalty)
        best = winner(scores)
        lengths = torch.tensor([frames])
        lattice = transducer_lattice(decoder, joiner, encoder_out, lengths, graph, blank_penalty=penalty, beam=WIDE)
        found = single(lattice.one_best())
        assert (found.tokens, found.timestamps) == (tokens_of(best), token_frames(best))
        assert found.score == pytest.approx(scores[best], abs=1e-4)
        assert found.score >= max(scores.values()) - 1e-4 and found.words is None
        tokens_in_last_frame += best[-1] != 0
    assert tokens_in_last_frame > 0


def test_nbest_equals_the_highest_sum_of_alignments():
    graph, differs = trivial_graph(V), 0
    for seed in range(12):
        decoder, joiner = transducer(seed, peaky=1.5)
        encoder_out = frames_of(seed, 1, 4)
        scores = alignments(decoder, joiner, encoder_out[0], range(1, V))
        totals = summed((tuple(tokens_of(alignment)), score) for alignment, score in scores.items())
        best = winner(totals)
        own = {alignment: score for alignment, score in scores.items() if tuple(tokens_of(alignment)) == best}
        lattice = transducer_lattice(decoder, joiner, encoder_out, torch.tensor([4]), graph, beam=WIDE)
        found = single(most_probable(lattice, 2000, 0.5))
        assert tuple(found.tokens) == best
        assert found.timestamps == token_frames(max(own, key=own.get))
        assert found.score == pytest.approx(totals[best], abs=1e-4)
        best_path = tuple(tokens_of(max(scores, key=scores.get)))
        differs += best_path != best
        few = single(most_probable(lattice, 1, 0.1))
        assert few.score >= totals[best_path] - 1e-4
    assert differs > 0  # the best path has another sequence


def write_lang(lang_dir: Path, spellings: dict[str, list[int]] = SPELLINGS, text: str = TEXT) -> NgramModel:
    (lang_dir / "tokens.txt").write_text("".join(f"{token} {i}\n" for i, token in enumerate(TOKENS)))
    (lang_dir / "text").write_text(text)
    prepare_lang(lang_dir, spellings, spellings.__getitem__)
    return estimate_arpa(lang_dir / "text", lang_dir / "2.arpa", order=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """LG, words and a bigram model. In an interpolated bigram no back-off path beats the n-gram itself."""
    lang_dir = tmp_path_factory.mktemp("lang")
    model = write_lang(lang_dir)
    save_graph(compile_lg(lang_dir, lang_dir / "2.arpa", report=lambda line: None), lang_dir / "LG.pt")
    return with_end_symbol(load_graph(lang_dir / "LG.pt")), read_symbols(lang_dir / "words.txt"), model


def test_command_makes_LG(small, tmp_path, repo_root):
    lg, _, _ = small
    write_lang(tmp_path)

    def run(*arguments):
        command = [sys.executable, repo_root / "local" / "compile_graphs.py", "--lang-dir", tmp_path]
        command += ["--arpa", tmp_path / "2.arpa", "--graph", "LG", *arguments]
        environment = {"PYTHONPATH": str(repo_root), "PATH": ""}
        return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stderr
    made = load_graph(tmp_path / "LG.pt")
    assert f"LG.pt: {made.shape[0]} states, {made.num_arcs} arcs" in done.stdout
    made = with_end_symbol(made)
    assert torch.equal(made.arcs.values(), lg.arcs.values()) and made.aux_labels == lg.aux_labels
    assert not (tmp_path / "HLG.pt").exists()
    assert int(made.labels[made.labels != -1].min()) > 0 and int(made.labels.max()) == made.end_symbol == len(TOKENS)
    failed = run("--modified-topology")
    assert failed.returncode != 0 and "no CTC topology" in failed.stderr


def lm_score(model: NgramModel, words: tuple[str, ...]) -> float:
    history = ["<s>"]
    total = 0.0
    for word in (*words, EOS):
        total += model.log10_prob(word, history) * math.log(10)
        history.append(word)
    return total


@pytest.mark.parametrize("scale", [1.0, 0.4, 2.5])
def test_LG_best_path_equals_enumeration(small, scale):
    lg, words, model = small
    assert lg.vocab_size == len(TOKENS)
    before = lg.arcs.values().clone(), lg.aux_labels.clone(), lg.labels
    tokens_in_last_frame = 0
    for seed in range(8):
        decoder, joiner = transducer(seed, len(TOKENS))
        encoder_out = frames_of(seed, 1, 5)
        totals = {
            (alignment, sentence): score + scale * lm_score(model, sentence)
            for alignment, score in alignments(decoder, joiner, encoder_out[0], (3, 4), 0.5).items()
            for sentence in word_sequences(tuple(tokens_of(alignment)))
        }
        alignment, sentence = best = winner(totals)
        found = single(
            transducer_lattice(decoder, joiner, encoder_out, torch.tensor([5]), lg, words, 0.5, scale, WIDE).one_best()
        )
        assert tuple(found.words) == sentence
        assert (found.tokens, found.timestamps) == (tokens_of(alignment), token_frames(alignment))
        assert found.score == pytest.approx(totals[best], abs=1e-3)
        tokens_in_last_frame += alignment[-1] != 0
    assert tokens_in_last_frame > 0
    assert torch.equal(lg.arcs.values(), before[0]) and lg.aux_labels == before[1]


def graph_paths(graph: k2.Fsa, tokens: list[int]) -> list[tuple[tuple[int, ...], float]]:
    """Return (words, score) of each path of LG that reads the tokens and ends."""
    leaving = defaultdict(list)
    for (source, target, label, _), score, written in zip(
        graph.arcs.values().tolist(), graph.scores.tolist(), graph.aux_labels.tolist()
    ):
        leaving[source, label].append((target, score, tuple(word for word in written if word > 0)))
    reached = [(0, (), 0.0)]
    for token in (*tokens, graph.end_symbol, -1):
        reached = [
            (target, sentence + written, total + score)
            for state, sentence, total in reached
            for target, score, written in leaving[state, token]
        ]
    return [(sentence, total) for _, sentence, total in reached]


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_nbest_LG_equals_the_highest_sum_of_paths(small, scale):
    lg, words, _ = small
    differs = 0
    for seed in range(8):
        decoder, joiner = transducer(seed, len(TOKENS), peaky=1.5)
        encoder_out = frames_of(seed, 1, 4)
        scores = [
            ((sentence, alignment), score + scale * graph)
            for alignment, score in alignments(decoder, joiner, encoder_out[0], (3, 4)).items()
            for sentence, graph in graph_paths(lg, tokens_of(alignment))
        ]
        totals = summed((sentence, score) for (sentence, _), score in scores)
        best = winner(totals)
        own = {alignment: score for (sentence, alignment), score in scores if sentence == best}
        alignment = max(own, key=own.get)
        lattice = transducer_lattice(decoder, joiner, encoder_out, torch.tensor([4]), lg, words, 0.0, scale, WIDE)
        found = single(most_probable(lattice, 3000))
        assert found.words == [words[i] for i in best]
        assert (found.tokens, found.timestamps) == (tokens_of(alignment), token_frames(alignment))
        assert found.score == pytest.approx(totals[best], abs=1e-3)
        differs += max(scores, key=lambda entry: entry[1])[0][0] != best
    assert differs > 0


def biasing(seed: int, states: int = 3) -> ContextGraph:
    """Return a random automaton."""
    generator = torch.Generator().manual_seed(seed)
    return ContextGraph(
        torch.randint(states, (states, V), generator=generator),
        2 * torch.randn(states, V, generator=generator),
        2 * torch.randn(states, generator=generator),
    )


@pytest.mark.parametrize("search", ["best", "nbest"])
def test_context_automaton_equals_enumeration(search):
    changed = 0
    for seed in range(10):
        decoder, joiner = transducer(seed)
        encoder_out = frames_of(seed, 1, 4)
        context = biasing(seed)
        plain = alignments(decoder, joiner, encoder_out[0], range(1, V))
        scores = {}
        for alignment, score in plain.items():
            state = 0
            for token in tokens_of(alignment):
                score += context.score[state, token].item()
                state = int(context.next_state[state, token])
            scores[alignment] = score + context.final_score[state].item()
        graph = context_graph_fsa(context)
        lattice = transducer_lattice(decoder, joiner, encoder_out, torch.tensor([4]), graph, beam=WIDE)
        if search == "best":
            best = winner(scores)
            found = single(lattice.one_best())
            assert (found.tokens, found.timestamps) == (tokens_of(best), token_frames(best))
            assert found.score == pytest.approx(scores[best], abs=1e-4)
            changed += best != max(plain, key=plain.get)
        else:
            totals = summed((tuple(tokens_of(alignment)), score) for alignment, score in scores.items())
            best = winner(totals)
            found = single(most_probable(lattice, 2000))
            assert tuple(found.tokens) == best
            assert found.score == pytest.approx(totals[best], abs=1e-4)
            changed += best != tuple(tokens_of(max(plain, key=plain.get)))
    assert changed > 0


def same(a, b) -> bool:
    return (a.tokens, a.timestamps, a.words) == (b.tokens, b.timestamps, b.words) and abs(a.score - b.score) < 1e-4


@pytest.mark.parametrize("kind", ["best", "nbest", "context", "LG", "nbest_LG"])
def test_batch_order_and_padding_change_nothing(small, kind):
    lg, words, _ = small
    decoder, joiner = transducer(3, len(TOKENS) if "LG" in kind else V)
    beam = FastBeam(beam=8.0, max_contexts=5, max_states=20)  # narrow enough to cut
    graph = {"LG": lg, "nbest_LG": lg, "context": context_graph_fsa(biasing(4))}.get(kind, trivial_graph(V))

    def search(encoder_out, lengths):
        symbols = words if "LG" in kind else None
        lattice = transducer_lattice(decoder, joiner, encoder_out, lengths, graph, symbols, beam=beam)
        return most_probable(lattice, 50) if "nbest" in kind else lattice.one_best()

    encoder_out, lengths = frames_of(7, 6, 12), torch.tensor([7, 12, 0, 1, 12, 3])
    together, fallbacks = search(encoder_out, lengths)
    assert together[2].tokens == [] and together[2].score == 0.0 and 2 not in fallbacks
    assert any(hypothesis.tokens for hypothesis in together)
    for i, length in enumerate(lengths.tolist()):
        [alone], fell = search(encoder_out[i : i + 1, :length], lengths[i : i + 1])
        assert same(alone, together[i]) and (fell == [0]) == (i in fallbacks)
    noisy = encoder_out.clone()
    for i, length in enumerate(lengths.tolist()):
        noisy[i, length:] = math.nan
    order = [5, 2, 1, 4, 0, 3]
    shuffled, fell = search(noisy[order], lengths[order])
    assert all(same(found, together[i]) for found, i in zip(shuffled, order))
    assert sorted(order[i] for i in fell) == fallbacks


def accepting(tokens: list[int]) -> k2.Fsa:
    """Return a graph that accepts these tokens alone."""
    graph = k2.linear_fsa(tokens)
    graph.vocab_size = V
    return with_end_symbol(graph)


def test_empty_lattices_are_named_and_fall_back():
    """The graph accepts three tokens, no more and no less: two frames are too few for them."""
    graph = accepting([1, 2, 3])
    decoder, joiner = transducer(5)
    with torch.no_grad():
        joiner.output_linear.bias[0] += 8.0  # greedy search finds blanks, whose score shows the penalty
    encoder_out, lengths = frames_of(5, 4, 6), torch.tensor([2, 6, 0, 3])
    for search in (Lattice.one_best, most_probable):
        found, fallbacks = search(
            transducer_lattice(decoder, joiner, encoder_out, lengths, graph, blank_penalty=0.5, beam=WIDE)
        )
        assert fallbacks == [0]
        greedy = transducer_greedy_search(decoder, joiner, encoder_out[:1], lengths[:1], blank_penalty=0.5)
        assert same(found[0], greedy[0])
        assert found[1].tokens == found[3].tokens == [1, 2, 3] and found[3].timestamps == [0, 1, 2]
        assert found[2].tokens == []
        # all of them empty, and a batch without any frame
        lattice = transducer_lattice(decoder, joiner, encoder_out, torch.tensor([1, 2, 2, 1]), graph, beam=WIDE)
        assert search(lattice).fallbacks == [0, 1, 2, 3]
        found, fallbacks = search(transducer_lattice(decoder, joiner, encoder_out, torch.zeros(4).int(), graph))
        assert [hypothesis.tokens for hypothesis in found] == [[]] * 4 and fallbacks == []


def test_a_narrow_beam_that_ends_inside_a_word_falls_back(tmp_path):
    """b is no word here; it begins "b a"."""
    write_lang(tmp_path, {"BA": [4, 3], "A": [3]}, "BA A BA\nA\n")
    lg = with_end_symbol(compile_lg(tmp_path, tmp_path / "2.arpa", report=lambda line: None))
    words = read_symbols(tmp_path / "words.txt")
    decoder, joiner = transducer(0, len(TOKENS))
    with torch.no_grad():
        joiner.output_linear.bias[4] += 6.0  # b is the most probable token
    encoder_out, lengths = frames_of(0, 12, 4), torch.full((12,), 4)
    narrow = FastBeam(beam=20.0, max_contexts=1, max_states=2)
    for search in (Lattice.one_best, most_probable):
        found, fallbacks = search(transducer_lattice(decoder, joiner, encoder_out, lengths, lg, words, beam=narrow))
        assert 0 < len(fallbacks) < 12
        greedy = transducer_greedy_search(decoder, joiner, encoder_out, lengths)
        for i, hypothesis in enumerate(found):
            assert (hypothesis.words is None) == (i in fallbacks)
            assert i not in fallbacks or same(hypothesis, greedy[i])
        lattice = transducer_lattice(decoder, joiner, encoder_out, lengths, lg, words, beam=WIDE)
        assert search(lattice).fallbacks == []


def test_an_end_beyond_the_beam_is_not_lost():
    """Each path pays 50 nats where it ends, more than continuing costs; the score of the end counts."""
    context = biasing(0)
    decoder, joiner = transducer(6)
    encoder_out, lengths = frames_of(6, 3, 8), torch.tensor([8, 5, 8])
    narrow = FastBeam(beam=1.0, max_contexts=2, max_states=4)
    ends = (replace(context, final_score=torch.full((3,), score)) for score in (0.0, -50.0))
    (free, _), (dear, fallbacks) = (
        transducer_lattice(decoder, joiner, encoder_out, lengths, context_graph_fsa(end), beam=narrow).one_best()
        for end in ends
    )
    assert fallbacks == []
    assert [a.tokens for a in dear] == [b.tokens for b in free]
    assert [a.score + 50 for a in dear] == pytest.approx([b.score for b in free], abs=1e-3)


def test_a_wide_beam_is_never_worse_than_modified_beam_search():
    """Sequences are compared by their best alignments; modified beam search sums over alignments."""
    improved = 0
    for seed in range(12):
        decoder, joiner = transducer(seed)
        encoder_out, lengths = frames_of(seed, 3, 16), torch.tensor([16, 9, 12])
        fast, _ = transducer_lattice(decoder, joiner, encoder_out, lengths, trivial_graph(V), beam=WIDE).one_best()
        for length_norm in (False, True):
            modified = modified_beam_search(decoder, joiner, encoder_out, lengths, length_norm=length_norm)
            for i, hypothesis in enumerate(modified):
                only = accepting(hypothesis.tokens)
                own = encoder_out[i : i + 1], lengths[i : i + 1]
                [best_alignment], _ = transducer_lattice(decoder, joiner, *own, only, beam=WIDE).one_best()
                assert best_alignment.tokens == hypothesis.tokens
                assert best_alignment.score <= fast[i].score + 1e-4
                improved += best_alignment.score < fast[i].score - 1e-4
    assert improved > 0


def test_narrow_beams_still_find_a_path():
    decoder, joiner = transducer(6)
    encoder_out, lengths = frames_of(6, 3, 30), torch.tensor([30, 20, 11])
    wide, _ = transducer_lattice(decoder, joiner, encoder_out, lengths, trivial_graph(V), beam=WIDE).one_best()
    for beam in (FAST_BEAM, FastBeam(1.0, 1, 2), FastBeam(0.01, 1, 2), FastBeam(20.0, 2, 4)):
        lattice = transducer_lattice(decoder, joiner, encoder_out, lengths, trivial_graph(V), beam=beam)
        found, fallbacks = lattice.one_best()
        assert fallbacks == []
        assert all(a.score <= b.score + 1e-4 for a, b in zip(found, wide))
    greedy = transducer_greedy_search(decoder, joiner, encoder_out, lengths)
    assert all(a.score <= b.score + 1e-4 for a, b in zip(greedy, wide))


def test_wrong_arguments_are_named(small):
    lg, words, _ = small
    decoder, joiner = transducer(0)
    encoder_out, lengths = frames_of(0, 2, 4), torch.tensor([4, 3])
    search = transducer_lattice
    for graph in (lg, trivial_graph(5), context_graph_fsa(ContextGraph.build([[1]], 5, 1.0))):
        with pytest.raises(ValueError, match="made for 5 tokens, the model has 4"):
            search(decoder, joiner, encoder_out, lengths, graph)
    graph = trivial_graph(V)
    with pytest.raises(ValueError, match=r"0\.\.4"):
        search(decoder, joiner, encoder_out, torch.tensor([5, 4]), graph)
    with pytest.raises(ValueError, match="float32"):
        search(decoder, joiner, encoder_out, lengths.float(), graph)
    with pytest.raises(ValueError, match=r"\(N, T', D\)"):
        search(decoder, joiner, encoder_out[0], lengths, graph)
    with pytest.raises(ValueError, match="NaN"):
        search(decoder, joiner, encoder_out * math.nan, lengths, graph)
    with pytest.raises(ValueError, match="ngram_lm_scale 0"):
        search(decoder, joiner, encoder_out, lengths, graph, ngram_lm_scale=0)
    with pytest.raises(ValueError, match="writes none"):
        search(decoder, joiner, encoder_out, lengths, graph, words=words)
    with pytest.raises(ValueError, match="epsilons"):
        search(decoder, joiner, encoder_out, lengths, accepting([1, 0, 3]))
    with pytest.raises(ValueError, match="no end symbol"):
        search(decoder, joiner, encoder_out, lengths, k2.linear_fsa([1, 2, 3]))
    with pytest.raises(ValueError, match="num_paths 0"):
        most_probable(search(decoder, joiner, encoder_out, lengths, graph), num_paths=0)
