"""Search methods with their resources: `make_methods` makes them from their names.

`method.run(view, options)` searches one batch at one exit. Options change the result, such as the weight of a language
model or a blank penalty; `variants` lists those that are tried on the tune set.

The methods in this module do not need k2. Those that search graphs are in graph_searches.py and need k2.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitformer.decoding.context import ContextGraph
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis, SearchResult, UncertainResult
from splitformer.decoding.lang import lang_file
from splitformer.decoding.methods import METHODS, Head
from splitformer.decoding.modified_beam import modified_beam_search
from splitformer.decoding.prefix_beam import prefix_beam_search, prefix_beam_uncertainty
from splitformer.decoding.word_list import NearestWords, read_words
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.decoder import Decoder
from splitformer.model.encoder import ExitOutput
from splitformer.model.joiner import Joiner

Options = tuple[tuple[str, float], ...]
"""(name, value) pairs, which are hashable"""


class ExitView(NamedTuple):
    """One batch at one exit, the input of a search."""

    lengths: Tensor
    """(N,) output frames"""
    log_probs: Tensor | None
    """(N, T', V) of the CTC head; None without one"""
    encoder_out: Tensor
    """(N, T', D)"""
    decoder: Decoder | None
    joiner: Joiner | None
    """of this exit; None, like the decoder, without a transducer"""
    references: list[list[str]]
    """words of the utterances, for nbest-oracle alone"""

    @property
    def ctc(self) -> tuple[Tensor, Tensor]:
        """The arguments of a CTC search."""
        if self.log_probs is None:
            raise ValueError("the model has no CTC head")
        return self.log_probs, self.lengths

    @property
    def transducer(self) -> tuple[Decoder, Joiner, Tensor, Tensor]:
        """The arguments of a transducer search."""
        if self.decoder is None or self.joiner is None:
            raise ValueError("the model has no transducer head")
        return self.decoder, self.joiner, self.encoder_out, self.lengths


def exit_view(model: AsrModel, exit_output: ExitOutput, log_probs: Tensor | None) -> ExitView:
    """Return what a search reads of one exit, without references."""
    transducer = "transducer" in model.heads
    return ExitView(
        exit_output.lengths,
        log_probs,
        exit_output.encoder_out,
        model.decoder if transducer else None,
        model.joiner(exit_output.layer) if transducer else None,
        [],
    )


@dataclass(frozen=True)
class Method:
    """A search method.

    variants: options to choose from on the tune set, unless the method follows another one.
    default: options where nothing is chosen.
    follows: the method whose options this one takes.
    recorded: other settings, for the record of a result.
    correct: corrects the words of an utterance after the search.
    lattice_uncertainty: run_with_uncertainty of methods that read HLG's lattice.
    """

    name: str
    run: Callable[[ExitView, Options], SearchResult]
    variants: tuple[Options, ...] = ((),)
    default: Options = ()
    follows: str | None = None
    recorded: dict[str, Any] = field(default_factory=dict)
    correct: Callable[[list[str]], list[str]] | None = None
    lattice_uncertainty: Callable[[ExitView, Options], UncertainResult] | None = None

    @property
    def head(self) -> Head:
        return METHODS[self.name].head

    def run_with_uncertainty(self, view: ExitView, options: Options) -> UncertainResult:
        """Return the result of `run` with its uncertainty: minus the log of the n-best posterior (arXiv 2309.09546).

        The n-best list is that of HLG's lattice if the method reads it, otherwise the beam of CTC's prefix search.
        """
        if self.lattice_uncertainty is not None:
            return self.lattice_uncertainty(view, options)
        if view.log_probs is None:
            raise UserError(f"{self.name}: n-best posteriors are of the CTC head, which this model lacks")
        return UncertainResult(*self.run(view, options), prefix_beam_uncertainty(view.log_probs, view.lengths))


class Weights(NamedTuple):
    """Values to choose from on the tune set."""

    hlg_scales: Sequence[float] = (0.3, 0.5, 0.7, 1.0, 1.4)
    """of the language model relative to CTC's log-probabilities"""
    ngram_lm_scales: Sequence[float] = (0.1, 0.2, 0.35, 0.5)
    """of the language model relative to the transducer's internal LM"""
    blank_penalties: Sequence[float] = (0.0, 1.0, 2.0)
    """nats; with equal results, the value nearest to 0 is chosen"""


NOT_TUNED = Weights((1.0,), Weights().ngram_lm_scales[:1], (0.0,))
"""without a tune set"""


@dataclass(frozen=True)
class HotWords:
    """Phrases to favour, as token ids, and the bonus (nats) for each of their tokens."""

    phrases: Sequence[Sequence[int]]
    boost: float


@dataclass(frozen=True)
class Resources:
    """The arguments of make_methods."""

    lang_dir: Path
    vocab_size: int
    device: torch.device
    weights: Weights
    hot_words: HotWords | None
    word_list: Path | None

    @functools.cached_property
    def context(self) -> ContextGraph | None:
        if self.hot_words is None:
            return None
        return ContextGraph.build(self.hot_words.phrases, self.vocab_size, self.hot_words.boost).to(self.device)

    @property
    def context_record(self) -> dict[str, Any]:
        hot = self.hot_words
        return {"context_boost": hot.boost, "context_phrases": len(hot.phrases)} if hot else {}

    @property
    def penalties(self) -> tuple[Options, ...]:
        return grid(blank_penalty=self.weights.blank_penalties)


def grid(**choices: Iterable[float]) -> tuple[Options, ...]:
    """Return all combinations of the values of options."""
    return tuple(tuple(zip(choices, values)) for values in itertools.product(*choices.values()))


def make_methods(
    names: Iterable[str],
    lang_dir: Path | None,
    vocab_size: int,
    device: torch.device,
    weights: Weights = Weights(),  # noqa: B008  immutable
    hot_words: HotWords | None = None,
    word_list: Path | None = None,
) -> list[Method]:
    """Return the methods of these names. What they read of `lang_dir` is loaded once.

    Args:
      lang_dir: may be None for methods that read no words.
      hot_words: for prefix_beam_search, modified_beam_search and fast_beam_search; the others ignore them.
      word_list: of greedy_search+lexicon (default: words.txt of `lang_dir`).
    Raises:
      UserError: a method needs k2 and it is not installed, or a graph is missing or does not fit.
    """
    names = list(names)
    if lang_dir is None and (missing := [name for name in names if METHODS[name].words]):
        raise UserError(f"{', '.join(missing)}: give the lang_dir with words and graphs (--lang-dir)")
    resources = Resources(lang_dir or Path(), vocab_size, device, weights, hot_words, word_list)
    graph_searches = _graph_searches([name for name in names if name not in _SEARCHES], resources)
    methods = [_method(name, resources) if name in _SEARCHES else graph_searches.make(name) for name in names]
    leaders = [next((each for each in METHODS[name].follows if each in names), None) for name in names]
    return [replace(method, follows=leader) for method, leader in zip(methods, leaders)]


def make_method(name: str, lang_dir: Path | None, vocab_size: int, device: torch.device) -> Method:
    """Return one method, for options that are already chosen."""
    return make_methods([name], lang_dir, vocab_size, device)[0]


def _graph_searches(names: Sequence[str], resources: Resources) -> Any:
    """Return GraphSearches if there are `names` of methods that need k2."""
    if not names:
        return None
    try:
        from splitformer.decoding.graph_searches import GraphSearches
    except ModuleNotFoundError as error:
        if error.name != "k2":
            raise
        raise UserError(
            f"{', '.join(names)}: this search needs k2, which is not installed; install it with ./setup.sh, or choose "
            f"among {', '.join(_SEARCHES)}"
        ) from error
    return GraphSearches(resources)


_SEARCHES: dict[str, Callable[..., list[Hypothesis]]] = {
    "greedy_search": ctc_greedy_search,
    "greedy_search+lexicon": ctc_greedy_search,
    "prefix_beam_search": prefix_beam_search,
    "transducer-greedy_search": transducer_greedy_search,
    "modified_beam_search": modified_beam_search,
}
"""methods that need no k2"""


def _method(name: str, resources: Resources) -> Method:
    search = _SEARCHES[name]
    biased = {"context": resources.context} if name in ("prefix_beam_search", "modified_beam_search") else {}

    def run(view: ExitView, options: Options) -> SearchResult:
        arguments = view.ctc if METHODS[name].head == "ctc" else view.transducer
        return SearchResult(search(*arguments, **biased, **dict(options)), [])

    if name == "greedy_search":
        return Method(name, run)
    if name == "greedy_search+lexicon":
        path = resources.word_list or lang_file(resources.lang_dir, "words.txt")
        words, table = read_words(path), resources.lang_dir / "words.txt"
        if table.is_file() and not set(words) & set(read_words(table)):
            raise UserError(f"{path} has no word of {table}: are they in different cases, or of different languages?")
        recorded = {"word_list": path.name, "word_list_words": len(words)}
        return Method(name, run, correct=NearestWords(words), recorded=recorded)
    recorded = resources.context_record if biased else {}
    return Method(name, run, resources.penalties, (("blank_penalty", 0.0),), recorded=recorded)
