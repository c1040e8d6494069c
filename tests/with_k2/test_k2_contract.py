"""What this project expects of k2: every function of k2 that it calls, in small cases that can be enumerated.

`./tests/run.sh --k2-contract` runs this module alone, in .venv or with the interpreter of SPLITFORMER_PYTHON. A k2 that
passes it gives the searches and losses of this project the results for which they were written.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

import k2
import pytest
import torch

INF = math.inf


def fsa(text: str, aux_labels: list[int] | list[list[int]] | None = None) -> k2.Fsa:
    """Return the acceptor of lines `source target label score`; its last line is the final state."""
    made = k2.Fsa.from_str("\n".join(line.strip() for line in text.strip().splitlines()))
    if aux_labels is not None:
        ragged = isinstance(aux_labels[0], list)
        made.aux_labels = k2.RaggedTensor(aux_labels) if ragged else torch.tensor(aux_labels, dtype=torch.int32)
    return made


def paths(graph: k2.Fsa, most_arcs: int = 12) -> list[tuple[tuple[int, ...], tuple[int, ...], float]]:
    """Return (labels, aux_labels, score) of each path of an FSA, without the final -1 and with epsilons."""
    written = [()] * graph.num_arcs
    if hasattr(graph, "aux_labels"):
        entries = graph.aux_labels.tolist()
        written = [tuple(each if isinstance(each, list) else [each]) for each in entries]
    leaving = defaultdict(list)
    for i, (source, target, label, _) in enumerate(graph.arcs.values().tolist()):
        leaving[source].append((target, label, written[i], float(graph.scores[i])))
    found, final = [], graph.shape[0] - 1
    partial = [(0, (), (), 0.0)] if graph.num_arcs else []
    for _ in range(most_arcs + 1):
        partial = [
            (target, (*labels, label), (*aux, *words), score + own)
            for state, labels, aux, score in partial
            for target, label, words, own in leaving[state]
        ]
        found += [path for path in partial if path[0] == final]
    return [(labels[:-1], tuple(word for word in aux if word != -1), score) for _, labels, aux, score in found]


def relation(graph: k2.Fsa, most_arcs: int = 12) -> dict[tuple, float]:
    """Return {(labels, aux_labels) without epsilons: the score of the best path}."""
    best: dict[tuple, float] = {}
    for labels, aux, score in paths(graph, most_arcs):
        key = tuple(label for label in labels if label), tuple(word for word in aux if word)
        best[key] = max(score, best.get(key, -INF))
    return best


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[key], b[key], abs_tol=1e-4) for key in a)


def test_no_call_of_k2_is_missing_here(repo_root):
    name = re.compile(r"\bk2\.((?:ragged\.|fsa\.)?[A-Za-z]\w*)")
    used = {found for path in repo_root.glob("splitformer/**/*.py") for found in name.findall(path.read_text())}
    here = set(name.findall(Path(__file__).read_text()))
    assert used - here <= {"Fsa"} and len(used) > 20


def members(vector: k2.Fsa) -> list[k2.Fsa]:
    return [vector[i] for i in range(vector.shape[0])]


DIAMOND = """
    0 1 1 0.5
    0 1 2 0.25
    1 2 1 -1.0
    1 2 3 0.75
    2 3 -1 0.125
    3
"""
DIAMOND_PATHS = {(1, 1): -0.375, (1, 3): 1.375, (2, 1): -0.625, (2, 3): 1.125}


def collapse(alignment: tuple[int, ...]) -> tuple[int, ...]:
    """Return the tokens of a CTC alignment."""
    return tuple(symbol for symbol, _ in itertools.groupby(alignment) if symbol)


# ---- graphs


def test_an_fsa_keeps_arcs_scores_and_attributes():
    graph = fsa(DIAMOND, [[5, 6], [], [7], [8], [-1]])
    assert {labels: score for labels, _, score in paths(graph)} == pytest.approx(DIAMOND_PATHS)
    assert graph.arcs.values().dtype == torch.int32 and graph.arcs.values().shape == (5, 4)
    assert graph.arcs.values()[:, 2].tolist() == graph.labels.tolist() == [1, 2, 1, 3, -1]
    shape = graph.arcs.shape()
    assert (shape.num_axes, shape.tot_size(0), shape.row_splits(1).tolist()) == (2, 4, [0, 2, 4, 5, 5])
    made = k2.Fsa.from_dict(graph.as_dict())
    assert relation(made) == relation(graph) and made.aux_labels == graph.aux_labels
    sharing = k2.Fsa(graph.arcs, aux_labels=graph.aux_labels, properties=graph.properties)
    sharing.lm_scores = graph.scores
    assert relation(sharing) == relation(graph)
    copy = k2.Fsa(graph.arcs.clone())
    copy.scores = 2 * graph.scores
    assert torch.equal(copy.scores, 2 * graph.scores) and graph.scores.tolist() == [0.5, 0.25, -1.0, 0.75, 0.125]


def test_labels_can_be_replaced():
    graph = fsa(DIAMOND)
    graph.labels = torch.where(graph.labels == 3, 0, graph.labels)
    assert graph.labels.tolist() == [1, 2, 1, 0, -1]
    assert {labels for labels, _, _ in paths(graph)} == {(1, 1), (1, 0), (2, 1), (2, 0)}


def test_openfst_text_of_a_grammar():
    """As kaldilm writes it: scores are costs, and final states have lines of their own."""
    text = "0 1 3 4 0.5\n1 2 5 0 0.25\n1 0.75\n2 1.5\n"
    assert relation(k2.Fsa.from_openfst(text, acceptor=False)) == {((3,), (4,)): -1.25, ((3, 5), (4,)): -2.25}


@pytest.mark.parametrize("modified", [False, True])
def test_the_ctc_topology_accepts_each_alignment_once(modified):
    topology = k2.ctc_topo(max_token=2, modified=modified)
    found = Counter((labels, tuple(filter(None, aux))) for labels, aux, _ in paths(topology, 4) if len(labels) == 4)
    expected: Counter = Counter()
    for alignment in itertools.product(range(3), repeat=4):
        if not modified:
            expected[alignment, collapse(alignment)] += 1
            continue
        runs = [(symbol, len(list(run))) for symbol, run in itertools.groupby(alignment)]
        # in the modified topology a run of one token is one token or several
        cuts = [[()] if symbol == 0 else _cuts(symbol, length) for symbol, length in runs]
        for pieces in itertools.product(*cuts):
            expected[alignment, tuple(itertools.chain(*pieces))] += 1
    assert found == expected
    assert all(score == 0.0 for _, _, score in paths(topology, 4))


def _cuts(symbol: int, length: int) -> list[tuple[int, ...]]:
    """Return the token sequences of a run, one for each way to cut it."""
    return [(symbol,) * (1 + bin(places).count("1")) for places in range(2 ** (length - 1))]


def test_the_trivial_graph_accepts_all_tokens():
    graph = k2.trivial_graph(2)
    assert {labels for labels, _, _ in paths(graph, 3)} == {
        labels for length in range(4) for labels in itertools.product((1, 2), repeat=length)
    }
    assert not graph.scores.any() and hasattr(graph, "aux_labels")


def test_a_linear_fsa_of_a_list_and_of_a_ragged_tensor():
    assert [labels for labels, _, _ in paths(k2.linear_fsa([4, 0, 5]))] == [(4, 0, 5)]
    several = k2.linear_fsa(k2.RaggedTensor([[4, 5], [], [6]]))
    assert [[labels for labels, _, _ in paths(each)] for each in members(several)] == [[(4, 5)], [()], [(6,)]]


def test_composition_matches_words_and_adds_scores():
    left = fsa(DIAMOND, [4, 0, 5, 6, -1])
    right = fsa("0 0 5 0.5\n0 1 4 -0.5\n1 1 6 0.25\n1 2 -1 1.0\n2", [7, 0, 8, -1])
    expected: dict[tuple, float] = {}
    for (labels, words), score in relation(left).items():
        for (read, written), own in relation(right).items():
            if words == read:
                expected[labels, written] = max(score + own, expected.get((labels, written), -INF))
    composed = k2.connect(k2.compose(left, k2.arc_sort(right)))
    assert expected and close(relation(composed), expected)
    # the symbols on which they meet, by name
    composed = k2.connect(k2.compose(left, k2.arc_sort(right), inner_labels="middle"))
    composed.aux_labels = composed.middle
    middle = {tuple(filter(None, aux)) for _, aux, _ in paths(composed)}
    assert middle == {read for read, _ in relation(right)} & {words for _, words in relation(left)}


def test_determinisation_keeps_the_best_scores_and_strings():
    text = "0 1 1 0.5\n0 2 1 0.25\n1 3 2 0.5\n1 3 3 0.5\n2 3 2 1.0\n2 4 3 0.5\n3 4 4 -0.5\n4 5 -1 0.0\n5"
    graph = fsa(text, [0, 7, 8, 9, 0, 5, 6, -1])
    acceptor = fsa(text)
    determined = k2.connect(k2.determinize(acceptor))
    assert close(relation(determined), relation(acceptor))
    for state in range(determined.shape[0]):
        labels = [label for source, _, label, _ in determined.arcs.values().tolist() if source == state]
        assert len(labels) == len(set(labels))
    # aux_labels are joined to strings
    unique = fsa("0 1 1 0.5\n0 2 1 0.25\n1 3 2 0.5\n2 3 3 1.0\n3 4 -1 0.0\n4", [7, 8, 0, 9, -1])
    assert close(relation(k2.connect(k2.determinize(unique))), relation(unique))
    assert relation(graph)


def test_epsilons_are_removed_and_added():
    graph = fsa("0 1 0 0.5\n0 1 2 0.25\n1 2 0 -0.5\n1 2 3 0.5\n2 3 -1 0.0\n3", [7, 8, 9, 0, -1])
    without = k2.connect(k2.remove_epsilon(graph))
    assert not (without.labels == 0).any() and close(relation(without), relation(graph))
    looped = k2.add_epsilon_self_loops(fsa(DIAMOND))
    loops = [(source, target) for source, target, label, _ in looped.arcs.values().tolist() if label == 0]
    assert sorted(loops) == [(0, 0), (1, 1), (2, 2)]  # not the final state
    assert relation(looped, 6).items() >= relation(fsa(DIAMOND)).items()


def test_connect_arc_sort_top_sort_and_invert():
    graph = fsa("0 2 3 0.5\n0 1 1 0.25\n0 3 2 0.0\n1 2 1 -1.0\n2 4 -1 0.0\n4", [4, 5, 6, 7, -1])
    connected = k2.connect(graph)
    assert connected.shape[0] == 4 and relation(connected) == relation(graph)  # state 3 leads nowhere
    ordered = k2.arc_sort(connected)
    assert relation(ordered) == relation(graph)
    arcs = ordered.arcs.values().tolist()
    assert all(a[2] <= b[2] for a, b in itertools.pairwise(arcs) if a[0] == b[0])
    assert relation(k2.invert(graph)) == {(aux, labels): score for (labels, aux), score in relation(graph).items()}
    assert k2.connect(fsa("0 1 1 0.0\n2 3 -1 0.0\n3")).num_arcs == 0
    backwards = k2.top_sort(k2.create_fsa_vec([fsa("0 2 1 0.5\n1 3 -1 0.0\n2 1 2 0.25\n3")]))
    assert all(source < target for source, target, _, _ in backwards.arcs.values().tolist())
    several = fsa(DIAMOND, [[5, 6], [], [7], [8], [-1]])
    assert relation(k2.invert(several)) == {(aux, labels): score for (labels, aux), score in relation(several).items()}


def test_vectors_of_fsas():
    first, second = fsa(DIAMOND), k2.linear_fsa([2])
    first.arc, second.arc = torch.arange(1, 6, dtype=torch.int32), torch.arange(6, 8, dtype=torch.int32)
    both = k2.create_fsa_vec([first, second])
    assert both.shape[0] == 2 and both.arc.tolist() == [1, 2, 3, 4, 5, 6, 7]
    picked = k2.index_fsa(both, torch.tensor([1, 0, 1], dtype=torch.int32))
    assert picked.arc.tolist() == [6, 7, 1, 2, 3, 4, 5, 6, 7]
    joined = k2.cat([both, picked])
    assert joined.shape[0] == 5 and joined.arc.tolist() == [*both.arc.tolist(), *picked.arc.tolist()]
    shape = joined.arcs.shape()  # [fsa][state][arc]
    ends = shape.row_splits(2)[shape.row_splits(1).long()].tolist()
    assert ends == [0, 5, 7, 9, 14, 16]
    states = k2.ragged.create_ragged_shape2(shape.row_splits(1), None, -1)
    arcs = k2.ragged.create_ragged_shape2(shape.row_splits(2), None, -1)
    again = k2.Fsa(k2.fsa.RaggedArc(states.compose(arcs), joined.arcs.values()))
    assert [relation(each) for each in members(again)] == [relation(each) for each in members(joined)]


# ---- lattices


def log_probs_of(seed: int, frames: int, symbols: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, frames, symbols, generator=generator)).log_softmax(dim=2)


def dense_lattice(graph: k2.Fsa, log_probs: torch.Tensor, lengths: list[int]) -> k2.Fsa:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    segments = torch.tensor([[i, 0, lengths[i]] for i in order], dtype=torch.int32)
    dense = k2.DenseFsaVec(log_probs, segments)
    limits = {"search_beam": 1000.0, "output_beam": 1000.0, "min_active_states": 1000, "max_active_states": 100000}
    return k2.intersect_dense_pruned(graph, dense, **limits)


def test_intersection_with_log_probabilities():
    graph = k2.ctc_topo(max_token=2)
    graph.lm_scores = torch.linspace(-0.5, 0.0, graph.num_arcs)
    graph.scores = graph.lm_scores.clone()
    log_probs, lengths = log_probs_of(0, 4, 3, batch=2), [3, 4]
    lattices = dense_lattice(graph, log_probs, lengths)
    for lattice, utterance in zip(members(lattices), (1, 0)):  # the longest first
        frames = log_probs[utterance].tolist()
        expected = {
            (labels, aux): score + sum(frames[t][symbol] for t, symbol in enumerate(labels))
            for labels, aux, score in paths(graph, 4)
            if len(labels) == lengths[utterance]
        }
        found = {(labels, aux): score for labels, aux, score in paths(lattice)}
        assert close(found, expected)
        language = sum(lattice.lm_scores.tolist())
        assert math.isfinite(language) and lattice.lm_scores.abs().sum() > 0


def test_a_graph_without_a_path_of_that_length_gives_an_empty_lattice():
    graph = k2.linear_fsa([1, 2, 1])
    lattices = dense_lattice(graph, log_probs_of(1, 3, 3, batch=2), [3, 2])
    lattices.arc = torch.arange(1, lattices.num_arcs + 1, dtype=torch.int32)
    best = k2.shortest_path(lattices, use_double_scores=True)
    shape = best.arcs.shape()
    ends = shape.row_splits(2)[shape.row_splits(1).long()].tolist()
    assert ends[1] == 4 and ends[2] == ends[1]  # nothing for the second


def test_best_paths_and_total_scores():
    one, two = fsa(DIAMOND), k2.linear_fsa([2])
    both = k2.create_fsa_vec([one, two, k2.connect(fsa("0 1 1 0.0\n2 3 -1 0.0\n3"))])
    both.arc = torch.arange(1, both.num_arcs + 1, dtype=torch.int32)
    best = k2.shortest_path(both, use_double_scores=True)
    assert best.arc.tolist() == [1, 4, 5, 6, 7] and best.scores.sum().item() == pytest.approx(1.375)
    tropical = both.get_tot_scores(use_double_scores=True, log_semiring=False)
    assert tropical.tolist() == pytest.approx([1.375, 0.0, -INF])
    log_sum = torch.tensor(list(DIAMOND_PATHS.values()), dtype=torch.float64).logsumexp(dim=0).item()
    totals = both.get_tot_scores(use_double_scores=True, log_semiring=True)
    assert totals.tolist() == pytest.approx([log_sum, 0.0, -INF])


def test_intersection_of_fsas_treats_zero_as_a_symbol_when_loops_are_added():
    grammar = k2.arc_sort(k2.add_epsilon_self_loops(fsa("0 1 1 0.5\n0 1 2 0.25\n1 1 1 0.125\n1 2 -1 0.0\n2")))
    grammar.lm_scores = grammar.scores.clone()
    readers = k2.create_fsa_vec([k2.linear_fsa([1, 0, 1]), k2.linear_fsa([0, 2]), k2.linear_fsa([3])])
    readers.scores = readers.scores - 1.0
    which = torch.zeros(3, dtype=torch.int32)
    both = k2.intersect_device(k2.create_fsa_vec([grammar]), readers, which, sorted_match_a=True)
    both = k2.top_sort(k2.connect(both))
    totals = both.get_tot_scores(use_double_scores=True, log_semiring=False).tolist()
    assert totals == pytest.approx([0.625 - 4.0, 0.25 - 3.0, -INF])
    assert both.lm_scores.sum().item() == pytest.approx(0.875)


def test_pruning_by_posterior_keeps_what_is_likely():
    graph = fsa("0 1 1 0.0\n0 1 2 -20.0\n1 2 3 0.0\n2 3 -1 0.0\n3")
    graph.arc = torch.arange(1, 5, dtype=torch.int32)
    vector = k2.create_fsa_vec([graph])
    pruned = k2.connect(k2.prune_on_arc_post(vector, 1e-6, use_double_scores=True))
    assert pruned.arc.tolist() == [1, 3, 4]
    assert k2.prune_on_arc_post(vector, 1e-12, use_double_scores=True).num_arcs == 4


def test_random_paths_are_paths_in_proportion_to_their_probability():
    lattices = k2.create_fsa_vec([fsa(DIAMOND), k2.linear_fsa([2])])
    drawn = k2.random_paths(lattices, num_paths=1000, use_double_scores=True)
    assert drawn.num_axes == 3 and drawn.shape.tot_size(1) == 2000
    labels = k2.ragged.index(lattices.labels.contiguous(), drawn).tolist()
    counts = Counter(tuple(path[:-1]) for path in labels[0])
    total = sum(map(math.exp, DIAMOND_PATHS.values()))
    for path, score in DIAMOND_PATHS.items():
        assert counts[path] / 1000 == pytest.approx(math.exp(score) / total, abs=0.01)
    assert all(path == [2, -1] for path in labels[1])
    again = k2.random_paths(lattices, num_paths=1000, use_double_scores=True)
    assert again.tolist() == drawn.tolist()  # no random numbers


def test_ragged_tensors():
    ragged = k2.RaggedTensor([[[3, 0], [4]], [[]], [[3, 0], [3]]], dtype=torch.int32)
    assert ragged.remove_values_leq(0).tolist() == [[[3], [4]], [[]], [[3], [3]]]
    assert ragged.remove_values_leq(0).unique()[0].tolist() == [[[3], [4]], [[]], [[3]]]
    assert ragged.remove_axis(0).tolist() == [[3, 0], [4], [], [3, 0], [3]]
    assert ragged.remove_axis(1).tolist() == [[3, 0, 4], [], [3, 0, 3]]
    assert ragged.shape.row_ids(1).tolist() == [0, 0, 1, 2, 2]
    flat = k2.RaggedTensor([[5, 0], [-1], [6]], dtype=torch.int32)
    assert flat.remove_values_eq(-1).tolist() == [[5, 0], [], [6]]
    assert flat.index(torch.tensor([2, 0], dtype=torch.int32), axis=0)[0].tolist() == [[6], [5, 0]]
    assert flat.index(k2.RaggedTensor([[0, 2], [1]], dtype=torch.int32)).tolist() == [[[5, 0], [6]], [[-1]]]
    other = k2.RaggedTensor([[[7]], [[8], [9]], []], dtype=torch.int32)
    assert k2.ragged.cat([ragged, other], axis=1).tolist() == [[[3, 0], [4], [7]], [[], [8], [9]], [[3, 0], [3]]]
    values = flat.values  # shares memory
    values[values == 0] = 9
    assert flat.tolist() == [[5, 9], [-1], [6]]
    shape = k2.ragged.create_ragged_shape2(torch.tensor([0, 2, 2, 3], dtype=torch.int32))
    assert k2.RaggedTensor(shape, torch.tensor([1, 2, 3], dtype=torch.int32)).tolist() == [[1, 2], [], [3]]


# ---- transducers


def transducer_scores(vocab_size: int, context_size: int):
    """Return a function of (frame, context) that gives log-probabilities (V,)."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(8, *[vocab_size] * context_size, vocab_size, generator=generator).log_softmax(dim=-1)
    return lambda frame, context: table[(frame, *context)]


@pytest.mark.parametrize("context_size", [1, 2])
def test_streams_of_a_transducer_enumerate_graph_and_frames(context_size):
    """Final arcs get no score in the lattice, so the graph ends with a symbol of its own, END, and a final arc."""
    vocab_size, end, frames = 3, 3, 3
    graph = fsa("0 0 1 -0.5\n0 1 2 0.25\n0 2 3 -0.75\n1 1 1 0.5\n1 2 3 -0.25\n2 3 -1 0.0\n3", [4, 5, 0, 6, 0, -1])
    scores = transducer_scores(vocab_size, context_size)
    streams = [k2.RnntDecodingStream(graph) for _ in range(2)]
    config = k2.RnntDecodingConfig(vocab_size + 1, context_size, 1000.0, 1000, 1000)
    running = k2.RnntDecodingStreams(streams, config)
    for frame in range(frames + 2):
        shape, contexts = running.get_contexts()
        assert shape.row_ids(1).numel() == len(contexts) and contexts.shape[1] == context_size
        log_probs = torch.full((len(contexts), vocab_size + 1), -INF)
        if frame < frames:
            for row, context in enumerate(contexts.tolist()):
                log_probs[row, :vocab_size] = scores(frame, context)
        else:
            log_probs[:, end if frame == frames else 0] = 0.0
        running.advance(log_probs)
    running.terminate_and_flush_to_streams()
    lattices = running.format_output([frames + 2] * 2, allow_partial=False)

    expected: dict[tuple, float] = {}
    for alignment in itertools.product(range(vocab_size), repeat=frames):
        context, score, tokens = (0,) * context_size, 0.0, []
        for frame, symbol in enumerate(alignment):
            score += float(scores(frame, context)[symbol])
            if symbol:
                context = (*context[1:], symbol)
                tokens.append(symbol)
        for labels, words, own in paths(graph, 6):
            if labels == (*tokens, end):
                expected[(*alignment, end), tuple(filter(None, words))] = score + own
    assert len(expected) > 10
    for i in range(2):
        found = {}
        for labels, words, score in paths(k2.connect(lattices[i])):
            key = labels[: frames + 1], tuple(filter(None, words))
            assert key not in found
            found[key] = score
        assert close(found, expected)


def test_rnnt_losses_equal_enumeration():
    """The smoothed loss without smoothing, and the pruned one whose ranges hold everything."""
    torch.manual_seed(0)
    frames, vocab_size = 4, 3
    y = torch.tensor([[1, 2], [2, 0]])
    boundary = torch.tensor([[0, 0, 2, 4], [0, 0, 1, 3]])
    am, lm = torch.randn(2, frames, vocab_size), torch.randn(2, 3, vocab_size)

    def log_likelihood(logits: torch.Tensor, n: int) -> torch.Tensor:
        """Sum over the alignments of utterance n, in which a frame may hold any number of symbols."""
        symbols, ends = int(boundary[n, 2]), int(boundary[n, 3])
        log_probs = logits[n].log_softmax(dim=-1)
        total = torch.full((), -INF)
        for before in itertools.combinations_with_replacement(range(ends), symbols):
            score = torch.zeros(())
            for frame in range(ends):
                done = sum(t < frame for t in before)
                for symbol in range(done, sum(t <= frame for t in before)):
                    score = score + log_probs[frame, symbol, y[n, symbol]]
                score = score + log_probs[frame, sum(t <= frame for t in before), 0]
            total = torch.logaddexp(total, score)
        return total

    logits = am.unsqueeze(2) + lm.unsqueeze(1)
    expected = -sum(float(log_likelihood(logits, n)) for n in range(2))
    arguments = {"symbols": y, "termination_symbol": 0, "boundary": boundary, "reduction": "sum"}
    simple, (px_grad, py_grad) = k2.rnnt_loss_smoothed(
        lm=lm, am=am, lm_only_scale=0.0, am_only_scale=0.0, return_grad=True, **arguments
    )
    assert simple.item() == pytest.approx(expected, abs=1e-3)
    ranges = k2.get_rnnt_prune_ranges(px_grad, py_grad, boundary, 3)
    assert ranges.shape == (2, frames, 3) and (ranges.diff(dim=2) == 1).all()
    _, pruned_lm = k2.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
    assert torch.equal(pruned_lm, torch.stack([lm[n][ranges[n]] for n in range(2)]))
    pruned = k2.rnnt_loss_pruned(am.unsqueeze(2) + pruned_lm, ranges=ranges, **arguments)
    assert pruned.item() == pytest.approx(expected, abs=1e-3)


def test_prune_ranges_follow_the_gradient_and_never_skip_a_symbol():
    torch.manual_seed(1)
    y, boundary = torch.randint(1, 5, (1, 6)), torch.tensor([[0, 0, 6, 10]])
    _, grads = k2.rnnt_loss_smoothed(
        lm=torch.randn(1, 7, 5), am=torch.randn(1, 10, 5), symbols=y, termination_symbol=0, boundary=boundary,
        reduction="sum", return_grad=True,
    )  # fmt: skip
    first = k2.get_rnnt_prune_ranges(*grads, boundary, 3)[0, :, 0].tolist()
    assert first[0] == 0 and first[-1] == 4
    assert all(0 <= b - a < 3 for a, b in itertools.pairwise(first))
