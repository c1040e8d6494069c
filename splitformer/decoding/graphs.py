"""Decoding graphs. CTC: the topology H, and HLG, which joins it with a lexicon L and a grammar G. Transducers, whose
search brings its own blanks: every sequence of tokens, LG, and a biasing automaton.

Mohri, Pereira & Riley, "Weighted finite-state transducers in speech recognition", 2002, with the CTC topology
in the place of the acoustic model's and the context's transducers (Miao, Gowayyed & Metze, "EESEN", 2015).
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import k2
import kaldilm
import torch

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.lang import BACKOFF, load_graph, read_symbols, words_checksum

BYTES_PER_ARC = 16  # of k2: two states, a label, a score


def ctc_topology(vocab_size: int, modified: bool = False) -> k2.Fsa:
    """H: reads a token or the blank (0) per output frame (labels), writes tokens (aux_labels).

    The standard topology wants a blank between two equal tokens and has about vocab_size^2 arcs. The modified
    one does not, and has about 3 * vocab_size; it cannot tell a long token from two equal ones, so that it is
    for graphs in which a lexicon decides that, and for vocabularies of thousands.
    """
    return k2.ctc_topo(max_token=vocab_size - 1, modified=modified)


def trivial_graph(vocab_size: int, device: torch.device | str = "cpu") -> k2.Fsa:
    """The transducer's graph that accepts every sequence of tokens 1..vocab_size - 1, all with score 0."""
    graph = k2.trivial_graph(vocab_size - 1, device)
    del graph.aux_labels  # they repeat the labels, and aux_labels are words here
    graph.vocab_size = vocab_size
    return graph


def context_graph_fsa(context: ContextGraph) -> k2.Fsa:
    """The transducer's graph of a biasing automaton, which scores every sequence of tokens and rejects none."""
    graph = k2.Fsa(context.arcs())
    graph.vocab_size = context.vocab_size
    return graph


def compile_hlg(
    lang_dir: str | Path, arpa: str | Path, modified: bool = False, report: Callable[[str], None] = print
) -> k2.Fsa:
    """Compile H o L o G, for CTC, from `lang_dir` (tokens.txt, words.txt, L_disambig.pt) and an ARPA file.

    N-grams with words outside words.txt are left out of G.

    Args:
      arpa: the grammar, of any order; may be gzipped (.gz).
      modified: which ctc_topology.
      report: is told each step with its size and time.
    Returns:
      HLG: labels are tokens with blanks as the topology has them, aux_labels words (ragged), scores natural
      logarithms; its attributes `vocab_size`, `modified_topology` and `words_txt` (words_checksum) say what it was
      made for. That of the modified topology has `tokens`: what each arc writes of the topology, 0 for nothing.
    Raises:
      FileNotFoundError, ValueError: where a file is missing or damaged, or the ARPA file and words.txt have
      no word in common.
    """
    step = _Steps(report)
    lg = _lexicon_and_grammar(Path(lang_dir), arpa, step)
    vocab_size = lg.vocab_size
    lg.tokens = lg.labels
    hlg = k2.connect(k2.compose(ctc_topology(vocab_size, modified), lg, inner_labels="tokens"))
    if not modified:
        del hlg.tokens  # labels tell where a token starts; in the modified topology they do not
    hlg.vocab_size = vocab_size
    hlg.modified_topology = modified
    hlg.words_txt = words_checksum(Path(lang_dir) / "words.txt")
    step("HLG", hlg)
    return _not_empty(hlg, "HLG", lang_dir, arpa)


def compile_lg(lang_dir: str | Path, arpa: str | Path, report: Callable[[str], None] = print) -> k2.Fsa:
    """Compile L o G, for transducers, whose search brings the blanks itself; arguments and errors as compile_hlg.

    Returns:
      LG: labels are tokens, without blanks or epsilons; aux_labels words (ragged), scores natural logarithms; its
      attributes `vocab_size` and `words_txt` say what it was made for.
    """
    lg = _not_empty(_lexicon_and_grammar(Path(lang_dir), arpa, _Steps(report)), "LG", lang_dir, arpa)
    lg.words_txt = words_checksum(Path(lang_dir) / "words.txt")
    return lg


def _lexicon_and_grammar(lang_dir: Path, arpa: str | Path, step: _Steps) -> k2.Fsa:
    """L o G, determinised, without disambiguation symbols or epsilons, arcs sorted; with `vocab_size`."""
    vocab_size = len(read_symbols(lang_dir / "tokens.txt"))
    words = read_symbols(lang_dir / "words.txt")
    first_word_disambig = words.index(BACKOFF)

    known = arpa_words(arpa) & set(words[:first_word_disambig])
    if not known:
        raise ValueError(
            f"{arpa} and {lang_dir / 'words.txt'} have no word in common; are both in the same case, "
            "and of the same language?"
        )
    lost = first_word_disambig - 2 - len(known)  # <eps> and <UNK> are none of the text's words
    step.report(f"{len(known)} words of the lexicon are in the grammar, {lost} are not and cannot be recognised")
    g = grammar(arpa, lang_dir / "words.txt")
    step("G", g)
    # composition matches labels in order
    lg = k2.connect(k2.compose(load_graph(lang_dir / "L_disambig.pt"), k2.arc_sort(g)))
    step("L o G", lg)
    lg = k2.connect(k2.determinize(lg))
    step("determinised", lg)

    # the disambiguation symbols have done their work
    lg.labels = torch.where(lg.labels >= vocab_size, 0, lg.labels)
    if isinstance(lg.aux_labels, torch.Tensor):  # where no two arcs had to be joined
        lg.aux_labels = k2.RaggedTensor(lg.aux_labels.unsqueeze(1))
    words_written = lg.aux_labels.values  # shares its memory with lg.aux_labels
    words_written[words_written >= first_word_disambig] = 0
    lg = k2.connect(k2.remove_epsilon(lg))
    lg.aux_labels = lg.aux_labels.remove_values_eq(0)
    lg = k2.arc_sort(lg)
    step("without epsilons", lg)
    lg.vocab_size = vocab_size
    return lg


def _not_empty(graph: k2.Fsa, name: str, lang_dir: str | Path, arpa: str | Path) -> k2.Fsa:
    if graph.num_arcs == 0:
        raise ValueError(f"{name} of {lang_dir} and {arpa} accepts nothing: do they belong to the same corpus?")
    return graph


def grammar(arpa: str | Path, words: str | Path) -> k2.Fsa:
    """G: the ARPA file as an FST over the ids of words.txt, with #0 on the arcs that back off.

    N-grams with other words are left out. Check the file with arpa_words first: kaldilm ends the process at
    a damaged one.
    """
    with tempfile.TemporaryDirectory() as folder:
        if str(arpa).endswith(".gz"):
            plain = Path(folder) / "plain.arpa"
            with gzip.open(arpa, "rb") as source, open(plain, "wb") as target:
                shutil.copyfileobj(source, target)
            arpa = plain
        text = kaldilm.arpa2fst(
            input_arpa=str(arpa), disambig_symbol=BACKOFF, read_symbol_table=str(words), max_arpa_warnings=0
        )
    return k2.Fsa.from_openfst(text, acceptor=False)


def arpa_words(arpa: str | Path) -> set[str]:
    """The unigrams of an ARPA file (.gz or plain), all of which is read and counted.

    Raises ValueError where it does not hold the n-grams that it announces, FileNotFoundError without a file.
    """
    announced: dict[str, int] = {}
    found: dict[str, int] = {}
    words: set[str] = set()
    section, ended = "", False
    opener = gzip.open if str(arpa).endswith(".gz") else open
    try:
        with opener(arpa, "rt", encoding="utf-8") as file:
            for line in map(str.strip, file):
                if line.startswith("\\") and line.endswith(("\\", "-grams:")):
                    section = line[1:].removesuffix("-grams:")
                    ended = line == "\\end\\"
                elif section == "data\\" and line.startswith("ngram "):
                    order, count = line.removeprefix("ngram ").split("=")
                    announced[order.strip()] = int(count)
                elif section in announced and line:
                    log10_prob, *fields = line.split()
                    float(log10_prob)
                    if len(fields) - int(section) not in (0, 1):  # the words, and perhaps a back-off weight
                        raise ValueError(f"{line!r} is no {section}-gram")
                    found[section] = found.get(section, 0) + 1
                    if section == "1":
                        words.add(fields[0])
    except (EOFError, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{arpa} is no ARPA file or a damaged one: {error}") from error
    wanted = {order: count for order, count in announced.items() if count}
    if not wanted or not ended or found != wanted:
        raise ValueError(
            f"{arpa} is no whole ARPA file: n-grams announced by order {announced}, found {found}; make or "
            "download it again"
        )
    if not words >= {"<s>", "</s>"}:
        raise ValueError(f"{arpa} lacks the unigrams <s> and </s>; estimate it on sentences with their edges")
    return words


def compile_g(lang_dir: str | Path, arpa: str | Path, report: Callable[[str], None] = print) -> k2.Fsa:
    """G, the n-gram model of an ARPA file as an acceptor of words, for rescoring lattices.

    Returns:
      an FsaVec of one FSA, arcs sorted by label. Labels are those of words.txt, among them #0, whose number is the
      attribute `backoff`, on the arcs that back off. Every state but the final one has a loop with label 0, for what
      a lattice reads between two words: so k2's intersection, to which 0 is a symbol like others, is exact.
      `lm_scores` are the scores, which an intersection adds to those of the lattice; `words_txt` is words_checksum.
    Raises:
      FileNotFoundError, ValueError: as compile_hlg.
    """
    words_path = Path(lang_dir) / "words.txt"
    words = read_symbols(words_path)
    step = _Steps(report)
    if not arpa_words(arpa) & set(words[: words.index(BACKOFF)]):
        raise ValueError(f"{arpa} and {words_path} have no word in common; are they in the same case and language?")
    g = grammar(arpa, words_path)
    del g.aux_labels
    step("G", g)
    g = k2.create_fsa_vec([k2.arc_sort(k2.add_epsilon_self_loops(g))])
    g.lm_scores = g.scores.clone()
    g.backoff = words.index(BACKOFF)
    g.words_txt = words_checksum(words_path)
    step("G with loops", g)
    return g


class _Steps:
    """Reports each step of a compilation with its size and the seconds since the one before."""

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self._start = time.monotonic()

    def __call__(self, name: str, graph: k2.Fsa) -> None:
        now = time.monotonic()
        size = graph.num_arcs * BYTES_PER_ARC / 1e6
        self.report(f"{name}: {graph.num_arcs} arcs, {size:.2f} MB, {now - self._start:.1f} s")
        self._start = now
