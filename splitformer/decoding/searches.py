"""The methods that `bin/decode` offers: named searches through one exit's output, each with the options to choose from.

A method is bound to its graphs once; `run(view, options)` then searches one batch at one exit. Options that change
what is found (the weight of a language model, a penalty on blanks) are listed in `variants`: on the tune set all are
run, elsewhere the one that was chosen there. Methods that read the same lattice `follow` the cheapest of them: they
take what was chosen for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import k2
import torch
from torch import Tensor

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.ctc import ctc_decoding, one_best
from splitformer.decoding.fast_beam import fast_beam_search, fast_beam_search_nbest, fast_beam_search_nbest_LG
from splitformer.decoding.graphs import context_graph_fsa, ctc_topology, trivial_graph
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.lang import load_graph, read_symbols, words_checksum
from splitformer.decoding.modified_beam import modified_beam_search
from splitformer.decoding.nbest import (
    nbest,
    nbest_oracle,
    nbest_rescoring,
    one_best_with_uncertainty,
    whole_lattice_rescoring,
)
from splitformer.decoding.prefix_beam import prefix_beam_search, prefix_beam_uncertainty
from splitformer.decoding.word_list import NearestWords, read_words
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner

METHODS = {
    "greedy_search": "ctc",
    "greedy_search+lexicon": "ctc",
    "prefix_beam_search": "ctc",
    "ctc-decoding": "ctc",
    "1best": "ctc",
    "nbest": "ctc",
    "nbest-rescoring": "ctc",
    "whole-lattice-rescoring": "ctc",
    "nbest-oracle": "ctc",
    "transducer-greedy_search": "transducer",
    "modified_beam_search": "transducer",
    "fast_beam_search": "transducer",
    "fast_beam_search_nbest": "transducer",
    "fast_beam_search_nbest_LG": "transducer",
}
"""{name: the head whose output it searches}. Named as in icefall; both heads have a greedy search, so the
transducer's says so."""

NOT_CHOSEN = ("nbest-oracle", "greedy_search+lexicon")
"""Methods that no policy searches with: no result, and a correction of words behind the search."""


NEED_LANG_DIR = (
    "greedy_search+lexicon",
    "1best",
    "nbest",
    "nbest-rescoring",
    "whole-lattice-rescoring",
    "nbest-oracle",
    "fast_beam_search_nbest_LG",
)
"""Methods that read graphs and words.txt of the lang_dir; the others need no file."""

_FAMILIES = (
    ("1best", "nbest", "whole-lattice-rescoring", "nbest-rescoring", "nbest-oracle"),
    ("fast_beam_search", "fast_beam_search_nbest"),
)
"""Methods that read one kind of lattice, the cheapest first."""


def default_methods(heads: Sequence[str]) -> list[str]:
    """CTC alone: the greedy path, the same by k2, and HLG. With a transducer: all methods of its heads."""
    if "transducer" not in heads:
        return ["greedy_search", "ctc-decoding", "1best"]
    return [name for name, head in METHODS.items() if head in heads]


class ExitView(NamedTuple):
    """One batch at one exit, as a search sees it."""

    lengths: Tensor
    """(N,) output frames"""
    log_probs: Tensor | None
    """(N, T', V) of the CTC head, where there is one"""
    encoder_out: Tensor
    """(N, T', D)"""
    decoder: Decoder | None
    joiner: Joiner | None
    """of this exit; None, as the decoder, without a transducer"""
    references: list[list[str]]
    """for nbest-oracle alone"""


SearchResult = tuple[list[Hypothesis], list[int]]
"""N hypotheses, and the indices of those whose lattice was empty: they are greedy search's. Where a hypothesis has no
words, its tokens are to be spelled."""

Options = tuple[tuple[str, float], ...]
"""(name, value) pairs: hashable, and a dictionary for those who ask."""


@dataclass(frozen=True)
class Method:
    """`run(view, options)`, for `options` among `variants`."""

    name: str
    run: Callable[[ExitView, Options], SearchResult]
    variants: tuple[Options, ...] = ((),)
    """to choose from, where the method follows no other"""
    default: Options = ()
    """what is taken where nothing can be chosen"""
    follows: str | None = None
    """the method whose options, chosen on the tune set, this one takes"""
    fixed: dict[str, Any] = field(default_factory=dict)
    """what else the record says of the method"""
    correct: Callable[[list[str]], list[str]] | None = None
    """what is done in the end to an utterance's words"""
    lattice_uncertainty: Callable[[ExitView, Options], tuple[list[Hypothesis], list[int], Tensor]] | None = None
    """of methods that read HLG's lattice: 1best's hypotheses, and their doubt beside the lattice's other words"""

    @property
    def head(self) -> str:
        return METHODS[self.name]

    def run_with_uncertainty(self, view: ExitView, options: Options) -> tuple[list[Hypothesis], list[int], Tensor]:
        """What `run` finds, and (N,) minus the log of its n-best posterior (arXiv 2309.09546).

        The n-best list is that of HLG's lattice where the method reads it, else the beam of CTC's prefix search.
        """
        if self.lattice_uncertainty is not None:
            *found, doubts = self.lattice_uncertainty(view, options)
            return *(found if self.name == "1best" else self.run(view, options)), doubts
        if view.log_probs is None:
            raise ValueError(f"{self.name}: n-best posteriors are of the CTC head, which this model lacks")
        return *self.run(view, options), prefix_beam_uncertainty(view.log_probs, view.lengths)


class Weights(NamedTuple):
    """Values to choose from on the tune set."""

    hlg_scales: Sequence[float] = (0.3, 0.5, 0.7, 1.0, 1.4)
    """of the language model against CTC's log-probabilities"""
    ngram_lm_scales: Sequence[float] = (0.1, 0.2, 0.35, 0.5)
    """of the language model against the transducer's, which has learned one of its own"""
    blank_penalties: Sequence[float] = (0.0, 1.0, 2.0)
    """nats; of equal weights the one nearest to no penalty is chosen"""


@dataclass(frozen=True)
class Bias:
    """Hot words: phrases as token ids, and the bonus in nats for each of their tokens."""

    phrases: Sequence[Sequence[int]]
    boost: float


def make_methods(
    names: Iterable[str],
    lang_dir: Path | None,
    vocab_size: int,
    device: torch.device,
    weights: Weights,
    bias: Bias | None = None,
    word_list: Path | None = None,
) -> list[Method]:
    """The methods of these names, with what they need of `lang_dir` loaded once.

    Args:
      lang_dir: None for methods that are not among NEED_LANG_DIR.
      word_list: of greedy_search+lexicon; None for words.txt of `lang_dir`.
      bias: for prefix_beam_search, modified_beam_search and fast_beam_search; the others know no context.
    Raises:
      FileNotFoundError, ValueError: a graph is missing, or was made from another words.txt or for other tokens.
    """
    names = list(names)
    if lang_dir is None and (needy := [name for name in names if name in NEED_LANG_DIR]):
        raise ValueError(f"{', '.join(needy)}: words and graphs are read from a lang_dir; give one (--lang-dir)")
    needs = _Needs(lang_dir, vocab_size, device, bias, word_list)
    makers = {
        "greedy_search": _greedy_search,
        "greedy_search+lexicon": _greedy_search_and_lexicon,
        "prefix_beam_search": _prefix_beam_search,
        "ctc-decoding": _ctc_decoding,
        "1best": _one_best,
        "nbest": _nbest,
        "nbest-rescoring": _nbest_rescoring,
        "whole-lattice-rescoring": _whole_lattice_rescoring,
        "nbest-oracle": _nbest_oracle,
        "transducer-greedy_search": _transducer_greedy_search,
        "modified_beam_search": _modified_beam_search,
        "fast_beam_search": _fast_beam_search,
        "fast_beam_search_nbest": _fast_beam_search_nbest,
        "fast_beam_search_nbest_LG": _fast_beam_search_nbest_lg,
    }
    return [replace(makers[name](needs, weights), follows=_leader(name, names)) for name in names]


def _leader(name: str, names: Sequence[str]) -> str | None:
    """The cheapest of `names` that reads the same lattice as `name`, if another.

    Tuned by itself, nbest would cost ten times 1best's choice, and nbest-oracle would choose by the references.
    """
    for family in _FAMILIES:
        if name in family:
            leader = next(each for each in family if each in names)
            return None if leader == name else leader
    return None


class _Needs:
    """What methods share, loaded when the first of them asks."""

    def __init__(
        self, lang_dir: Path | None, vocab_size: int, device: torch.device, bias: Bias | None, word_list: Path | None
    ) -> None:
        self.lang_dir, self.vocab_size, self.device, self.bias = lang_dir, vocab_size, device, bias
        self.word_list = word_list

    @functools.cached_property
    def words(self) -> list[str]:
        return read_symbols(self.lang_dir / "words.txt")

    @functools.cached_property
    def hlg(self) -> k2.Fsa:
        return load_lang_graph(self.lang_dir, "HLG.pt", self.device)

    @functools.cached_property
    def lg(self) -> k2.Fsa:
        return load_lang_graph(self.lang_dir, "LG.pt", self.device)

    @functools.cached_property
    def g(self) -> k2.Fsa:
        return load_lang_graph(self.lang_dir, "G.pt", self.device)

    @functools.cached_property
    def context(self) -> ContextGraph | None:
        if self.bias is None:
            return None
        return ContextGraph.build(self.bias.phrases, self.vocab_size, self.bias.boost).to(self.device)

    @property
    def context_options(self) -> dict[str, Any]:
        return {"context_boost": self.bias.boost, "context_phrases": len(self.bias.phrases)} if self.bias else {}


def _grid(**choices: Iterable[float]) -> tuple[Options, ...]:
    return tuple(tuple(zip(choices, values)) for values in itertools.product(*choices.values()))


def _greedy_search(needs: _Needs, weights: Weights) -> Method:
    return Method("greedy_search", lambda view, options: (ctc_greedy_search(view.log_probs, view.lengths), []))


def _greedy_search_and_lexicon(needs: _Needs, weights: Weights) -> Method:
    """Each decoded word that the list lacks becomes its nearest word there, as in the authors' released decoding."""
    table = needs.lang_dir / "words.txt"
    path = needs.word_list or table
    words = read_words(path)
    if path != table and table.is_file() and not set(words) & set(read_words(table)):
        raise ValueError(
            f"{path} has no word of {table}: are they in another case, or of another language? Every word would be "
            "replaced by a stranger"
        )
    return replace(
        _greedy_search(needs, weights),
        name="greedy_search+lexicon",
        correct=NearestWords(words),
        fixed={"word_list": path.name, "word_list_words": len(words)},
    )


def _prefix_beam_search(needs: _Needs, weights: Weights) -> Method:
    def run(view: ExitView, options: Options) -> SearchResult:
        return prefix_beam_search(view.log_probs, view.lengths, context=needs.context, **dict(options)), []

    return _penalised("prefix_beam_search", run, weights, needs.context_options)


def _ctc_decoding(needs: _Needs, weights: Weights) -> Method:
    topology = ctc_topology(needs.vocab_size).to(needs.device)
    return Method("ctc-decoding", lambda view, options: ctc_decoding(view.log_probs, view.lengths, topology))


def _one_best(needs: _Needs, weights: Weights) -> Method:
    hlg, words = needs.hlg, needs.words
    return _weighted(
        "1best", lambda v, options: one_best(v.log_probs, v.lengths, hlg, words, **dict(options)), needs, weights
    )


def _nbest(needs: _Needs, weights: Weights) -> Method:
    hlg, words = needs.hlg, needs.words
    return _weighted(
        "nbest", lambda v, options: nbest(v.log_probs, v.lengths, hlg, words, **dict(options)), needs, weights
    )


def _nbest_rescoring(needs: _Needs, weights: Weights) -> Method:
    return _rescoring("nbest-rescoring", nbest_rescoring, needs, weights)


def _whole_lattice_rescoring(needs: _Needs, weights: Weights) -> Method:
    return _rescoring("whole-lattice-rescoring", whole_lattice_rescoring, needs, weights)


def _rescoring(name: str, search: Callable[..., dict[float, SearchResult]], needs: _Needs, weights: Weights) -> Method:
    """G gets the weight with which HLG made the lattice: the candidates are then those that matter."""
    hlg, words, g = needs.hlg, needs.words, needs.g

    def run(view: ExitView, options: Options) -> SearchResult:
        scale = dict(options)["hlg_scale"]
        return search(view.log_probs, view.lengths, hlg, words, g, [scale], **dict(options))[scale]

    return _weighted(name, run, needs, weights)


def _nbest_oracle(needs: _Needs, weights: Weights) -> Method:
    hlg, words = needs.hlg, needs.words

    def run(view: ExitView, options: Options) -> SearchResult:
        return nbest_oracle(view.log_probs, view.lengths, hlg, words, view.references, **dict(options))

    # alone it takes no choice, because it would choose by the references
    return replace(
        _weighted("nbest-oracle", run, needs, weights), variants=((("hlg_scale", 1.0), ("blank_penalty", 0.0)),)
    )


def _transducer_greedy_search(needs: _Needs, weights: Weights) -> Method:
    def run(view: ExitView, options: Options) -> SearchResult:
        return transducer_greedy_search(view.decoder, view.joiner, view.encoder_out, view.lengths, **dict(options)), []

    return _penalised("transducer-greedy_search", run, weights)


def _modified_beam_search(needs: _Needs, weights: Weights) -> Method:
    def run(view: ExitView, options: Options) -> SearchResult:
        transducer = (view.decoder, view.joiner, view.encoder_out, view.lengths)
        return modified_beam_search(*transducer, context=needs.context, **dict(options)), []

    return _penalised("modified_beam_search", run, weights, needs.context_options)


def _fast_beam_search(needs: _Needs, weights: Weights) -> Method:
    if needs.context is None:
        graph = trivial_graph(needs.vocab_size, needs.device)
    else:
        graph = context_graph_fsa(needs.context)
    return _fast("fast_beam_search", fast_beam_search, graph, _penalties(weights), needs.context_options)


def _fast_beam_search_nbest(needs: _Needs, weights: Weights) -> Method:
    graph = trivial_graph(needs.vocab_size, needs.device)
    return _fast("fast_beam_search_nbest", fast_beam_search_nbest, graph, _penalties(weights))


def _fast_beam_search_nbest_lg(needs: _Needs, weights: Weights) -> Method:
    variants = _grid(ngram_lm_scale=weights.ngram_lm_scales)  # costly, so that there is no choice of a penalty
    search = functools.partial(fast_beam_search_nbest_LG, words=needs.words)
    return _fast("fast_beam_search_nbest_LG", search, needs.lg, variants)


def _fast(
    name: str,
    search: Callable[..., SearchResult],
    graph: k2.Fsa,
    variants: tuple[Options, ...],
    fixed: dict[str, Any] | None = None,
) -> Method:
    def run(view: ExitView, options: Options) -> SearchResult:
        return search(view.decoder, view.joiner, view.encoder_out, view.lengths, graph=graph, **dict(options))

    return Method(name, run, variants, variants[0], fixed=fixed or {})


def _penalised(
    name: str, run: Callable[[ExitView, Options], SearchResult], weights: Weights, fixed: dict[str, Any] | None = None
) -> Method:
    return Method(name, run, _penalties(weights), (("blank_penalty", 0.0),), fixed=fixed or {})


def _weighted(name: str, run: Callable[[ExitView, Options], SearchResult], needs: _Needs, weights: Weights) -> Method:
    hlg, words = needs.hlg, needs.words
    variants = _grid(hlg_scale=weights.hlg_scales, blank_penalty=weights.blank_penalties)
    return Method(
        name,
        run,
        variants,
        (("hlg_scale", 1.0), ("blank_penalty", 0.0)),
        lattice_uncertainty=lambda v, options: one_best_with_uncertainty(
            v.log_probs, v.lengths, hlg, words, **dict(options)
        ),
    )


def _penalties(weights: Weights) -> tuple[Options, ...]:
    return _grid(blank_penalty=weights.blank_penalties)


def load_lang_graph(lang_dir: Path, name: str, device: torch.device | str = "cpu") -> k2.Fsa:
    """`lang_dir/name`, a graph of words such as HLG.pt and G.pt, on `device`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was made with another words.txt or for other tokens than those of `lang_dir`. A graph that does
        not say (those made before graphs did) is taken as it is.
    """
    path, words, tokens = lang_dir / name, lang_dir / "words.txt", lang_dir / "tokens.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: prepare.sh's graphs stage makes it; or leave the methods that need it out of --methods"
        )
    graph = load_graph(path)
    checksum = words_checksum(words)
    if getattr(graph, "words_txt", checksum) != checksum:
        raise ValueError(
            f"{path} was made with another words.txt than {words}, and would give other words; remove it and let "
            "prepare.sh's graphs stage make it again"
        )
    vocab_size = len(read_symbols(tokens))
    if getattr(graph, "vocab_size", vocab_size) != vocab_size:
        raise ValueError(
            f"{path} was made for {graph.vocab_size} tokens, {tokens} has {vocab_size}; remove the graph and let "
            "prepare.sh's graphs stage make it again"
        )
    return graph.to(device)
