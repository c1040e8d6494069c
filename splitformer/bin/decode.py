"""Decode test sets at every exit and write the words, the errors and one JSON record per exit and method.

    python -m splitformer.bin.decode --checkpoint EXP/averaged.pt --cuts dev=CUTS test=CUTS --lang-dir LANG \
        --tune-set dev --output-dir EXP/decode --corpus NAME [--methods greedy_search 1best ...]

The model is rebuilt from the checkpoint alone. The options of a method (weights of the language model, a penalty on
blanks) are chosen for each exit on the --tune-set, which is decoded first; no other set has a say.

With --exit-policy EXP/policy.json, of bin/calibrate, each utterance leaves at the exit that the policy says, the layers
above are not run for it, and there is one record a set.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from splitformer.checkpoint import CheckpointError, checkpoint_id
from splitformer.config import ConfigError
from splitformer.data.batches import Batch, evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.hypothesis import Hypothesis
from splitformer.decoding.loading import (
    check_features,
    load_for_decoding,
    make_method,
    named_sets,
    speakers_of,
    system_name,
    timed,
)
from splitformer.decoding.searches import (
    METHODS,
    Bias,
    Method,
    Options,
    Weights,
    default_methods,
    make_methods,
)
from splitformer.early_exit.policies import FittedPolicy
from splitformer.early_exit.search import EarlyResult, exit_view, search_early
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import ExitCost, complexity, transducer_heads
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import DecodeRecord, EarlyExitRecord
from splitformer.scoring import score, write_errs, write_recogs

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt of bin/average, or an epoch")
    parser.add_argument("--cuts", nargs="+", required=True, metavar="NAME=PATH", help="the sets to decode")
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="(default: greedy_search, ctc-decoding and 1best for CTC alone; with a transducer all)",
    )
    parser.add_argument("--exit-policy", type=Path, metavar="FILE", help="policy.json: one exit for each utterance")
    parser.add_argument("--exit", type=int, metavar="L", help="load and run the model up to this exit alone")
    parser.add_argument("--tune-set", metavar="NAME", help="the set on which options are chosen, of --cuts")
    parser.add_argument(
        "--hlg-scales", type=float, nargs="+", help="LM weights to choose from for CTC (1: as the LM was estimated)"
    )
    parser.add_argument("--ngram-lm-scales", type=float, nargs="+", help="LM weights to choose from for a transducer")
    parser.add_argument("--blank-penalties", type=float, nargs="+", help="nats, to choose from (0: none)")
    parser.add_argument(
        "--hot-words",
        type=Path,
        metavar="FILE",
        help="phrases to favour, one a line, by prefix_beam_search, modified_beam_search and fast_beam_search",
    )
    parser.add_argument(
        "--word-list",
        type=Path,
        metavar="FILE",
        help="words of greedy_search+lexicon, one a line (default: words.txt of the lang_dir); the first wins ties",
    )
    parser.add_argument("--hot-word-boost", type=float, default=1.5, help="nats for each token of a phrase")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--corpus", required=True, help="the name that the records carry")
    parser.add_argument("--system", help="likewise (default: the exp_dir's name, less its -seedN)")
    parser.add_argument("--max-duration", type=float, default=60.0, help="seconds of audio in a batch")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        if args.exit_policy:
            decode_early(args)
        else:
            decode(args)
    except (CheckpointError, ConfigError, FileNotFoundError, ValueError) as error:
        print(f"decode: {error}", file=sys.stderr)
        return 1
    return 0


def decode(args: argparse.Namespace) -> None:
    """Decode every set of `args.cuts`, the tune set first, and write what was found."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config, checkpoint, tokenizer = load_for_decoding(args.checkpoint, args.lang_dir, device, args.exit_layer)
    sets = named_sets("--cuts", args.cuts)
    for path in sets.values():
        check_features(path, config)
    costs = _costs(model, config.model.num_mel_bins)
    _tell_size(args, model)
    if args.tune_set and args.tune_set not in sets:
        raise ValueError(f"--tune-set {args.tune_set} is not among --cuts: {', '.join(sets)}")
    methods = make_methods(
        _method_names(args.methods, config.model.heads),
        args.lang_dir,
        tokenizer.vocab_size,
        device,
        _weights(args),
        _bias(args, tokenizer),
        args.word_list,
    )

    def spell(tokens: list[int]) -> list[str]:
        return tokenizer.decode(tokens).split()

    def batches(test_set: str, doing: str) -> Iterable[Batch]:
        found = evaluation_batches(load_cuts([sets[test_set]]), tokenizer, args.max_duration)
        return tqdm(found, desc=f"{doing} {test_set}", unit="batch", disable=None, leave=False)

    layers = config.model.exit_layers
    chosen = {(layer, method.name): method.default for layer in layers for method in methods}
    for test_set in sorted(sets, key=lambda name: name != args.tune_set):
        decoded: dict[tuple[int, str, Options], Decoded] = {}
        leaders = [method for method in methods if method.follows is None]
        if test_set == args.tune_set:
            variants = {(layer, method.name): method.variants for layer in layers for method in leaders}
            decoded = decode_cuts(model, batches(test_set, "choosing weights on"), leaders, variants, spell, device)
            best = _choose(decoded)
            chosen |= {(layer, m.name): best[layer, m.follows or m.name] for layer in layers for m in methods}
        left = [method for method in methods if not decoded or method.follows]
        fixed = {key: [options] for key, options in chosen.items()}
        decoded |= decode_cuts(model, batches(test_set, "decoding"), left, fixed, spell, device) if left else {}
        for method in methods:
            for layer in layers:
                options = chosen[layer, method.name]
                found = decoded[layer, method.name, options]
                scored = score(found.results)
                tuned = {"tuned_on": args.tune_set} if options else {}
                record = DecodeRecord(
                    corpus=args.corpus,
                    system=args.system or system_name(args.checkpoint),
                    seed=checkpoint["seed"],
                    test_set=test_set,
                    exit_layer=layer,
                    num_layers=config.model.num_layers,
                    method=method.name,
                    wer=scored.wer,
                    errors=scored.errors,
                    insertions=scored.insertions,
                    deletions=scored.deletions,
                    substitutions=scored.substitutions,
                    ref_words=scored.ref_words,
                    num_utterances=len(found.results),
                    fallback_utterances=found.fallbacks,
                    audio_seconds=found.audio_seconds,
                    rtf=found.rtf,
                    parameters=costs[method.head][layer].parameters,
                    macs_per_second=costs[method.head][layer].macs_per_second,
                    epoch=checkpoint.get("epoch", checkpoint["progress"]["epoch"]),
                    avg=checkpoint.get("avg", 0),
                    training_seconds=checkpoint["progress"]["seconds"],
                    world_size=checkpoint["world_size"],
                    device=checkpoint["device"],
                    config=config.to_dict()
                    | {"decoding": {"max_duration": args.max_duration, **dict(options), **method.fixed, **tuned}},
                    commit=git_commit(ROOT),
                    command=command_line(ROOT),
                    date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                )
                stem = f"{test_set}-exit-{layer:02d}-{method.name}"
                write_recogs(args.output_dir / f"recogs-{stem}.txt", scored)
                write_errs(args.output_dir / f"errs-{stem}.txt", scored)
                record.save(args.output_dir / f"{stem}.json")
                where = f"{test_set} exit {layer} {method.name}"
                log.info("%s: WER %.2f %% of %d words%s", where, scored.wer, scored.ref_words, _lost(found.fallbacks))


def decode_early(args: argparse.Namespace) -> None:
    """Decode every set of `args.cuts` with the exits that a policy chooses, and write what was found.

    Raises:
      PolicyError: the policy was fitted for another model.
      ValueError: a set shares a speaker with the set that the policy was fitted on, or options are given that the
        policy has settled.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitted = FittedPolicy.load(args.exit_policy)
    _check_settled(args, fitted)
    sets = named_sets("--cuts", args.cuts)
    for test_set, path in sets.items():
        _check_unseen(fitted, args.exit_policy, test_set, path)
    model, config, checkpoint, tokenizer = load_for_decoding(args.checkpoint, args.lang_dir, device, args.exit_layer)
    fitted.check(config.model.exit_layers, checkpoint_id(args.checkpoint), str(args.exit_policy))
    for path in sets.values():
        check_features(path, config)
    _tell_size(args, model)
    method = make_method(fitted.method, args.lang_dir, tokenizer.vocab_size, device)
    for test_set, path in sets.items():
        found = evaluation_batches(load_cuts([path]), tokenizer, args.max_duration)
        batches = tqdm(found, desc=f"decoding {test_set}", unit="batch", disable=None, leave=False)
        decoded = decode_cuts_early(model, batches, fitted, method, device)
        scored = score((cut_id, text.split(), _words(r.hypothesis, tokenizer)) for cut_id, text, r in decoded.results)
        mean_seconds = decoded.audio_seconds / len(decoded.results)
        macs, last_macs = _macs_on_the_way(model, config.model.num_mel_bins, method, mean_seconds)
        record = EarlyExitRecord(
            corpus=args.corpus,
            system=args.system or system_name(args.checkpoint),
            seed=checkpoint["seed"],
            test_set=test_set,
            method=method.name,
            policy=fitted.title,
            target=str(fitted.fitted_on.get("target", "")),
            wer=scored.wer,
            errors=scored.errors,
            insertions=scored.insertions,
            deletions=scored.deletions,
            substitutions=scored.substitutions,
            ref_words=scored.ref_words,
            num_utterances=len(decoded.results),
            **decoded.counts(config.model.exit_layers),
            macs_per_second=decoded.mean_by_seconds(macs),
            last_exit_macs_per_second=last_macs,
            audio_seconds=decoded.audio_seconds,
            rtf=decoded.seconds / decoded.audio_seconds,
            commit=git_commit(ROOT),
            command=command_line(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        stem = f"{test_set}-{fitted.title}"
        write_recogs(args.output_dir / f"recogs-{stem}.txt", scored)
        write_errs(args.output_dir / f"errs-{stem}.txt", scored)
        record.save(args.output_dir / f"{stem}.json")
        log.info("%s", _told(record))


def _check_settled(args: argparse.Namespace, fitted: FittedPolicy) -> None:
    """Raises ValueError where options are given that the policy was fitted with, or that its search does not know."""
    if args.methods and args.methods != [fitted.method]:
        raise ValueError(
            f"--methods {' '.join(args.methods)}: {args.exit_policy} was fitted with {fitted.method}; leave --methods "
            "out, or fit another policy (bin/calibrate --method)"
        )
    settled = {"--tune-set": args.tune_set, "--hot-words": args.hot_words}
    settled |= {f"--{name.replace('_', '-')}": getattr(args, name) for name in Weights._fields}
    if given := [option for option, value in settled.items() if value]:
        raise ValueError(
            f"{', '.join(given)}: {args.exit_policy} holds the search and its weights, and decoding with other ones is "
            "not what it was fitted to; leave the options out"
        )


def _check_unseen(fitted: FittedPolicy, source: Path, test_set: str, cuts: Path) -> None:
    """Raises ValueError where the policy was fitted on the set, on speakers or, where they are unknown, cuts of it."""
    ours = speakers_of(cuts)
    shared = (set(ours.values()) - {""}) & set(fitted.fitted_on.get("speakers", []))
    shared |= ours.keys() & set(fitted.fitted_on.get("without_speaker", []))
    if shared or test_set == fitted.fitted_on.get("set"):
        why = f"shares {', '.join(sorted(shared)[:5])} with it" if shared else "is that set"
        raise ValueError(
            f"{source} was fitted on {fitted.fitted_on.get('set')}, and {test_set} {why}: it would be no result; give "
            "sets of other speakers"
        )


@dataclass
class DecodedEarly:
    """What one set gave under an exit policy."""

    results: list[tuple[str, str, EarlyResult]] = field(default_factory=list)
    """(cut id, reference, what became of it)"""
    durations: list[float] = field(default_factory=list)
    """seconds of audio of each"""
    seconds: float = 0.0
    """that encoder, heads, policy and search took"""

    @property
    def audio_seconds(self) -> float:
        return math.fsum(self.durations)

    def counts(self, exit_layers: Sequence[int]) -> dict[str, Any]:
        """Fields of EarlyExitRecord that count utterances."""
        results = [result for _, _, result in self.results]
        taken = [result.layer for result in results]
        return {
            "fallback_utterances": sum(result.fallback for result in results),
            "nan_exits": sum(result.nan_exits for result in results),
            "late_utterances": sum(result.late for result in results),
            "exits": {layer: taken.count(layer) for layer in exit_layers},
            "layers": sum(taken) / len(taken),
        }

    def mean_by_seconds(self, of_layer: Mapping[int, float]) -> float:
        """The mean over the audio of what an utterance has by the layer at which it left."""
        every = zip(self.durations, self.results, strict=True)
        return sum(seconds * of_layer[result.layer] for seconds, (_, _, result) in every) / self.audio_seconds


def decode_cuts_early(
    model: AsrModel, batches: Iterable[Batch], fitted: FittedPolicy, method: Method, device: torch.device
) -> DecodedEarly:
    """Run every batch through the encoder as far as the policy lets it, and search where each utterance leaves."""
    options = {layer: tuple(each.items()) for layer, each in fitted.options.items()}
    decoded = DecodedEarly()
    for batch in (b.to(device) for b in batches):
        results, seconds = timed(
            device, lambda b=batch: search_early(model, b.x, b.x_lens, fitted.policy, method, options)
        )
        decoded.results += zip(batch.cut_ids, batch.texts, results, strict=True)
        decoded.durations += batch.durations
        decoded.seconds += seconds
    return decoded


def _words(hypothesis: Hypothesis, tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode(hypothesis.tokens).split() if hypothesis.words is None else hypothesis.words


def _told(record: EarlyExitRecord) -> str:
    saved = 100 * (1 - record.macs_per_second / record.last_exit_macs_per_second)
    return (
        f"{record.test_set} {record.policy} {record.method}: WER {record.wer:.2f} % of {record.ref_words} words, layer "
        f"{record.layers:.2f} on average, {saved:.0f} % of multiply-accumulates saved"
        + _lost(record.fallback_utterances)
        + (f", {record.nan_exits} exits with NaN passed" if record.nan_exits else "")
        + (f", {record.late_utterances} utterances late" if record.late_utterances else "")
    )


def _macs_on_the_way(
    model: AsrModel, num_mel_bins: int, method: Method, seconds: float
) -> tuple[dict[int, float], float]:
    """({layer: multiply-accumulates per second of audio of leaving there}, those of the last exit without a policy).

    CTC's heads are read at every exit on the way, whatever the search. Counted at the set's mean length.
    """
    costs = _costs(model, num_mel_bins, seconds)
    macs = {layer: cost.macs_per_second for layer, cost in costs[method.head].items()}
    heads = {layer: cost.head_macs_per_second for layer, cost in costs.get("ctc", {}).items()}
    if method.head != "ctc":  # its own head is read beside
        macs = {layer: value + heads.get(layer, 0.0) for layer, value in macs.items()}
    passed = {layer: sum(value for each, value in heads.items() if each < layer) for layer in macs}
    return {layer: value + passed[layer] for layer, value in macs.items()}, macs[max(macs)]


def _lost(fallbacks: int) -> str:
    return f", {fallbacks} empty lattices decoded greedily" if fallbacks else ""


def _tell_size(args: argparse.Namespace, model: AsrModel) -> None:
    """What --exit leaves in memory."""
    if args.exit_layer is not None:
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in [*parameters, *model.buffers()])
        log.info("up to layer %d: %.2f M parameters, %.1f MB in memory", args.exit_layer, count / 1e6, size / 1e6)


@dataclass
class Decoded:
    """What one search found at one exit."""

    results: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(cut id, reference words, decoded words)"""
    fallbacks: int = 0
    encoder_seconds: float = 0.0
    """front end, encoder up to this exit and its CTC head"""
    search_seconds: float = 0.0
    """of a transducer, its decoder and joiner included"""
    audio_seconds: float = 0.0

    @property
    def rtf(self) -> float:
        return (self.encoder_seconds + self.search_seconds) / self.audio_seconds


@torch.no_grad()  # not inference_mode: k2 asks tensors for their version
def decode_cuts(
    model: AsrModel,
    batches: Iterable[Batch],
    methods: Sequence[Method],
    options_of: Mapping[tuple[int, str], Sequence[Options]],
    spell: Callable[[list[int]], list[str]],
    device: torch.device,
) -> dict[tuple[int, str, Options], Decoded]:
    """{(exit layer, method, options): what it found}; every batch passes the encoder once.

    Args:
      options_of: {(layer, method): the options with which it is run}.
      spell: makes words of token ids, for hypotheses without words.
    The time of an exit leaves out other exits' heads and other searches.
    """
    decoded: dict[tuple[int, str, Options], Decoded] = {}
    for batch in (b.to(device) for b in batches):
        references = [text.split() for text in batch.texts]
        encoder_seconds = 0.0
        exits = model.encoder(batch.x, batch.x_lens)
        while True:
            exit_output, seconds = timed(device, lambda exits=exits: next(exits, None))
            if exit_output is None:
                break
            encoder_seconds += seconds
            layer = exit_output.layer
            log_probs, head_seconds = None, {"ctc": 0.0, "transducer": 0.0}
            if "ctc" in model.heads:
                log_probs, head_seconds["ctc"] = timed(device, lambda out=exit_output: model.ctc_log_probs(out))
            view = exit_view(model, exit_output, log_probs)._replace(references=references)
            for method in methods:
                for options in options_of[layer, method.name]:
                    (hypotheses, fallbacks), search_seconds = timed(
                        device, lambda m=method, v=view, o=options: m.run(v, o)
                    )
                    words = [h.words if h.words is not None else spell(h.tokens) for h in hypotheses]
                    if (correct := method.correct) is not None:
                        words, seconds = timed(device, lambda c=correct, w=words: [c(each) for each in w])
                        search_seconds += seconds
                    entry = decoded.setdefault((layer, method.name, options), Decoded())
                    entry.results += zip(batch.cut_ids, references, words, strict=True)
                    entry.fallbacks += len(fallbacks)
                    entry.encoder_seconds += encoder_seconds + head_seconds[method.head]
                    entry.search_seconds += search_seconds
                    entry.audio_seconds += batch.seconds
    return decoded


def _method_names(asked: list[str] | None, heads: Sequence[str]) -> list[str]:
    names = asked or default_methods(heads)
    strangers = [name for name in names if METHODS[name] not in heads]
    if strangers:
        raise ValueError(
            f"--methods {' '.join(strangers)}: this model's heads are {', '.join(heads)}; choose among "
            f"{', '.join(name for name, head in METHODS.items() if head in heads)}"
        )
    return names


def _weights(args: argparse.Namespace) -> Weights:
    given = {name: getattr(args, name) for name in Weights._fields if getattr(args, name)}
    return Weights(**given)


def _bias(args: argparse.Namespace, tokenizer: Tokenizer) -> Bias | None:
    if args.hot_words is None:
        return None
    lines = [line.strip() for line in args.hot_words.read_text(encoding="utf-8").splitlines()]
    phrases = [line for line in lines if line]
    if not phrases:
        raise ValueError(f"{args.hot_words} holds no phrase: write one a line, or leave --hot-words out")
    for phrase in phrases:
        if unknown := tokenizer.unknown_characters(phrase):
            raise ValueError(
                f"{args.hot_words}: {phrase!r} has characters that the tokens lack ({' '.join(sorted(unknown))}); "
                "write phrases as the transcripts of the training are"
            )
    return Bias([tokenizer.encode(phrase) for phrase in phrases], args.hot_word_boost)


def _costs(model: AsrModel, num_mel_bins: int, seconds: float = 10.0) -> dict[str, dict[int, ExitCost]]:
    costs = {}
    if "ctc" in model.heads:
        costs["ctc"] = complexity(model.encoder, model.ctc_heads, num_mel_bins, seconds)
    if "transducer" in model.heads:
        costs["transducer"] = complexity(model.encoder, transducer_heads(model), num_mel_bins, seconds)
    return costs


def _choose(decoded: dict[tuple[int, str, Options], Decoded]) -> dict[tuple[int, str], Options]:
    """For each exit and method the options with the fewest errors; of equals those nearest to none at all."""
    best: dict[tuple[int, str], tuple[int, float, Options]] = {}
    for (layer, name, options), found in decoded.items():
        # an LM weight is none at all where it is 1, a penalty where it is 0
        distance = sum(abs(value - (0.0 if option == "blank_penalty" else 1.0)) for option, value in options)
        candidate = (score(found.results).errors, distance, options)
        best[layer, name] = min(best.get((layer, name), candidate), candidate)
    return {key: options for key, (_, _, options) in best.items()}


if __name__ == "__main__":
    sys.exit(main())
