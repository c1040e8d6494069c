"""Decode test sets at every exit and write the words, the errors and one JSON record per exit and method.

    python -m splitformer.bin.decode --checkpoint EXP/averaged.pt --cuts dev=CUTS test=CUTS --lang-dir LANG \
        --methods greedy_search ctc-decoding 1best --tune-set dev --output-dir EXP/decode --corpus NAME

The model is rebuilt from the checkpoint alone. The weights of `1best` (of the language model, and a
penalty on blanks) are chosen for each exit on the --tune-set, which is decoded first; no other set has a say.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from splitformer.checkpoint import CheckpointError, load_model
from splitformer.config import ConfigError
from splitformer.data.datamodule import Batch, evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.searches import (
    METHODS,
    OneBestWeights,
    Search,
    ctc_topology_search,
    greedy_search,
    one_best_searches,
)
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity
from splitformer.results import DecodeRecord, command_line, git_commit
from splitformer.scoring import score, write_errs, write_recogs

log = logging.getLogger(__name__)
HLG_SCALES = (0.3, 0.5, 0.7, 1.0, 1.4)
BLANK_PENALTIES = (0.0, 1.0, 2.0)
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt of bin/average, or an epoch")
    parser.add_argument("--cuts", nargs="+", required=True, metavar="NAME=PATH", help="the sets to decode")
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tune-set", metavar="NAME", help="the set on which 1best's weights are chosen, of --cuts")
    parser.add_argument(
        "--hlg-scales", type=float, nargs="+", default=HLG_SCALES, help="LM weights to choose from (1: as trained)"
    )
    parser.add_argument(
        "--blank-penalties", type=float, nargs="+", default=BLANK_PENALTIES, help="nats, to choose from (0: none)"
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--corpus", required=True, help="the name that the records carry")
    parser.add_argument("--system", help="likewise (default: the exp_dir's name, less its -seedN)")
    parser.add_argument("--max-duration", type=float, default=60.0, help="seconds of audio in a batch")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        decode(args)
    except (CheckpointError, ConfigError, FileNotFoundError, ValueError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 1
    return 0


def decode(args: argparse.Namespace) -> None:
    """Decode every set of `args.cuts`, the tune set first, and write what was found."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, checkpoint = load_model(args.checkpoint, device)
    tokenizer = Tokenizer(args.lang_dir)
    if tokenizer.tokens != checkpoint["tokens"]:
        raise ValueError(
            f"{args.checkpoint} was trained with other tokens than those of {args.lang_dir} ({tokenizer.vocab_size} of "
            f"them, {config.model.vocab_size} in training): give the lang_dir of the training"
        )
    sets = dict(_named_path(item) for item in args.cuts)
    if args.tune_set and args.tune_set not in sets:
        raise ValueError(f"--tune-set {args.tune_set} is not among --cuts: {', '.join(sets)}")
    searches: dict[Hashable, Search] = {}

    def spell(tokens: list[int]) -> list[str]:
        return tokenizer.decode(tokens).split()

    if "greedy_search" in args.methods:
        searches["greedy_search"] = greedy_search
    if "ctc-decoding" in args.methods:
        searches["ctc-decoding"] = ctc_topology_search(tokenizer.vocab_size, device)
    if "1best" in args.methods:
        weights = [OneBestWeights()]
        if args.tune_set:
            weights = list(itertools.starmap(OneBestWeights, itertools.product(args.hlg_scales, args.blank_penalties)))
        searches |= one_best_searches(args.lang_dir, device, weights)

    costs = complexity(model.encoder, model.ctc_heads, config.model.num_mel_bins)
    chosen = dict.fromkeys(config.model.exit_layers, OneBestWeights())
    for name in sorted(sets, key=lambda name: name != args.tune_set):
        batches = evaluation_batches(load_cuts([sets[name]]), tokenizer, args.max_duration)
        bar = tqdm(batches, desc=f"decoding {name}", unit="batch", disable=None, leave=False)
        needed = searches if name == args.tune_set else _only(searches, set(chosen.values()))
        decoded = decode_cuts(model, bar, needed, spell, device)
        if name == args.tune_set:
            chosen |= _choose_weights(decoded)
        for (layer, key), found in decoded.items():
            method, options = str(key), {"max_duration": args.max_duration}
            if isinstance(key, OneBestWeights):
                if key != chosen[layer]:
                    continue
                method = "1best"
                options |= {**key._asdict(), "tuned_on": args.tune_set}
            scored = score(found.results)
            record = DecodeRecord(
                corpus=args.corpus,
                system=args.system or args.checkpoint.resolve().parent.name.rsplit("-seed", 1)[0],
                seed=checkpoint["seed"],
                test_set=name,
                exit_layer=layer,
                num_layers=config.model.num_layers,
                method=method,
                wer=scored.wer,
                errors=scored.errors,
                insertions=scored.insertions,
                deletions=scored.deletions,
                substitutions=scored.substitutions,
                ref_words=scored.ref_words,
                num_utterances=len(found.results),
                fallback_utterances=found.fallbacks,
                audio_seconds=found.audio_seconds,
                rtf=found.seconds / found.audio_seconds,
                parameters=costs[layer].parameters,
                macs_per_second=costs[layer].macs_per_second,
                epoch=checkpoint.get("epoch", checkpoint["progress"]["epoch"]),
                avg=checkpoint.get("avg", 0),
                training_seconds=checkpoint["progress"]["seconds"],
                world_size=checkpoint["world_size"],
                device=checkpoint["device"],
                config=config.to_dict() | {"decoding": options},
                commit=git_commit(ROOT),
                command=command_line(ROOT),
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            )
            stem = f"{name}-exit-{layer:02d}-{method}"
            write_recogs(args.output_dir / f"recogs-{stem}.txt", scored)
            write_errs(args.output_dir / f"errs-{stem}.txt", scored)
            record.save(args.output_dir / f"{stem}.json")
            lost = f", {found.fallbacks} empty lattices decoded greedily" if found.fallbacks else ""
            log.info(
                "%s exit %d %s: WER %.2f %% of %d words%s", name, layer, method, scored.wer, scored.ref_words, lost
            )


@dataclass
class Decoded:
    """What one search found at one exit."""

    results: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(cut id, reference words, decoded words)"""
    fallbacks: int = 0
    seconds: float = 0.0
    """front end, encoder up to this exit, its head and the search"""
    audio_seconds: float = 0.0


@torch.no_grad()  # not inference_mode: k2 asks tensors for their version
def decode_cuts(
    model: AsrModel,
    batches: Iterable[Batch],
    searches: Mapping[Hashable, Search],
    spell: Callable[[list[int]], list[str]],
    device: torch.device,
) -> dict[tuple[int, Hashable], Decoded]:
    """{(exit layer, key of the search): what it found}; every batch passes the encoder once.

    `spell` makes words of token ids, for hypotheses without words. The time of an exit leaves out other exits'
    heads and other searches.
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
                (hypotheses, fallen_back), search_seconds = _timed(
                    device, lambda s=search, p=log_probs, out=exit_output: s(p, out.lengths)
                )
                words = [h.words if h.words is not None else spell(h.tokens) for h in hypotheses]
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


def _named_path(item: str) -> tuple[str, Path]:
    name, equals, path = item.partition("=")
    if not equals or not name or not path:
        raise ValueError(f"--cuts {item!r}: expected NAME=PATH")
    return name, Path(path)


def _only(searches: dict[Hashable, Search], weights: set[OneBestWeights]) -> dict[Hashable, Search]:
    return {key: s for key, s in searches.items() if not isinstance(key, OneBestWeights) or key in weights}


def _choose_weights(decoded: dict[tuple[int, Hashable], Decoded]) -> dict[int, OneBestWeights]:
    """For each exit the weights with the fewest errors; of equals those nearest to none at all."""
    best: dict[int, tuple[int, float, OneBestWeights]] = {}
    for (layer, key), found in decoded.items():
        if isinstance(key, OneBestWeights):
            distance = abs(key.hlg_scale - 1.0) + key.blank_penalty
            candidate = (score(found.results).errors, distance, key)
            best[layer] = min(best.get(layer, candidate), candidate)
    return {layer: weights for layer, (_, _, weights) in best.items()}


if __name__ == "__main__":
    sys.exit(main())
