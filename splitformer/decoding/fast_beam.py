"""Lattices of a transducer, by k2: the paths through a graph of tokens that a beam keeps, for a batch at once.

After Kang et al., "Fast and parallel decoding for transducer" (arXiv 2211.00484), with at most one symbol per frame.
k2's RnntDecodingStreams keeps the paths. A state is a decoder context together with a state of the graph; a blank stays
in the same state. `Lattice.one_best` of such a lattice is icefall's fast_beam_search, `most_probable` its n-best forms.

**The end of an utterance.** k2 lets a path take a final arc of the graph in any frame, and writes that arc into the
lattice without its score. So the graph ends with a symbol of its own (`with_end_symbol`), which is impossible in the
frames of the utterance. Two more frames follow: in the first, only the end symbol is possible, with score 0; in the
second, only the blank, and the final arc takes its place. There is no beam in these frames, so that a path is not lost
because ending costs more than continuing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import k2
import torch
from torch import Tensor
from torch.nn.functional import pad

from splitformer.decoding.greedy import transducer_greedy_search
from splitformer.decoding.hypothesis import Hypothesis, check_encoder_out
from splitformer.decoding.lattice import Lattice, check_graph, number_arcs
from splitformer.errors import UserError
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner


@dataclass(frozen=True)
class FastBeam:
    """The beam of RnntDecodingStreams, for each utterance and frame.

    beam: keep states whose score (nats) is within this of the best one. k2 also prunes against the best score before
      the frame: a token whose own cost, with the graph's, exceeds the beam is never emitted.
    max_contexts: decoder contexts, the best ones; each costs a joiner call.
    max_states: pairs of a context and a state of the graph. A state from which the graph may end counts twice.
    """

    beam: float
    max_contexts: int
    max_states: int


NO_BEAM = 1e9  # nats
# Measured once, at commit 9b245cc (one core, 16 utterances, 30 tokens, untrained joiners). The number of contexts
# limits the search, not the beam: 10 and 30 nats give the same as 20. Without a lexicon, 8 contexts take 2 to 4 times
# as long as one joiner call per frame and lose 0.03 to 0.6 nats per utterance against 64; 32 lose nothing in
# 6 to 9 times as long.
FAST_BEAM = FastBeam(beam=20.0, max_contexts=8, max_states=64)
# With LG a word's score comes late, and its context must survive until then. Measured once, at commit 9b245cc (1000
# words, 3-gram, noisy frames): 8 contexts had a WER of 63 %, 32 of 9 %, 64 of 8 %, in 0.2, 0.4 and 1.0 s.
LG_BEAM = FastBeam(beam=20.0, max_contexts=32, max_states=256)


@torch.no_grad()
def transducer_lattice(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    words: Sequence[str] | None = None,
    blank_penalty: float = 0.0,
    ngram_lm_scale: float = 1.0,
    beam: FastBeam = FAST_BEAM,
) -> Lattice:
    """Return the lattices of a batch, of the utterances whose lattice is not empty.

    Args:
      decoder, joiner, encoder_out, lengths, blank_penalty: as for transducer_greedy_search.
      graph: over tokens, without blanks or epsilons, with an end symbol: trivial_graph, context_graph_fsa, or
        with_end_symbol of compile_lg (with LG_BEAM). It is not modified.
      words: the symbols of words.txt (read_symbols), for a graph that writes words.
      ngram_lm_scale: weight of the graph's scores relative to the joiner's log-probabilities.
    Raises:
      ValueError: shapes, lengths, device or the vocabulary of the graph do not fit, or there are NaN.
    """
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    check_graph(graph, encoder_out, decoder.vocab_size)
    if not ngram_lm_scale > 0:
        raise UserError(f"ngram_lm_scale {ngram_lm_scale}: the weight of the language model must be above 0")
    if words is not None and not isinstance(getattr(graph, "aux_labels", None), k2.RaggedTensor):
        raise ValueError("words are given, but the graph writes none: use an LG (compile_lg), or leave words out")
    if not hasattr(graph, "end_symbol"):
        raise ValueError("the graph has no end symbol, and its final scores would be lost: use with_end_symbol")
    if (graph.labels == 0).any():
        raise ValueError("the graph has epsilons, which the search would take for blanks: use k2.remove_epsilon")

    def greedy(utterances: Tensor) -> list[Hypothesis]:
        frames, ends = encoder_out[utterances.to(encoder_out.device)], lengths[utterances.to(lengths.device)]
        return transducer_greedy_search(decoder, joiner, frames, ends, blank_penalty)

    ends, order = torch.sort(lengths.cpu(), stable=True)
    order, ends = order[ends > 0], ends[ends > 0]
    if len(order) == 0:
        return Lattice(None, [], lengths, greedy)
    encoder_projected = joiner.encoder_proj(encoder_out)[order.to(encoder_out.device)]
    search = _Search(decoder, joiner, encoder_projected, blank_penalty, ngram_lm_scale, beam)
    fsas = _in_nats(search.run(graph, ends), ngram_lm_scale, graph.end_symbol)
    shape = fsas.arcs.shape()
    alive = shape.row_splits(2)[shape.row_splits(1).long()].diff().nonzero().squeeze(1)
    fsas = number_arcs(k2.index_fsa(fsas, alive.int())) if len(alive) else None
    return Lattice(fsas, order[alive.cpu()].tolist(), lengths, greedy, words, tokens="labels")


@dataclass
class _Search:
    """Beam search of utterances that are sorted by length."""

    decoder: Decoder
    joiner: Joiner
    encoder_projected: Tensor
    blank_penalty: float
    graph_scale: float
    beam: FastBeam

    def run(self, graph: k2.Fsa, lengths: Tensor) -> k2.Fsa:
        """Return the lattices; lengths (N,) are ascending."""
        project = _ProjectedContexts(self.decoder, self.joiner)
        streams = [k2.RnntDecodingStream(graph) for _ in lengths]
        finished, start = [], 0
        for end, count in zip(*(each.tolist() for each in torch.unique(lengths, return_counts=True))):
            self._advance(streams, start, end, project)
            finished.append(self._finish(streams[:count], end))  # the shortest utterances end first
            streams, start = streams[count:], end
        return k2.cat(finished)

    def _advance(self, streams: list[k2.RnntDecodingStream], start: int, end: int, project: _ProjectedContexts) -> None:
        """Search the frames start..end - 1 of the last utterances, which have these streams."""
        # Dividing everything else by the scale has the same paths, and does not copy a graph of millions of arcs.
        running = k2.RnntDecodingStreams(streams, self._config(self.beam.beam / self.graph_scale, self.beam.max_states))
        first = len(self.encoder_projected) - len(streams)
        for frame in range(start, end):
            shape, contexts = running.get_contexts()
            encoded = self.encoder_projected[first + shape.row_ids(1).long(), frame]
            log_probs = self.joiner(encoded, project(contexts)).float().log_softmax(dim=1)
            log_probs[:, 0] -= self.blank_penalty
            running.advance(pad(log_probs / self.graph_scale, (0, 1), value=-torch.inf))
        running.terminate_and_flush_to_streams()

    def _finish(self, streams: list[k2.RnntDecodingStream], length: int) -> k2.Fsa:
        """Search the two additional frames of utterances of `length` frames, and return their lattices."""
        ending = k2.RnntDecodingStreams(streams, self._config(NO_BEAM, 2 * self.beam.max_states))
        for symbol in (self.decoder.vocab_size, 0):
            contexts = ending.get_contexts()[1]
            log_probs = torch.full((len(contexts), self.decoder.vocab_size + 1), -torch.inf, device=contexts.device)
            log_probs[:, symbol] = 0.0
            ending.advance(log_probs)
        ending.terminate_and_flush_to_streams()
        return ending.format_output([length + 2] * len(streams), allow_partial=False)

    def _config(self, beam: float, max_states: int) -> k2.RnntDecodingConfig:
        sizes = self.decoder.vocab_size + 1, self.decoder.context_size  # with the end symbol
        return k2.RnntDecodingConfig(*sizes, beam, max_states, self.beam.max_contexts)


def _in_nats(fsas: k2.Fsa, graph_scale: float, end_symbol: int) -> k2.Fsa:
    """Return the lattices with scores in nats, and a blank in place of the end symbol."""
    fsas.scores = fsas.scores * graph_scale
    if torch.isnan(fsas.scores).any():
        raise UserError("the joiner's log-probabilities hold NaN: has the training diverged?")
    fsas.labels = torch.where(fsas.labels == end_symbol, 0, fsas.labels)
    return k2.connect(fsas)


class _ProjectedContexts:
    """The decoder's projected output for contexts, computed for each when it first appears."""

    def __init__(self, decoder: Decoder, joiner: Joiner) -> None:
        self._decoder, self._joiner = decoder, joiner
        self._row_of: dict[int, int] = {}
        self._rows = decoder.embedding.weight.new_empty((0, joiner.decoder_proj.out_features))
        powers = [decoder.vocab_size**k for k in range(decoder.context_size)]
        self._powers = torch.tensor(powers, device=decoder.embedding.weight.device)

    def __call__(self, contexts: Tensor) -> Tensor:
        """Return (K, joiner_dim) for tokens (K, context_size)."""
        keys = (contexts * self._powers).sum(dim=1).tolist()
        new: list[int] = []
        for row, key in enumerate(keys):
            if key not in self._row_of:
                self._row_of[key] = len(self._row_of)
                new.append(row)
        if new:
            # NaN, which are reported when the search ends, let k2 take the end symbol
            tokens = contexts[new].long().clamp(max=self._decoder.vocab_size - 1)
            projected = self._joiner.decoder_proj(self._decoder(tokens).squeeze(1))
            first, needed = len(self._row_of) - len(new), len(self._row_of)
            if needed > len(self._rows):  # doubling avoids copying all rows in every frame
                self._rows = torch.cat([self._rows, projected.new_empty((needed, projected.shape[1]))])
            self._rows[first:needed] = projected
        return self._rows[[self._row_of[key] for key in keys]]
