"""Decoding graphs: compiling, saving and loading them.

CTC searches the topology H, or HLG, which composes it with a lexicon L and a grammar G. A transducer search brings its
own blanks, and searches all token sequences, LG, or a biasing automaton.

Mohri, Pereira & Riley, "Weighted finite-state transducers in speech recognition", 2002, with the CTC topology in place
of the transducers of acoustic model and context (Miao, Gowayyed & Metze, "EESEN", 2015).
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import k2
import torch

from splitformer.checkpoint import CheckpointError, load_contents, save_checkpoint
from splitformer.decoding.context import ContextGraph
from splitformer.decoding.lang import BACKOFF, STAGES, lang_file, read_symbols, words_checksum
from splitformer.errors import UserError

BYTES_PER_ARC = 16  # of k2: two states, a label, a score


class GraphError(UserError):
    """A graph, or a file that it is compiled from, is damaged or does not fit."""


def ctc_topology(vocab_size: int, modified: bool = False) -> k2.Fsa:
    """Return H, which reads a token or the blank (0) per output frame (labels) and writes tokens (aux_labels).

    The standard topology requires a blank between two equal tokens and has about vocab_size^2 arcs. The modified one
    does not and has about 3 * vocab_size; it cannot tell a long token from two equal ones. Use it for graphs whose
    lexicon decides that, and for vocabularies of thousands.
    """
    return k2.ctc_topo(max_token=vocab_size - 1, modified=modified)


def trivial_graph(vocab_size: int, device: torch.device | str = "cpu") -> k2.Fsa:
    """Return the transducer's graph that accepts every sequence of the tokens 1..vocab_size - 1 with score 0."""
    graph = k2.trivial_graph(vocab_size - 1, device)
    del graph.aux_labels  # they repeat the labels, and aux_labels are words here
    graph.vocab_size = vocab_size
    return with_end_symbol(graph)


def context_graph_fsa(context: ContextGraph) -> k2.Fsa:
    """Return the transducer's graph of a biasing automaton, which accepts and scores every token sequence."""
    graph = k2.Fsa(context.arcs())
    graph.vocab_size = context.vocab_size
    return with_end_symbol(graph)


def with_end_symbol(graph: k2.Fsa) -> k2.Fsa:
    """Return a transducer's graph whose sequences end with a symbol of their own, the attribute `end_symbol`.

    RnntDecodingStreams does not give the score of a final arc to the lattice: k2 1.23.4 leaves it out of `scores`, and
    since commit 89465dfc (#1059) no attribute is mapped onto final arcs either. So each final arc s -> F with score w
    becomes s -> F with the label vocab_size and score w, and F -> G, the new final state, gets score 0.
    """
    device, end_symbol = graph.device, graph.vocab_size
    final = graph.shape[0] - 1
    arcs = graph.arcs.values()
    arcs = torch.cat([arcs, torch.tensor([[final, final + 1, -1, 0]], dtype=torch.int32, device=device)])
    arcs[:-1, 2] = torch.where(arcs[:-1, 2] == -1, end_symbol, arcs[:-1, 2])
    ended = k2.Fsa(arcs)
    if hasattr(graph, "aux_labels"):
        words = graph.aux_labels.remove_values_eq(-1)
        splits = words.shape.row_splits(1)
        splits = torch.cat([splits, splits[-1:] + 1])
        values = torch.cat([words.values, torch.tensor([-1], dtype=torch.int32, device=device)])
        ended.aux_labels = k2.RaggedTensor(k2.ragged.create_ragged_shape2(splits), values)
    ended.vocab_size, ended.end_symbol = graph.vocab_size, end_symbol
    return ended


def save_graph(graph: k2.Fsa, path: str | Path) -> None:
    """Write an FSA with its attributes: icefall's `graph.as_dict()`, as plain values and tensors only."""
    attributes = graph.as_dict()
    arcs = {name: value for name, value in attributes.items() if isinstance(value, torch.Tensor)}
    ragged = {
        name: {"values": value.values, "row_splits": value.shape.row_splits(1)}
        for name, value in attributes.items()
        if isinstance(value, k2.RaggedTensor)
    }
    plain = {name: value for name, value in attributes.items() if name not in arcs and name not in ragged}
    save_checkpoint(path, {"tensors": arcs, "ragged": ragged, "attributes": plain})


def load_graph(path: str | Path) -> k2.Fsa:
    """Return what `save_graph` wrote; nothing in the file is executed. Raises GraphError if it is no graph."""
    stage = STAGES.get(Path(path).name, "graphs")
    remedy = f"remove it, and the {stage} stage of ./prepare.sh makes it again"
    try:
        stored = load_contents(path)
    except CheckpointError as error:
        raise GraphError(f"{path} cannot be read as a graph: {remedy}") from error
    if not {"tensors", "ragged", "attributes"} <= stored.keys():
        raise GraphError(f"{path} holds something else than a graph: {remedy}")
    ragged = {
        name: k2.RaggedTensor(k2.ragged.create_ragged_shape2(value["row_splits"]), value["values"])
        for name, value in stored["ragged"].items()
    }
    return k2.Fsa.from_dict({**stored["tensors"], **ragged, **stored["attributes"]})


def load_lang_graph(lang_dir: Path, name: str, device: torch.device | str = "cpu") -> k2.Fsa:
    """Return the graph of words `lang_dir/name`, such as HLG.pt, on `device`.

    Raises:
      UserError: it does not exist, or was made with another words.txt or for other tokens than those of `lang_dir`. A
        graph that does not record what it was made with passes.
    """
    path = lang_file(lang_dir, name)
    words, tokens = lang_file(lang_dir, "words.txt"), lang_file(lang_dir, "tokens.txt")
    graph = load_graph(path)
    checksum, vocab_size = words_checksum(words), len(read_symbols(tokens))
    remedy = "remove the graph, and the graphs stage of ./prepare.sh makes it again"
    if getattr(graph, "words_txt", checksum) != checksum:
        raise GraphError(f"{path} was made with another words.txt than {words} and writes other words: {remedy}")
    if getattr(graph, "vocab_size", vocab_size) != vocab_size:
        raise GraphError(f"{path} was made for {graph.vocab_size} tokens, {tokens} has {vocab_size}: {remedy}")
    return graph.to(device)


def compile_hlg(
    lang_dir: str | Path, arpa: str | Path, modified: bool = False, report: Callable[[str], None] = print
) -> k2.Fsa:
    """Compile H o L o G, for CTC, from `lang_dir` (tokens.txt, words.txt, L_disambig.pt) and an ARPA file.

    N-grams with words outside words.txt are left out of G.

    Args:
      arpa: the grammar, of any order; may be gzipped (.gz).
      modified: which ctc_topology.
      report: called with a line for each step: its size and time.
    Returns:
      HLG. Labels are tokens with blanks as in the topology, aux_labels words (ragged), scores natural logarithms. The
      attributes `vocab_size`, `modified_topology` and `words_txt` (words_checksum) record what it was made for. HLG of
      the modified topology has `tokens`, the token that the topology writes on each arc, 0 for none.
    Raises:
      UserError: a file is missing or damaged, or ARPA file and words.txt have no word in common.
    """
    step = _Steps(report)
    lg = _compose_lg(Path(lang_dir), arpa, step)
    vocab_size = lg.vocab_size
    lg.tokens = lg.labels
    hlg = k2.connect(k2.compose(ctc_topology(vocab_size, modified), lg, inner_labels="tokens"))
    if not modified:
        del hlg.tokens  # labels show where a token starts; in the modified topology they do not
    hlg.vocab_size = vocab_size
    hlg.modified_topology = modified
    hlg.words_txt = words_checksum(Path(lang_dir) / "words.txt")
    step("HLG", hlg)
    return hlg


def compile_lg(lang_dir: str | Path, arpa: str | Path, report: Callable[[str], None] = print) -> k2.Fsa:
    """Compile L o G, for transducers, whose search brings the blanks. Arguments and errors are those of compile_hlg.

    LG is like HLG, but its labels are tokens without blanks or epsilons.
    """
    lg = _compose_lg(Path(lang_dir), arpa, _Steps(report))
    lg.words_txt = words_checksum(Path(lang_dir) / "words.txt")
    return lg


def compile_g(lang_dir: str | Path, arpa: str | Path, report: Callable[[str], None] = print) -> k2.Fsa:
    """Compile G, the n-gram model of an ARPA file as an acceptor of words, for rescoring lattices.

    G is an FsaVec of one FSA with arcs sorted by label. Labels are those of words.txt, with #0, whose id is the
    attribute `backoff`, on the arcs that back off. Every state except the final one has a loop with label 0, for what a
    lattice reads between two words; k2's intersection, which treats 0 like other symbols, is then exact. `lm_scores`
    are the scores, which an intersection adds to those of the lattice; `words_txt` is words_checksum.
    """
    step = _Steps(report)
    words_path = lang_file(lang_dir, "words.txt")
    g = grammar(arpa, words_path)
    del g.aux_labels
    step("G", g)
    g = k2.create_fsa_vec([k2.arc_sort(k2.add_epsilon_self_loops(g))])
    g.lm_scores = g.scores.clone()
    g.backoff = read_symbols(words_path).index(BACKOFF)
    g.words_txt = words_checksum(words_path)
    step("G with loops", g)
    return g


def _compose_lg(lang_dir: Path, arpa: str | Path, step: _Steps) -> k2.Fsa:
    """Return L o G with `vocab_size`: determinised, arc-sorted, without disambiguation symbols and epsilons."""
    vocab_size = len(read_symbols(lang_file(lang_dir, "tokens.txt")))
    words_path = lang_file(lang_dir, "words.txt")
    first_word_disambig = read_symbols(words_path).index(BACKOFF)
    g = grammar(arpa, words_path)
    known = len(_known_words(g, words_path))
    lost = first_word_disambig - 2 - known  # <eps> and <UNK> are no words of the text
    step.report(f"{known} words of the lexicon are in the grammar, {lost} are not and cannot be recognised")
    step("G", g)
    # composition matches labels in order
    lg = k2.connect(k2.compose(load_graph(lang_file(lang_dir, "L_disambig.pt")), k2.arc_sort(g)))
    step("L o G", lg)
    lg = k2.connect(k2.determinize(lg))
    step("determinised", lg)

    # the disambiguation symbols are needed for determinisation only
    lg.labels = torch.where(lg.labels >= vocab_size, 0, lg.labels)
    if isinstance(lg.aux_labels, torch.Tensor):  # where no two arcs had to be joined
        lg.aux_labels = k2.RaggedTensor(lg.aux_labels.unsqueeze(1))
    words_written = lg.aux_labels.values  # shares its memory with lg.aux_labels
    words_written[words_written >= first_word_disambig] = 0
    lg = k2.connect(k2.remove_epsilon(lg))
    lg.aux_labels = lg.aux_labels.remove_values_eq(0)
    lg = k2.arc_sort(lg)
    step("without epsilons", lg)
    if lg.num_arcs == 0:
        raise GraphError(f"L o G of {lang_dir} and {arpa} accepts nothing: do they belong to the same corpus?")
    lg.vocab_size = vocab_size
    return lg


def grammar(arpa: str | Path, words_path: Path) -> k2.Fsa:
    """Return G: the ARPA file as an FST over the ids of words.txt, with #0 on the arcs that back off.

    N-grams with other words are left out. kaldilm runs in a process of its own, because it aborts on a damaged file and
    logs every section that it reads.
    """
    if not Path(arpa).is_file():
        raise GraphError(f"{arpa} does not exist: run ./prepare.sh, whose lm stage makes language models")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(arpa)
        if plain.suffix == ".gz":
            plain = Path(folder) / "plain.arpa"
            try:
                with gzip.open(arpa, "rb") as source, open(plain, "wb") as target:
                    shutil.copyfileobj(source, target)
            except (EOFError, gzip.BadGzipFile) as error:
                raise GraphError(f"{arpa} is damaged ({error}): make or download it again") from error
        command = [sys.executable, "-m", "kaldilm", "--disambig-symbol", BACKOFF, "--max-arpa-warnings", "0"]
        command += ["--read-symbol-table", str(words_path), str(plain)]
        fst = Path(folder) / "G.fst.txt"
        with open(fst, "w") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, encoding="utf-8", check=False)
        text = fst.read_text(encoding="utf-8")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("[I]") and "/csrc/" not in line]
        raise GraphError(f"{arpa} is no ARPA file or a damaged one: {' '.join(errors[-3:])}")
    try:
        g = k2.Fsa.from_openfst(text, acceptor=False)
    except ValueError as error:
        raise GraphError(f"{arpa} lacks the unigrams <s> and </s>: estimate it on whole sentences") from error
    if not _known_words(g, words_path):
        raise GraphError(f"{arpa} and {words_path} have no word in common; are they in the same case and language?")
    return g


def _known_words(g: k2.Fsa, words_path: Path) -> list[int]:
    """Return the ids of the words that the grammar has."""
    first_word_disambig = read_symbols(words_path).index(BACKOFF)
    return [word for word in g.labels.unique().tolist() if 0 < word < first_word_disambig]


class _Steps:
    """Reports each step of a compilation with its size and the seconds since the previous one."""

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self._start = time.monotonic()

    def __call__(self, name: str, graph: k2.Fsa) -> None:
        now = time.monotonic()
        size = graph.num_arcs * BYTES_PER_ARC / 1e6
        self.report(f"{name}: {graph.num_arcs} arcs, {size:.2f} MB, {now - self._start:.1f} s")
        self._start = now
