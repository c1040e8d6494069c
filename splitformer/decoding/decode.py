"""Decoding sets at every exit: the options of methods are chosen on a tune set, and each result gets a record."""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from splitformer.data.batch import Batch
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.hypothesis import words_of
from splitformer.decoding.loading import Loaded
from splitformer.decoding.methods import METHODS
from splitformer.decoding.searches import ExitView, HotWords, Method, Options, exit_view
from splitformer.errors import UserError
from splitformer.files import read_text
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import ExitCost, complexity, transducer_heads
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import DecodeRecord
from splitformer.scoring import Score, score, write_errs, write_recogs

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]

Key = tuple[int, str, Options]
"""(exit layer, method, its options)"""
T = TypeVar("T")


def decode_sets(
    loaded: Loaded,
    methods: Sequence[Method],
    sets: Mapping[str, Path],
    tune_set_of: Mapping[str, str],
    output_dir: Path,
    corpus: str,
    system: str,
    max_duration: float = 60.0,
    notice: str = "",
) -> None:
    """Decode sets at every exit with every method; write the words, the errors and one DecodeRecord for each result.

    Args:
      sets: {name: path of the cuts}.
      tune_set_of: {set: the set on which its options are chosen}, see `tune_sets`; those are decoded first. For a set
        without one, a method uses its only variant, or its default.
      corpus, system: as the records name them.
      max_duration: seconds of audio in a batch.
      notice: of the records; reports show it above every table.
    """
    model, config, _, tokenizer = loaded
    device = next(model.parameters()).device
    costs = _costs(model, config.model.num_mel_bins)
    keys = [(layer, method.name) for method in methods for layer in config.model.exit_layers]
    method_of = {method.name: method for method in methods}

    def decode(
        test_set: str, task: str, some: Sequence[Method], options_of: Mapping[tuple[int, str], Sequence[Options]]
    ) -> dict[Key, Decoded]:
        batches = evaluation_batches(load_cuts([sets[test_set]]), tokenizer, max_duration)
        progress = tqdm(batches, desc=f"{task} {test_set}", unit="batch", disable=None, leave=False)
        return decode_cuts(model, progress, some, options_of, tokenizer.decode, device)

    leader_of = {name: method_of[method.follows or name] for name, method in method_of.items()}
    untuned = {
        (layer, name): leader_of[name].variants[0] if len(leader_of[name].variants) == 1 else method_of[name].default
        for layer, name in keys
    }
    choices: dict[str, dict[tuple[int, str], Options]] = {}
    for test_set in sorted(sets, key=lambda name: name != tune_set_of.get(name)):
        tune_set = tune_set_of.get(test_set, "")
        decoded: dict[Key, Decoded] = {}
        remaining = methods
        if test_set == tune_set:
            leaders = [method for method in methods if method.follows is None]
            variants = {(layer, name): method_of[name].variants for layer, name in keys}
            decoded = decode(test_set, "choosing weights on", leaders, variants)
            best = best_options(decoded)
            choices[tune_set] = {(layer, name): best[layer, leader_of[name].name] for layer, name in keys}
            remaining = [method for method in methods if method.follows]
        chosen = choices.get(tune_set, untuned)
        if remaining:
            decoded |= decode(test_set, "decoding", remaining, {key: [options] for key, options in chosen.items()})
        for layer, name in keys:
            method, options = method_of[name], chosen[layer, name]
            result = decoded[layer, name, options]
            scored = score(result.results)
            settings = {"max_duration": max_duration, **dict(options), **method.recorded}
            record = DecodeRecord(
                corpus=corpus,
                system=system,
                test_set=test_set,
                method=name,
                notice=notice,
                config=config.to_dict() | {"decoding": settings | ({"tuned_on": tune_set} if options else {})},
                **_model_fields(loaded, layer, costs[method.head][layer]),
                **_result_fields(result, scored),
            )
            _write(record, scored, output_dir)


def tune_sets(values: Sequence[str], sets: Mapping[str, Path]) -> dict[str, str]:
    """Return {set: the set on which its options are chosen}, which for a tune set is itself.

    Args:
      values: of --tune-set: NAME for all sets, and SET=NAME for single ones.
    Raises:
      UserError: a name is none of the sets, or there are several for one set.
    """
    everything = [value for value in values if "=" not in value]
    pairs = [value.split("=", 1) for value in values if "=" in value]
    named = dict(pairs)
    if unknown := sorted({*everything, *(name for pair in pairs for name in pair)} - sets.keys()):
        raise UserError(f"--tune-set {', '.join(unknown)} is not among --cuts: {', '.join(sets)}")
    if len(everything) > 1 or len(named) < len(pairs):
        raise UserError(f"--tune-set {' '.join(values)}: give one NAME for all sets, and SET=NAME once for other sets")
    found = {name: named.get(name, everything[0] if everything else "") for name in sets}
    found |= {name: name for name in (*everything, *named.values())}
    return {name: tune_set for name, tune_set in found.items() if tune_set}


def _model_fields(loaded: Loaded, layer: int, cost: ExitCost) -> dict[str, Any]:
    """Return the fields of a DecodeRecord that describe the model and its training."""
    contents = loaded.contents
    return {
        "exit_layer": layer,
        "num_layers": loaded.config.model.num_layers,
        "parameters": cost.parameters,
        "macs_per_second": cost.macs_per_second,
        "epoch": contents.get("epoch", contents["progress"]["epoch"]),
        "avg": contents.get("avg", 0),
        "training_seconds": contents["progress"]["seconds"],
        **{name: contents[name] for name in ("seed", "world_size", "device")},
    }


def _result_fields(result: Decoded, scored: Score) -> dict[str, Any]:
    """Return the fields of a DecodeRecord that describe the result, and what it was made with."""
    counts = ("wer", "errors", "insertions", "deletions", "substitutions", "ref_words")
    return {
        **{name: getattr(scored, name) for name in counts},
        "num_utterances": len(result.results),
        "fallback_utterances": result.fallbacks,
        "audio_seconds": result.audio_seconds,
        "rtf": (result.encoder_seconds + result.search_seconds) / result.audio_seconds,
        "commit": git_commit(ROOT),
        "command": command_line(ROOT),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _write(record: DecodeRecord, scored: Score, output_dir: Path) -> None:
    stem = f"{record.test_set}-exit-{record.exit_layer:02d}-{record.method}"
    write_recogs(output_dir / f"recogs-{stem}.txt", scored)
    write_errs(output_dir / f"errs-{stem}.txt", scored)
    record.save(output_dir / f"{stem}.json")
    fallbacks = record.fallback_utterances
    lost = f", {fallbacks} empty lattices decoded greedily" if fallbacks else ""
    where = f"{record.test_set} exit {record.exit_layer} {record.method}"
    log.info("%s: WER %.2f %% of %d words%s", where, record.wer, record.ref_words, lost)


@dataclass
class Decoded:
    """The result of one search at one exit."""

    results: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(cut id, reference words, decoded words)"""
    fallbacks: int = 0
    encoder_seconds: float = 0.0
    """of front end, encoder up to this exit, and its CTC head if that is searched"""
    search_seconds: float = 0.0
    """of a transducer, decoder and joiner included"""
    audio_seconds: float = 0.0


@torch.no_grad()  # not inference_mode: k2 reads the version of tensors
def decode_cuts(
    model: AsrModel,
    batches: Iterable[Batch],
    methods: Sequence[Method],
    options_of: Mapping[tuple[int, str], Sequence[Options]],
    spell: Callable[[list[int]], str],
    device: torch.device,
) -> dict[Key, Decoded]:
    """Decode batches at every exit; each batch passes through the encoder once.

    Args:
      options_of: {(exit layer, method): options to run it with}.
      spell: makes text of token ids.
    Returns:
      {(exit layer, method, options): its result}. Its times do not include heads of other exits and other searches.
    """
    decoded: dict[Key, Decoded] = {}
    for batch in (b.to(device) for b in batches):
        references = [text.split() for text in batch.texts]
        for layer, view, encoder_seconds in _timed_exits(model, batch):
            view = view._replace(references=references)
            for method in methods:
                for options in options_of[layer, method.name]:
                    words, fallbacks, search_seconds = _search(method, view, options, spell)
                    result = decoded.setdefault((layer, method.name, options), Decoded())
                    result.results += zip(batch.cut_ids, references, words, strict=True)
                    result.fallbacks += fallbacks
                    result.encoder_seconds += encoder_seconds[method.head]
                    result.search_seconds += search_seconds
                    result.audio_seconds += batch.seconds
    return decoded


def _timed_exits(model: AsrModel, batch: Batch) -> Iterator[tuple[int, ExitView, dict[str, float]]]:
    """Yield (layer, what a search reads, {head: seconds of encoder and head}) for every exit."""
    device = batch.x.device
    exits = model.encoder(batch.x, batch.x_lens)
    encoder_seconds = 0.0
    while True:
        exit_output, seconds = timed(device, functools.partial(next, exits, None))
        if exit_output is None:
            return
        encoder_seconds += seconds
        log_probs, seconds = None, 0.0
        if "ctc" in model.heads:
            log_probs, seconds = timed(device, functools.partial(model.ctc_log_probs, exit_output))
        view = exit_view(model, exit_output, log_probs)
        yield exit_output.layer, view, {"ctc": encoder_seconds + seconds, "transducer": encoder_seconds}


def _search(
    method: Method, view: ExitView, options: Options, spell: Callable[[list[int]], str]
) -> tuple[list[list[str]], int, float]:
    """Return the words of each utterance, the number of fallbacks, and the seconds of search and correction."""
    device = view.encoder_out.device
    (hypotheses, fallbacks), seconds = timed(device, functools.partial(method.run, view, options))
    words = [words_of(hypothesis, spell) for hypothesis in hypotheses]
    if (correct := method.correct) is not None:
        words, more = timed(device, lambda: [correct(each) for each in words])
        seconds += more
    return words, len(fallbacks), seconds


def timed(device: torch.device, call: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `call` and the seconds that it took."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def best_options(decoded: Mapping[Key, Decoded]) -> dict[tuple[int, str], Options]:
    """Return for each exit and method the options with the fewest errors; ties go to the neutral value."""
    best: dict[tuple[int, str], tuple[int, float, Options]] = {}
    for (layer, name, options), result in decoded.items():
        # a weight of 1 and a penalty of 0 have no effect
        distance = sum(abs(value - (0.0 if option == "blank_penalty" else 1.0)) for option, value in options)
        candidate = (score(result.results).errors, distance, options)
        best[layer, name] = min(best.get((layer, name), candidate), candidate)
    return {key: options for key, (_, _, options) in best.items()}


def _costs(model: AsrModel, num_mel_bins: int) -> dict[str, dict[int, ExitCost]]:
    """Return {head: {layer: cost}}."""
    heads = {"ctc": dict(model.ctc_heads)} if "ctc" in model.heads else {}
    if "transducer" in model.heads:
        heads["transducer"] = transducer_heads(model)
    return {name: complexity(model.encoder, each, num_mel_bins) for name, each in heads.items()}


def read_hot_words(path: Path, boost: float, tokenizer: Tokenizer) -> HotWords:
    """Return the phrases of a file, one per line.

    Raises:
      UserError: there is none, or the tokens cannot spell one.
    """
    phrases = [phrase for line in read_text(path).splitlines() if (phrase := line.strip())]
    if not phrases:
        raise UserError(f"{path} holds no phrase: write one per line, or leave --hot-words out")
    for phrase in phrases:
        if unknown := tokenizer.unknown_characters(phrase):
            raise UserError(
                f"{path}: {phrase!r} has characters that the tokens lack ({' '.join(sorted(unknown))}); write phrases "
                "as the transcripts of the training are"
            )
    return HotWords([tokenizer.encode(phrase) for phrase in phrases], boost)


def system_name(path: Path) -> str:
    """Return the name of an exp_dir, or of the exp_dir of a checkpoint, without its -seedN."""
    path = path.resolve()
    return (path if path.is_dir() else path.parent).name.rsplit("-seed", 1)[0]


def chosen_search(
    decode_dir: Path, tuned_on: str, method: str | None, layers: Sequence[int], heads: Sequence[str]
) -> tuple[str, dict[int, Options]]:
    """Return a method's name and its options at each exit, as they were chosen on the set `tuned_on`.

    Args:
      decode_dir: with the records of that set.
      method: None for the one with the lowest WER of that set at the last exit.
    Raises:
      UserError: records are missing, or the method is not selectable.
    """
    records = [DecodeRecord.load(path) for path in sorted(decode_dir.glob(f"{tuned_on}-exit-*.json"))]
    selectable = [name for name, info in METHODS.items() if info.head in heads and info.selectable]
    if method is None:
        wer_of = {r.method: r.wer for r in records if r.exit_layer == layers[-1] and r.method in selectable}
        if not wer_of:
            raise UserError(
                f"{decode_dir} has no record of {tuned_on} at layer {layers[-1]} to choose the search by: decode that "
                f"set first (bin/decode --tune-set {tuned_on})"
            )
        method = min(wer_of, key=wer_of.__getitem__)
    if method not in selectable:
        raise UserError(f"--method {method}: choose among {', '.join(selectable)}")
    options = {}
    for record in records:
        if record.method == method:
            settings = record.config.get("decoding", {})
            weights = ("hlg_scale", "ngram_lm_scale", "blank_penalty")
            options[record.exit_layer] = tuple((name, settings[name]) for name in weights if name in settings)
    missing = [layer for layer in layers if layer not in options]
    if missing and method != "greedy_search":
        raise UserError(
            f"{decode_dir} has no record of {method} on {tuned_on} at layers {', '.join(map(str, missing))} with its "
            f"weights: decode that set first (bin/decode --methods {method} --tune-set {tuned_on})"
        )
    return method, options
