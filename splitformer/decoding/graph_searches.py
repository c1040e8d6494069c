"""Search methods that read graphs with k2; see searches.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import k2

from splitformer.decoding.ctc import HLG_BEAM, NBEST_BEAM, ctc_lattice, hlg_lattice
from splitformer.decoding.fast_beam import LG_BEAM, transducer_lattice
from splitformer.decoding.graphs import context_graph_fsa, ctc_topology, load_lang_graph, trivial_graph, with_end_symbol
from splitformer.decoding.hypothesis import SearchResult, UncertainResult
from splitformer.decoding.lang import lang_file, read_symbols
from splitformer.decoding.lattice import Lattice
from splitformer.decoding.methods import METHODS
from splitformer.decoding.nbest import (
    most_probable,
    nbest,
    nbest_rescoring,
    one_best_with_uncertainty,
    whole_lattice_rescoring,
)
from splitformer.decoding.searches import ExitView, Method, Options, Resources, grid


class GraphSearches:
    """Makes search methods; the words and graphs that they share are loaded once, for the first that reads them."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources

    @functools.cached_property
    def _words(self) -> list[str]:
        return read_symbols(lang_file(self._resources.lang_dir, "words.txt"))

    @functools.cached_property
    def _hlg(self) -> k2.Fsa:
        return self._graph("HLG.pt")

    @functools.cached_property
    def _g(self) -> k2.Fsa:
        return self._graph("G.pt")

    def _graph(self, name: str) -> k2.Fsa:
        return load_lang_graph(self._resources.lang_dir, name, self._resources.device)

    def make(self, name: str) -> Method:
        """Return the method of this name."""
        if name == "ctc-decoding":
            topology = ctc_topology(self._resources.vocab_size).to(self._resources.device)
            return Method(name, lambda view, options: ctc_lattice(*view.ctc, topology).one_best())
        if "HLG.pt" in METHODS[name].graphs:
            return self._of_hlg(name)
        return self._of_transducer(name)

    def _of_hlg(self, name: str) -> Method:
        make_lattice: Callable[..., Lattice] = functools.partial(hlg_lattice, hlg=self._hlg, words=self._words)
        g = self._g if "G.pt" in METHODS[name].graphs else None

        def search(view: ExitView, lattice: Lattice) -> SearchResult:
            if name == "nbest":
                return nbest(lattice)
            if name == "nbest-oracle":
                return nbest(lattice, references=view.references)
            # G is weighted as HLG was in this lattice, which was pruned with that weight
            if name == "nbest-rescoring":
                return nbest_rescoring(lattice, g, lattice.scale)
            if name == "whole-lattice-rescoring":
                return whole_lattice_rescoring(lattice, g, lattice.scale)
            return lattice.one_best()

        def run(view: ExitView, options: Options) -> SearchResult:
            beam = HLG_BEAM if name == "1best" else NBEST_BEAM
            return search(view, make_lattice(*view.ctc, beam=beam, **dict(options)))

        def run_with_uncertainty(view: ExitView, options: Options) -> UncertainResult:
            lattice = make_lattice(*view.ctc, beam=NBEST_BEAM, **dict(options))
            result = one_best_with_uncertainty(lattice)
            return result if name == "1best" else UncertainResult(*search(view, lattice), result.uncertainty)

        weights = self._resources.weights
        default: Options = (("hlg_scale", 1.0), ("blank_penalty", 0.0))
        variants = grid(hlg_scale=weights.hlg_scales, blank_penalty=weights.blank_penalties)
        if name == "nbest-oracle":  # tuning it would use the references
            variants = (default,)
        return Method(name, run, variants, default, lattice_uncertainty=run_with_uncertainty)

    def _of_transducer(self, name: str) -> Method:
        resources = self._resources
        make_lattice: Callable[..., Lattice] = transducer_lattice
        recorded: dict[str, Any] = {}
        variants = resources.penalties
        if name == "fast_beam_search_nbest_LG":
            graph = with_end_symbol(self._graph("LG.pt"))
            make_lattice = functools.partial(transducer_lattice, words=self._words, beam=LG_BEAM)
            variants = grid(ngram_lm_scale=resources.weights.ngram_lm_scales)  # no penalties: too slow
        elif name == "fast_beam_search" and resources.context is not None:
            graph, recorded = context_graph_fsa(resources.context), resources.context_record
        else:
            graph = trivial_graph(resources.vocab_size, resources.device)

        def run(view: ExitView, options: Options) -> SearchResult:
            lattice = make_lattice(*view.transducer, graph, **dict(options))
            return lattice.one_best() if name == "fast_beam_search" else most_probable(lattice)

        return Method(name, run, variants, variants[0], recorded=recorded)
