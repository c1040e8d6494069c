"""Decoding with an exit policy: each utterance leaves the encoder at the exit that the policy chooses."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from splitformer.checkpoint import checkpoint_id
from splitformer.data.batches import Batch, evaluation_batches, load_cuts
from splitformer.decoding.loading import (
    check_features,
    load_for_decoding,
    make_method,
    speakers_of,
    system_name,
    timed,
)
from splitformer.decoding.searches import Method
from splitformer.early_exit.disjoint import check_disjoint
from splitformer.early_exit.policies import FittedPolicy
from splitformer.early_exit.search import EarlyResult, search_early, words_of
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import complexity, transducer_heads
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import EarlyExitRecord
from splitformer.scoring import score, write_errs, write_recogs

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


def check_settled(policy: Path, methods: Sequence[str], options: Sequence[str]) -> None:
    """Raise a UserError where a search or its options are given that the policy has settled.

    Args:
      policy: policy.json.
      methods: the names that --methods gave.
      options: other options that were given and that choose or weight a search, such as "--tune-set".
    """
    fitted = FittedPolicy.load(policy)
    if methods and list(methods) != [fitted.method]:
        raise UserError(
            f"--methods {' '.join(methods)}: {policy} was fitted with {fitted.method}; leave --methods out, or fit "
            "another policy (bin/calibrate --method)"
        )
    if options:
        raise UserError(
            f"{', '.join(options)}: {policy} holds the search and its weights, and was fitted with these alone; leave "
            "the options out"
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
) -> None:
    """Decode sets with a policy; write the words, the errors and one EarlyExitRecord for each set.

    Args:
      policy: policy.json of bin/calibrate.
      sets: {name: path of the cuts}.
      corpus, system: as the record names them; the default system is the exp_dir's name without -seedN.
      exit_layer: the model is loaded up to this exit.
      max_duration: seconds of audio in a batch.
    Raises:
      PolicyError: the policy was fitted for another model.
      UserError: a set shares an utterance or some of the speakers with the set that the policy was fitted on.
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
        decoded = decode_with_policy(model, progress, fitted, method, device)
        scored = score(
            (cut_id, text.split(), words_of(result.hypothesis, tokenizer.decode))
            for cut_id, text, result in zip(decoded.cut_ids, decoded.texts, decoded.results, strict=True)
        )
        mean_seconds = decoded.audio_seconds / len(decoded.results)
        macs, last_macs = macs_with_policy(model, config.model.num_mel_bins, method.head, mean_seconds)
        record = EarlyExitRecord(
            corpus=corpus,
            system=system or system_name(checkpoint),
            seed=contents["seed"],
            test_set=name,
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
            fallback_utterances=sum(result.fallback for result in decoded.results),
            nan_exits=sum(result.nan_exits for result in decoded.results),
            late_utterances=sum(result.late for result in decoded.results),
            exits={layer: decoded.layers.count(layer) for layer in config.model.exit_layers},
            layers=sum(decoded.layers) / len(decoded.layers),
            macs_per_second=decoded.mean_over_audio(macs),
            last_exit_macs_per_second=last_macs,
            audio_seconds=decoded.audio_seconds,
            rtf=decoded.seconds / decoded.audio_seconds,
            commit=git_commit(ROOT),
            command=command_line(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            warning=warnings[name],
        )
        stem = f"{name}-{fitted.title}"
        write_recogs(output_dir / f"recogs-{stem}.txt", scored)
        write_errs(output_dir / f"errs-{stem}.txt", scored)
        record.save(output_dir / f"{stem}.json")
        log.info("%s", summary(record))


def check_unseen(fitted: FittedPolicy, source: Path, test_set: str, speakers: Mapping[str, str]) -> str:
    """Check that the policy was not fitted on the utterances or the speakers of a test set.

    Args:
      source: the file of the policy, for messages.
      speakers: {utterance: speaker} of the test set; unknown speakers are "".
    Returns:
      a warning for the record, or "" (see `check_disjoint`).
    Raises:
      UserError: it was.
    """
    on = fitted.fitted_on
    if test_set == on.get("set"):
        raise UserError(f"{source} was fitted on {test_set}; give sets of other speakers")
    utterances = on.get("cuts", on.get("without_speaker", []))
    warning = check_disjoint(f"{on.get('set')} of {source}", utterances, on.get("speakers", []), test_set, speakers)
    if warning and "cuts" not in on:
        raise UserError(
            f"{source} was fitted on {on.get('set')}, which shares its speakers with {test_set}, and does not list its "
            "utterances: they may be the same; fit it again with bin/calibrate"
        )
    return warning


@dataclass
class EarlyDecoding:
    """The results of one set under an exit policy; lists have one entry for each utterance."""

    cut_ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    """seconds of audio"""
    results: list[EarlyResult] = field(default_factory=list)
    seconds: float = 0.0
    """time of encoder, heads, policy and search"""

    @property
    def layers(self) -> list[int]:
        return [result.layer for result in self.results]

    @property
    def audio_seconds(self) -> float:
        return math.fsum(self.durations)

    def mean_over_audio(self, of_layer: Mapping[int, float]) -> float:
        """Return the mean over all seconds of audio of a value that depends on the exit."""
        every = zip(self.durations, self.layers, strict=True)
        return sum(seconds * of_layer[layer] for seconds, layer in every) / self.audio_seconds


def decode_with_policy(
    model: AsrModel, batches: Iterable[Batch], fitted: FittedPolicy, method: Method, device: torch.device
) -> EarlyDecoding:
    """Run every utterance up to the exit that the policy chooses, and search that exit."""
    options = {layer: tuple(each.items()) for layer, each in fitted.options.items()}
    decoded = EarlyDecoding()
    for batch in (b.to(device) for b in batches):
        results, seconds = timed(
            device, lambda b=batch: search_early(model, b.x, b.x_lens, fitted.policy, method, options)
        )
        decoded.cut_ids += batch.cut_ids
        decoded.texts += batch.texts
        decoded.durations += batch.durations
        decoded.results += results
        decoded.seconds += seconds
    return decoded


def macs_with_policy(model: AsrModel, num_mel_bins: int, head: str, seconds: float) -> tuple[dict[int, float], float]:
    """Return {layer: MACs per second of audio of an utterance that exits there}, and those of the last exit alone.

    Whatever the search, a policy reads the CTC heads of all exits on the way. `seconds`: length of an utterance.
    """
    ctc = complexity(model.encoder, model.ctc_heads, num_mel_bins, seconds) if "ctc" in model.heads else {}
    searched = ctc if head == "ctc" else complexity(model.encoder, transducer_heads(model), num_mel_bins, seconds)
    heads = {layer: cost.head_macs_per_second for layer, cost in ctc.items()}
    macs = {layer: cost.macs_per_second for layer, cost in searched.items()}
    if head != "ctc":  # the CTC head of the exit is read beside the head that is searched
        macs = {layer: value + heads.get(layer, 0.0) for layer, value in macs.items()}
    passed = {layer: sum(value for each, value in heads.items() if each < layer) for layer in macs}
    return {layer: value + passed[layer] for layer, value in macs.items()}, macs[max(macs)]


def summary(record: EarlyExitRecord) -> str:
    """Return a line for the log."""
    saved = 100 * (1 - record.macs_per_second / record.last_exit_macs_per_second)
    counts = {
        "empty lattices decoded greedily": record.fallback_utterances,
        "exits with NaN passed": record.nan_exits,
        "utterances late": record.late_utterances,
    }
    return (
        f"{record.test_set} {record.policy} {record.method}: WER {record.wer:.2f} % of {record.ref_words} words, mean "
        f"exit layer {record.layers:.2f}, {saved:.0f} % of MACs saved"
        + "".join(f", {count} {what}" for what, count in counts.items() if count)
    )
