"""Words, lexicon and its FSTs: their contents, and what the FSTs accept."""

from pathlib import Path

import k2
import pytest
import torch

from splitformer.checkpoint import save_checkpoint
from splitformer.corpora.lexicon import add_disambiguation_symbols, lexicon_to_fst, prepare_lang
from splitformer.decoding.graphs import GraphError, load_graph, save_graph
from splitformer.decoding.lang import read_symbols
from splitformer.errors import UserError

TOKENS = ["<blk>", "<sos/eos>", "<unk>", "a", "b", "c"]
# AB begins ABC; BEE and BE are spelled alike and begin BC; C begins nothing
SPELLINGS = {"AB": [3, 4], "ABC": [3, 4, 5], "BE": [4], "BEE": [4], "BC": [4, 5], "C": [5]}


@pytest.fixture
def lang_dir(tmp_path):
    (tmp_path / "tokens.txt").write_text("".join(f"{token} {i}\n" for i, token in enumerate(TOKENS)))
    return tmp_path


def paths(fst: k2.Fsa, labels: list[int]) -> set[tuple[int, ...]]:
    """Return every sequence of outputs, without 0, that `fst` writes for `labels`."""
    lattice = k2.connect(k2.intersect(k2.linear_fsa(labels), fst, treat_epsilons_specially=False))
    arcs, outputs = lattice.arcs.values().tolist(), lattice.aux_labels.tolist()
    final = lattice.shape[0] - 1
    found = set()

    def walk(state, written):
        if state == final:
            found.add(written)
        for (source, target, label, _), output in zip(arcs, outputs):
            if source == state:
                walk(target, written if label == -1 or output == 0 else (*written, output))

    if arcs:
        walk(0, ())
    return found


def test_files(lang_dir):
    prepare_lang(lang_dir, [*SPELLINGS, "C", "<UNK>"], SPELLINGS.__getitem__)
    words = ["<eps>", "<UNK>", "AB", "ABC", "BC", "BE", "BEE", "C", "#0", "<s>", "</s>"]
    assert read_symbols(lang_dir / "words.txt") == words
    assert (lang_dir / "lexicon.txt").read_text().splitlines() == [
        "<UNK> <unk>", "AB a b", "ABC a b c", "BC b c", "BE b", "BEE b", "C c",
    ]  # fmt: skip
    assert (lang_dir / "lexicon_disambig.txt").read_text().splitlines() == [
        "<UNK> <unk>", "AB a b #1", "ABC a b c", "BC b c", "BE b #1", "BEE b #2", "C c",
    ]  # fmt: skip
    assert read_symbols(lang_dir / "tokens.txt") == TOKENS  # the tokenizer's file stays as it is


def test_fsts_accept_the_spellings_of_word_sequences(lang_dir):
    prepare_lang(lang_dir, SPELLINGS, SPELLINGS.__getitem__)
    words = read_symbols(lang_dir / "words.txt")

    def sentences(fst, labels):
        return {" ".join(words[i] for i in path) for path in paths(fst, labels)}

    plain = load_graph(lang_dir / "L.pt")
    assert sentences(plain, [3, 4, 5]) == {"AB C", "ABC"}
    assert sentences(plain, [4, 5]) == {"BE C", "BEE C", "BC"}
    assert sentences(plain, [2, 5]) == {"<UNK> C"}
    assert sentences(plain, [3]) == set()

    disambiguated = load_graph(lang_dir / "L_disambig.pt")
    symbol = [len(TOKENS) + k for k in range(3)]  # #0, #1, #2
    assert sentences(disambiguated, [3, 4, 5]) == {"ABC"}
    assert sentences(disambiguated, [3, 4, symbol[1], 5]) == {"AB C"}
    assert sentences(disambiguated, [4, symbol[2], symbol[0], 4, symbol[1]]) == {"BEE #0 BE"}
    assert int(disambiguated.labels.max()) == symbol[2]


def test_disambiguation_only_where_needed():
    lexicon = [("X", ["▁x"]), ("XY", ["▁x", "y"]), ("Z", ["▁z", "y"]), ("ZZ", ["▁zz"])]
    result, last = add_disambiguation_symbols(lexicon)
    assert result == [("X", ["▁x", "#1"]), *lexicon[1:]]
    assert last == 1
    assert add_disambiguation_symbols(lexicon[1:]) == (lexicon[1:], 0)


def test_same_words_in_another_order_give_the_same_files(lang_dir, tmp_path):
    names = ("words.txt", "lexicon.txt", "lexicon_disambig.txt")
    prepare_lang(lang_dir, SPELLINGS, SPELLINGS.__getitem__)
    first = [(lang_dir / name).read_bytes() for name in names]
    arcs = load_graph(lang_dir / "L_disambig.pt").arcs.values()
    prepare_lang(lang_dir, reversed(list(SPELLINGS)), SPELLINGS.__getitem__)
    assert [(lang_dir / name).read_bytes() for name in names] == first
    assert torch.equal(load_graph(lang_dir / "L_disambig.pt").arcs.values(), arcs)


def test_states_and_properties_of_the_fst():
    fst = lexicon_to_fst([("AB", ["a", "b"]), ("A", ["a"])], {"a": 1, "b": 2}, {"AB": 1, "A": 2})
    assert fst.shape[0] == 3  # between words, inside AB, final
    assert fst.properties & k2.fsa_properties.VALID
    assert fst.properties & k2.fsa_properties.ARC_SORTED
    assert fst.scores.abs().max() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no words"),
        (["C", "D€"], "D€"),
        (["C", "<s>"], "<s>: reserved"),
        (["C", "#3"], "#3: reserved"),
    ],
)
def test_wrong_words_are_named(lang_dir, words, message):
    with pytest.raises(UserError, match=message):
        prepare_lang(lang_dir, words, lambda word: SPELLINGS.get(word, [3, 2]))
    assert not (lang_dir / "L.pt").exists()


@pytest.mark.parametrize("text", ["", "a 0\nb 2\n", "a 0\nb 0\n", "a 0\nb\n", "a zero\n"])
def test_damaged_tables_are_refused(tmp_path, text):
    (tmp_path / "tokens.txt").write_text(text)
    with pytest.raises(UserError, match=r"tokens\.txt"):
        read_symbols(tmp_path / "tokens.txt")


class Payload:
    """A pickle that calls a function when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["payload", "whole", "truncated", "other"])
def test_a_damaged_or_malicious_graph_is_refused_and_runs_nothing(lang_dir, tmp_path, damage):
    prepare_lang(lang_dir, SPELLINGS, SPELLINGS.__getitem__)
    graph, planted = lang_dir / "L.pt", tmp_path / "planted"
    if damage == "payload":
        torch.save({"plain": {}, "tensors": {"tensors": Payload(planted), "ragged": {}, "attributes": {}}}, graph)
    elif damage == "whole":
        torch.save(Payload(planted), graph)
    elif damage == "truncated":
        graph.write_bytes(graph.read_bytes()[:-100])
    else:
        save_checkpoint(graph, {"model": {"w": torch.zeros(2)}, "config": {}})
    with pytest.raises(GraphError, match=r"L\.pt .*: remove it, and the lang stage of \./prepare\.sh makes it again"):
        load_graph(graph)
    assert not planted.exists()


def test_ragged_labels_and_attributes_come_back(tmp_path):
    fst = k2.Fsa.from_str("0 1 1 0.5\n0 1 2 0.25\n1 2 -1 0\n2\n")
    fst.aux_labels = k2.RaggedTensor([[7, 8], [], [-1]])
    fst.vocab_size, fst.words_txt = 30, "abc"
    save_graph(fst, tmp_path / "F.pt")
    again = load_graph(tmp_path / "F.pt")
    assert again.aux_labels.tolist() == fst.aux_labels.tolist() and again.aux_labels.dtype == fst.aux_labels.dtype
    assert torch.equal(again.arcs.values(), fst.arcs.values()) and torch.equal(again.scores, fst.scores)
    assert (again.vocab_size, again.words_txt) == (30, "abc") and again.properties == fst.properties
