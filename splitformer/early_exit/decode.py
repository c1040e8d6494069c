"""Decoding with an exit policy, which chooses an exit for each utterance."""

from __future__ import annotations

import datetime
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from splitformer.checkpoint import checkpoint_id
from splitformer.data.batch import Batch
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.decoding.decode import system_name, timed
from splitformer.decoding.hypothesis import words_of
from splitformer.decoding.loading import check_features, load_for_decoding, speakers_of
from splitformer.decoding.searches import Method, make_method
from splitformer.early_exit.policies import FittedPolicy, check_disjoint
from splitformer.early_exit.search import EarlyResult, search_early
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity, transducer_heads
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import EarlyExitRecord
from splitformer.scoring import score, write_errs, write_recogs

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


def check_settled(policy: Path, methods: Sequence[str], options: Sequence[str]) -> None:
    """Raise UserError if `methods` or other `options` are given, such as "--tune-set", that policy.json settles."""
    fitted = FittedPolicy.load(policy)
    if methods and list(methods) != [fitted.method]:
        options = [f"--methods {' '.join(methods)}", *options]
    if options:
        raise UserError(
            f"{', '.join(options)}: {policy} was fitted with the search {fitted.method} and its weights; leave the "
            "options out, or fit another policy (bin/calibrate --method)"
        )


def decode_early(
    policy: Path,
    checkpoint: Path,
    sets: Mapping[str, Path],
    lang_dir: Path,
    output_dir: Path,
    corpus: str,
    system: str | None = None,
    exit_layer: int | None = None,
    max_duration: float = 60.0,
    notice: str = "",
) -> None:
    """Decode sets with a policy; write the words, the errors and one EarlyExitRecord for each set.

    Args:
      policy: policy.json of bin/calibrate.
      sets: {name: path of the cuts}.
      corpus, system: as the record names them; the default system is the exp_dir's name without -seedN.
      exit_layer: the model is loaded up to this exit.
      max_duration: seconds of audio in a batch.
      notice: of the records; reports show it above every table.
    Raises:
      PolicyError: the policy was fitted for another model.
      UserError: the policy was fitted on utterances or speakers of a set (`check_unseen`).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fitted = FittedPolicy.load(policy)
    warnings = {name: check_unseen(fitted, policy, name, speakers_of(path)) for name, path in sets.items()}
    model, config, contents, tokenizer = load_for_decoding(checkpoint, lang_dir, device, exit_layer)
    fitted.check(config.model.exit_layers, checkpoint_id(checkpoint), str(policy))
    for path in sets.values():
        check_features(path, config)
    method = make_method(fitted.method, lang_dir, tokenizer.vocab_size, device)
    for name, path in sets.items():
        if warnings[name]:
            log.warning("%s", warnings[name])
        batches = evaluation_batches(load_cuts([path]), tokenizer, max_duration)
        progress = tqdm(batches, desc=f"decoding {name}", unit="batch", disable=None, leave=False)
        decoded, seconds = decode_with_policy(model, progress, fitted, method, device)
        scored = score(
            (each.cut_id, each.text.split(), words_of(each.result.hypothesis, tokenizer.decode)) for each in decoded
        )
        counts = ("wer", "errors", "insertions", "deletions", "substitutions", "ref_words")
        audio = math.fsum(each.duration for each in decoded)
        layers = [each.result.layer for each in decoded]
        macs, last_macs = macs_with_policy(model, config.model.num_mel_bins, method.head, audio / len(decoded))
        record = EarlyExitRecord(
            corpus=corpus,
            system=system or system_name(checkpoint),
            seed=contents["seed"],
            test_set=name,
            method=method.name,
            policy=fitted.title,
            target=str(fitted.fitted_on.get("target", "")),
            **{count: getattr(scored, count) for count in counts},
            num_utterances=len(decoded),
            fallback_utterances=sum(each.result.fallback for each in decoded),
            nan_exits=sum(each.result.nan_exits for each in decoded),
            late_utterances=sum(each.result.late for each in decoded),
            exits={layer: layers.count(layer) for layer in config.model.exit_layers},
            layers=sum(layers) / len(layers),
            macs_per_second=sum(each.duration * macs[each.result.layer] for each in decoded) / audio,
            last_exit_macs_per_second=last_macs,
            audio_seconds=audio,
            rtf=seconds / audio,
            commit=git_commit(ROOT),
            command=command_line(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            warning=warnings[name],
            notice=notice,
        )
        stem = f"{name}-{fitted.title}"
        write_recogs(output_dir / f"recogs-{stem}.txt", scored)
        write_errs(output_dir / f"errs-{stem}.txt", scored)
        record.save(output_dir / f"{stem}.json")
        log.info("%s", summary(record))


def check_unseen(fitted: FittedPolicy, source: Path, test_set: str, speakers: Mapping[str, str]) -> str:
    """Return a warning or "", as `check_disjoint`, for a test set and the set that a policy was fitted on.

    Args:
      source: file of the policy, for messages.
      speakers: {utterance: speaker} of the test set; unknown speakers are "".
    Raises:
      UserError: they are one set or share too much.
    """
    on = fitted.fitted_on
    if test_set == on.get("set"):
        raise UserError(f"{source} was fitted on {test_set}; give sets of other speakers")
    utterances = on.get("cuts", on.get("without_speaker", []))
    warning = check_disjoint(f"{on.get('set')} of {source}", utterances, on.get("speakers", []), test_set, speakers)
    if warning and "cuts" not in on:
        raise UserError(f"{warning}; {source} does not list its utterances: fit it again with bin/calibrate")
    return warning


class Decoded(NamedTuple):
    """The result of one utterance."""

    cut_id: str
    text: str
    duration: float
    result: EarlyResult


def decode_with_policy(
    model: AsrModel, batches: Iterable[Batch], fitted: FittedPolicy, method: Method, device: torch.device
) -> tuple[list[Decoded], float]:
    """Run every utterance up to the exit that the policy chooses, and search that exit.

    Returns:
      the results, and the seconds that encoder, heads, policy and search took.
    """
    options = {layer: tuple(each.items()) for layer, each in fitted.options.items()}
    decoded, seconds = [], 0.0
    for batch in (b.to(device) for b in batches):
        search = functools.partial(search_early, model, batch.x, batch.x_lens, fitted.policy, method, options)
        results, elapsed = timed(device, search)
        decoded += [Decoded(*each) for each in zip(batch.cut_ids, batch.texts, batch.durations, results, strict=True)]
        seconds += elapsed
    return decoded, seconds


def macs_with_policy(model: AsrModel, num_mel_bins: int, head: str, seconds: float) -> tuple[dict[int, float], float]:
    """Return {layer: MACs per second of audio for utterances that exit there}, and those of the last exit alone.

    Whatever the search, a policy reads the CTC heads of all exits on the way. `seconds`: length of an utterance.
    """
    ctc = complexity(model.encoder, dict(model.ctc_heads), num_mel_bins, seconds) if "ctc" in model.heads else {}
    searched = ctc if head == "ctc" else complexity(model.encoder, transducer_heads(model), num_mel_bins, seconds)
    heads = {layer: cost.head_macs_per_second for layer, cost in ctc.items()}
    beside = {} if head == "ctc" else heads  # the CTC head is read beside the one that is searched
    macs = {layer: cost.macs_per_second + beside.get(layer, 0.0) for layer, cost in searched.items()}
    passed = {layer: sum(value for each, value in heads.items() if each < layer) for layer in macs}
    return {layer: value + passed[layer] for layer, value in macs.items()}, macs[max(macs)]


def summary(record: EarlyExitRecord) -> str:
    """Return a line for the log."""
    saved = 100 * (1 - record.macs_per_second / record.last_exit_macs_per_second)
    return (
        f"{record.test_set} {record.policy} {record.method}: WER {record.wer:.2f} % of {record.ref_words} words, mean "
        f"exit layer {record.layers:.2f}, {saved:.0f} % of MACs saved; {record.fallback_utterances} empty lattices "
        f"decoded greedily, {record.nan_exits} exits with NaN passed over, {record.late_utterances} utterances late"
    )
