"""Decode a set of cuts at every exit, with several searches, in one pass over the audio."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from splitformer.data.datamodule import Batch
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.ctc import ctc_decoding, one_best
from splitformer.decoding.graphs import ctc_topology, load_graph
from splitformer.decoding.lang import read_symbols
from splitformer.greedy import ctc_greedy_search
from splitformer.model.asr import AsrModel

METHODS = ("greedy_search", "ctc-decoding", "1best")

Search = Callable[[Tensor, Tensor], tuple[list[list[str]], list[int]]]
"""(N, T', V) log-probabilities and (N,) lengths to the words of N utterances and the indices of those that had an
empty lattice and fell back to greedy search."""


def greedy_search(tokenizer: Tokenizer) -> Search:
    """The best token in each frame."""

    def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
        return [tokenizer.decode(h.tokens).split() for h in ctc_greedy_search(log_probs, lengths)], []

    return search


def ctc_topology_search(tokenizer: Tokenizer, device: torch.device) -> Search:
    """`ctc-decoding`: the best path through the k2 CTC topology."""
    topology = ctc_topology(tokenizer.vocab_size).to(device)

    def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
        hypotheses, fallen_back = ctc_decoding(log_probs, lengths, topology)
        return [tokenizer.decode(h.tokens).split() for h in hypotheses], fallen_back

    return search


def one_best_searches(
    lang_dir: Path, tokenizer: Tokenizer, device: torch.device, hlg_scales: Iterable[float]
) -> dict[float, Search]:
    """`1best`: the best path through HLG, one search for each weight of the graph's scores."""
    hlg = load_graph(lang_dir / "HLG.pt").to(device)
    words = read_symbols(lang_dir / "words.txt")

    def weighted(hlg_scale: float) -> Search:
        def search(log_probs: Tensor, lengths: Tensor) -> tuple[list[list[str]], list[int]]:
            return one_best(
                log_probs, lengths, hlg, words, lambda ids: tokenizer.decode(ids).split(), hlg_scale=hlg_scale
            )

        return search

    return {hlg_scale: weighted(hlg_scale) for hlg_scale in hlg_scales}


@dataclass
class Decoded:
    """What one search found at one exit."""

    results: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(cut id, reference words, decoded words)"""
    fallbacks: int = 0
    seconds: float = 0.0
    """front end, encoder up to this exit, its head and the search"""
    audio_seconds: float = 0.0


@torch.inference_mode()
def decode_cuts(
    model: AsrModel, batches: Iterable[Batch], searches: Mapping[Hashable, Search], device: torch.device
) -> dict[tuple[int, Hashable], Decoded]:
    """{(exit layer, key of the search): what it found}; every batch passes the encoder once.

    The time of an exit leaves out other exits' heads and other searches.
    """
    decoded: dict[tuple[int, Hashable], Decoded] = {}
    for batch in (b.to(device) for b in batches):
        references = [text.split() for text in batch.texts]
        encoder_seconds = 0.0
        exits = model.encoder(batch.x, batch.x_lens)
        while True:
            exit_output, seconds = _timed(device, lambda exits=exits: next(exits, None))
            if exit_output is None:
                break
            encoder_seconds += seconds
            log_probs, head_seconds = _timed(device, lambda out=exit_output: model.ctc_log_probs(out))
            for key, search in searches.items():
                (words, fallen_back), search_seconds = _timed(
                    device, lambda s=search, p=log_probs, out=exit_output: s(p, out.lengths)
                )
                entry = decoded.setdefault((exit_output.layer, key), Decoded())
                entry.results += zip(batch.cut_ids, references, words, strict=True)
                entry.fallbacks += len(fallen_back)
                entry.seconds += encoder_seconds + head_seconds + search_seconds
                entry.audio_seconds += batch.seconds
    return decoded


def _timed(device: torch.device, call: Callable) -> tuple:
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started
