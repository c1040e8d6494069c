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
from torch import Tensor

from splitformer.decoding.lang import BACKOFF, load_graph, read_symbols, save_graph

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


def context_graph_fsa(arcs: Tensor, final_scores: Tensor) -> k2.Fsa:
    """The transducer's graph of a biasing automaton, which scores every sequence of tokens and rejects none.

    Args:
      arcs: (S * (V - 1), 4), a row (from, to, token, score) for each state 0..S - 1 and each token 1..V - 1, in any
        order; 0 is the start. Scores are nats.
      final_scores: (S,), nats, added where an utterance ends in the state.
    Returns:
      the graph, with `vocab_size` V, on the device of `arcs`.
    Raises:
      ValueError: where a state lacks an arc for a token, has two, or leads out of 0..S - 1.
    """
    states = len(final_scores)
    if arcs.dim() != 2 or arcs.shape[1] != 4 or not len(arcs) or final_scores.shape != (states,):
        raise ValueError(
            f"arcs {tuple(arcs.shape)} and final_scores {tuple(final_scores.shape)}: expected (A, 4), A > 0, and (S,)"
        )
    ends = arcs[:, :3].long()
    tokens = int(ends[:, 2].max())
    # sorted by (from, token), the order in which k2 wants them, complete and deterministic means 0, 1, 2, ...
    place, order = torch.sort(ends[:, 0] * tokens + ends[:, 2] - 1)
    complete = torch.equal(place, torch.arange(states * tokens, device=arcs.device)) and int(ends[:, 2].min()) > 0
    if not complete or not 0 <= int(ends[:, 1].min()) <= int(ends[:, 1].max()) < states:
        raise ValueError(
            f"{len(arcs)} arcs are no complete deterministic automaton of {states} states (one final score each) over "
            f"tokens 1..{tokens}: each state needs one arc for each token, {states * tokens} in all, to states 0.."
            f"{states - 1}"
        )
    ends, scores = ends[order], arcs[order, 3].float()

    # every state gets one arc more, its last: the final one
    first = torch.arange(states, device=arcs.device)
    last = torch.stack([first, torch.full_like(first, states), torch.full_like(first, -1)], dim=1)
    ends = torch.cat([ends.view(states, tokens, 3), last.unsqueeze(1)], dim=1).view(-1, 3).int()
    scores = torch.cat([scores.view(states, tokens), final_scores.float().unsqueeze(1)], dim=1).view(-1)
    graph = k2.Fsa(torch.cat([ends, scores.view(torch.int32).unsqueeze(1)], dim=1))
    graph.vocab_size = tokens + 1
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
      logarithms; its attributes `vocab_size` and `modified_topology` say what it was made for.
    Raises:
      FileNotFoundError, ValueError: where a file is missing or damaged, or the ARPA file and words.txt have
      no word in common.
    """
    step = _Steps(report)
    lg = _lexicon_and_grammar(Path(lang_dir), arpa, step)
    vocab_size = lg.vocab_size
    lg.tokens = lg.labels
    hlg = k2.connect(k2.compose(ctc_topology(vocab_size, modified), lg, inner_labels="tokens"))
    del hlg.tokens  # a copy of what aux_labels and labels say, the size of the labels
    hlg.vocab_size = vocab_size
    hlg.modified_topology = modified
    step("HLG", hlg)
    return _not_empty(hlg, "HLG", lang_dir, arpa)


def compile_lg(lang_dir: str | Path, arpa: str | Path, report: Callable[[str], None] = print) -> k2.Fsa:
    """Compile L o G, for transducers, whose search brings the blanks itself; arguments and errors as compile_hlg.

    Returns:
      LG: labels are tokens, without blanks or epsilons; aux_labels words (ragged), scores natural logarithms; its
      attribute `vocab_size` says what it was made for.
    """
    return _not_empty(_lexicon_and_grammar(Path(lang_dir), arpa, _Steps(report)), "LG", lang_dir, arpa)


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


def save_hlg(hlg: k2.Fsa, lang_dir: str | Path) -> Path:
    """Write `lang_dir/HLG.pt`."""
    path = Path(lang_dir) / "HLG.pt"
    save_graph(hlg, path)
    return path


def save_lg(lg: k2.Fsa, lang_dir: str | Path) -> Path:
    """Write `lang_dir/LG.pt`."""
    path = Path(lang_dir) / "LG.pt"
    save_graph(lg, path)
    return path


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
