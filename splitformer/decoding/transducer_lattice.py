"""A transducer's lattices: all paths through a graph of tokens that a beam keeps, for a batch at once.

At most one symbol a frame, as in Kang et al., "Fast and parallel decoding for transducer" (arXiv 2211.00484). k2's
RnntDecodingStreams keeps the paths: a state is a decoder's context with a state of the graph, and a blank stays where
it is.

**The end of an utterance.** k2 lets a path leave through a final arc of the graph in the place of its last
frame, and writes the arc into the lattice without its score. So the last frame would not be heard and the
graph's final scores not counted. Here every utterance gets one frame more, in which the blank costs nothing and all
else is impossible: that frame is what the final arc takes, and its score is added to the lattice afterwards. In that
frame there is no beam: a path that has come so far is not lost because ending costs more than going on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import k2
import torch
from torch import Tensor

from splitformer.decoding.hypothesis import check_encoder_out
from splitformer.model.decoder import Decoder
from splitformer.model.joiner import Joiner

NO_BEAM = 1e9  # nats


@dataclass(frozen=True)
class FastBeam:
    """How much RnntDecodingStreams keeps of each utterance in each frame.

    beam: states whose score (nats) is within this of the best one's. k2 cuts once more against the best score before
      the frame: a token whose own cost, with the graph's, is above the beam is never said.
    max_contexts: decoder contexts, the best ones; each costs a joiner call.
    max_states: pairs of a context and a state of the graph. A state from which the graph may end counts twice.
    """

    beam: float
    max_contexts: int
    max_states: int

    def __post_init__(self) -> None:
        if not self.beam > 0:
            raise ValueError(f"{self}: beam is above 0")
        if not 0 < self.max_contexts < self.max_states:
            raise ValueError(f"{self}: max_contexts is at least 1 and below max_states")


def search_lattices(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    beam: FastBeam,
    blank_penalty: float,
    graph_scale: float,
    words: Sequence[str] | None,
) -> tuple[k2.Fsa, list[int]]:
    """The lattices (an FsaVec) of the utterances that have one, and the indices of these utterances, in its order.

    Those have none that are without frames, and those of which no path that survived the beam ends where the graph
    may end. A path has an arc a frame, then the final one. Labels are tokens or 0; scores are nats; `arc_id` numbers
    the arcs, so that a path can be read after the lattices went through other algorithms. Arguments and errors are
    those of fast_beam_search; `graph_scale` is its ngram_lm_scale. Where no utterance has a lattice, what comes back
    with the empty list is of no use.
    """
    _check(decoder, joiner, encoder_out, lengths, graph, graph_scale, words)
    ends, order = torch.sort(lengths.cpu(), stable=True)
    utterances = order[ends > 0].tolist()
    if not utterances:
        return graph, utterances

    # The same arcs under another name: k2 hands attributes on from the graph's arcs to the lattice's.
    source = k2.Fsa(graph.arcs, properties=graph.properties)
    source.graph_scores = graph.scores.detach()
    if hasattr(graph, "aux_labels"):
        source.aux_labels = graph.aux_labels
    # Dividing all else by the scale has the same paths, and leaves a graph of millions of arcs alone.
    config = k2.RnntDecodingConfig(
        decoder.vocab_size, decoder.context_size, beam.beam / graph_scale, beam.max_states, beam.max_contexts
    )
    unpruned = k2.RnntDecodingConfig(
        decoder.vocab_size, decoder.context_size, NO_BEAM, 2 * beam.max_states, beam.max_contexts
    )
    streams = {utterance: k2.RnntDecodingStream(source) for utterance in utterances}
    encoder_projected, contexts_projected = joiner.encoder_proj(encoder_out), _ProjectedContexts(decoder, joiner)
    finished, start = [], 0
    for end in torch.unique(ends[ends > 0]).tolist():  # ascending: the shortest utterances leave first
        running = k2.RnntDecodingStreams(list(streams.values()), config)
        which = torch.tensor(list(streams), device=encoder_out.device)
        for frame in range(start, end):
            shape, contexts = running.get_contexts()
            encoded = encoder_projected[which[shape.row_ids(1).long()], frame]
            log_probs = joiner(encoded, contexts_projected(contexts)).float().log_softmax(dim=1)
            log_probs[:, 0] -= blank_penalty
            running.advance(log_probs / graph_scale)
        running.terminate_and_flush_to_streams()
        start = end

        leaving = [utterance for utterance in streams if lengths[utterance] == end]
        last = k2.RnntDecodingStreams([streams.pop(utterance) for utterance in leaving], unpruned)
        log_probs = torch.full((len(last.get_contexts()[1]), decoder.vocab_size), -torch.inf, device=graph.device)
        log_probs[:, 0] = 0.0
        last.advance(log_probs)
        last.terminate_and_flush_to_streams()
        finished.append(last.format_output([end + 1] * len(leaving), allow_partial=False))

    lattices = k2.cat(finished)
    with_final = torch.where(lattices.labels == -1, lattices.graph_scores, lattices.scores)
    lattices.scores = with_final * graph_scale
    if torch.isnan(lattices.scores).any():
        raise ValueError("the joiner's log-probabilities hold NaN: has the training diverged?")
    lattices = k2.connect(lattices)
    shape = lattices.arcs.shape()
    alive = shape.row_splits(2)[shape.row_splits(1).long()].diff().nonzero().squeeze(1)
    utterances = [utterances[i] for i in alive.tolist()]
    if utterances:
        lattices = k2.index_fsa(lattices, alive.int())
    return numbered(lattices), utterances


def numbered(lattices: k2.Fsa) -> k2.Fsa:
    """`lattices` with `arc_id`: 0, 1, 2, ..., and -1 for arcs that other algorithms add."""
    lattices.arc_id = torch.arange(lattices.num_arcs, dtype=torch.int32, device=lattices.device)
    lattices.arc_id_filler = -1
    return lattices


class _ProjectedContexts:
    """The decoder's projected output for contexts, each computed once, when it first appears."""

    def __init__(self, decoder: Decoder, joiner: Joiner) -> None:
        self._decoder, self._joiner = decoder, joiner
        self._row_of: dict[int, int] = {}
        self._rows = decoder.embedding.weight.new_empty((0, joiner.decoder_proj.out_features))
        powers = [decoder.vocab_size**k for k in range(decoder.context_size)]
        self._powers = torch.tensor(powers, device=decoder.embedding.weight.device)

    def __call__(self, contexts: Tensor) -> Tensor:
        """Tokens (K, context_size) to (K, joiner_dim)."""
        names = (contexts * self._powers).sum(dim=1).tolist()
        new: list[int] = []
        for row, name in enumerate(names):
            if name not in self._row_of:
                self._row_of[name] = len(self._row_of)
                new.append(row)
        if new:
            projected = self._joiner.decoder_proj(self._decoder(contexts[new].long()).squeeze(1))
            first, needed = len(self._row_of) - len(new), len(self._row_of)
            if needed > len(self._rows):  # doubling, so that frame after frame does not copy all rows
                self._rows = torch.cat([self._rows, projected.new_empty((needed, projected.shape[1]))])
            self._rows[first:needed] = projected
        return self._rows[[self._row_of[name] for name in names]]


def _check(
    decoder: Decoder,
    joiner: Joiner,
    encoder_out: Tensor,
    lengths: Tensor,
    graph: k2.Fsa,
    graph_scale: float,
    words: Sequence[str] | None,
) -> None:
    check_encoder_out(encoder_out, lengths, decoder, joiner)
    if graph.device != encoder_out.device:
        raise ValueError(f"the graph is on {graph.device}, encoder_out on {encoder_out.device}; move the graph once")
    if not graph_scale > 0:
        raise ValueError(f"ngram_lm_scale {graph_scale}: the weight of the graph's scores is above 0")
    if words is not None and not isinstance(getattr(graph, "aux_labels", None), k2.RaggedTensor):
        raise ValueError("words are given, but the graph writes none: use an LG (compile_lg), or leave words out")
    # k2 checks none of what follows: it reads beyond the scores, or mixes up contexts
    made_for = getattr(graph, "vocab_size", int(graph.labels.max()) + 1)
    if made_for != decoder.vocab_size:
        raise ValueError(
            f"the graph was made for {made_for} tokens, the decoder has {decoder.vocab_size}: make the graph again "
            "from the lang_dir that the model was trained with"
        )
    if (graph.labels == 0).any():
        raise ValueError("the graph has epsilons; the search would take them for blanks: use k2.remove_epsilon")
    if decoder.vocab_size**decoder.context_size * graph.shape[0] >= 2**63:
        raise ValueError(
            f"{decoder.vocab_size} tokens, contexts of {decoder.context_size} and a graph of {graph.shape[0]} states: "
            "k2 numbers their combinations in 63 bits; take a smaller graph"
        )
