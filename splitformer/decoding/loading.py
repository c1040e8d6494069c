"""What the commands that decode have in common: reading their arguments' files, with errors that name them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from splitformer.checkpoint import load_model
from splitformer.config import Config
from splitformer.data.batches import load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.searches import METHODS, NOT_CHOSEN, Method, Options, Weights, make_methods
from splitformer.model.asr import AsrModel
from splitformer.report.records import DecodeRecord


def named_sets(option: str, items: Iterable[str]) -> dict[str, Path]:
    """{NAME: PATH} of items NAME=PATH.

    Raises:
      ValueError, FileNotFoundError: an item is no such pair, or there are no cuts at its path.
    """
    sets = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"{option} {item!r}: expected NAME=PATH")
        if next(iter(load_cuts([path])), None) is None:
            raise ValueError(f"{option} {item}: there are no cuts in it; leave it out, or make it again (prepare.sh)")
        sets[name] = Path(path)
    return sets


def load_for_decoding(
    checkpoint: Path, lang_dir: Path, device: torch.device, exit_layer: int | None = None
) -> tuple[AsrModel, Config, dict[str, Any], Tokenizer]:
    """Model, configuration and contents of a checkpoint, and the tokenizer of its training.

    Raises:
      CheckpointError: see load_model.
      ValueError: the lang_dir is not that of the training.
    """
    model, config, contents = load_model(checkpoint, device, exit_layer)
    tokenizer = Tokenizer(lang_dir)
    if tokenizer.tokens != contents["tokens"]:
        raise ValueError(
            f"{checkpoint} was trained with other tokens than those of {lang_dir} ({tokenizer.vocab_size} of them, "
            f"{config.model.vocab_size} in training): give the lang_dir of the training"
        )
    return model, config, contents, tokenizer


def check_features(cuts: Path, config: Config) -> None:
    """Raises ValueError where the stored features are not of the kind that the model was trained on."""
    first = next(iter(load_cuts([cuts])), None)
    kind = first.features.type if first is not None and first.has_features else None
    if kind is not None and (kind == "linear-mel") != (config.data.features == "linear-mel"):
        raise ValueError(
            f"{cuts} has {kind} features, and the model was trained with data.features = {config.data.features}: "
            "prepare the set with --fbank " + ("linear-mel" if kind != "linear-mel" else "lhotse")
        )


def system_name(checkpoint: Path) -> str:
    """The exp_dir's name, less its -seedN."""
    return checkpoint.resolve().parent.name.rsplit("-seed", 1)[0]


def speakers_of(cuts: Path) -> dict[str, str]:
    """{cut id: speaker}, "" where none is known."""
    return {cut.id: next((each.speaker for each in cut.supervisions if each.speaker), "") for cut in load_cuts([cuts])}


def chosen_search(
    decode_dir: Path, tuned_on: str, method: str | None, layers: tuple[int, ...], heads: tuple[str, ...]
) -> tuple[str, dict[int, Options]]:
    """The search and its options at each exit, as bin/decode chose them on the set `tuned_on`.

    Args:
      decode_dir: with the records of that set.
      method: None for the one with the lowest WER of that set at the last exit.
    Returns:
      the method's name; {layer: options}.
    Raises:
      ValueError: where the records lack what is needed, with what does.
    """
    records = [DecodeRecord.load(path) for path in sorted(decode_dir.glob(f"{tuned_on}-exit-*.json"))]
    at_last = {r.method: r.wer for r in records if r.exit_layer == layers[-1] and r.method not in NOT_CHOSEN}
    if method is None:
        if not at_last:
            raise ValueError(
                f"{decode_dir} has no record of {tuned_on} at layer {layers[-1]}, of which to take the best search: "
                f"decode that set first (bin/decode --tune-set {tuned_on})"
            )
        method = min(at_last, key=at_last.__getitem__)
    if method not in METHODS or METHODS[method] not in heads or method in NOT_CHOSEN:
        known = [name for name, head in METHODS.items() if head in heads and name not in NOT_CHOSEN]
        raise ValueError(f"--method {method}: choose among {', '.join(known)}")
    options = {}
    for record in records:
        if record.method == method:
            told = record.config.get("decoding", {})
            weights = ("hlg_scale", "ngram_lm_scale", "blank_penalty")
            options[record.exit_layer] = tuple((name, told[name]) for name in weights if name in told)
    missing = [layer for layer in layers if layer not in options]
    if missing and method != "greedy_search":
        raise ValueError(
            f"{decode_dir} has no record of {method} on {tuned_on} at layers {', '.join(map(str, missing))}: what "
            f"weights to search with? Decode that set first (bin/decode --methods {method} --tune-set {tuned_on})"
        )
    return method, options


def make_method(name: str, lang_dir: Path | None, vocab_size: int, device: torch.device) -> Method:
    """One method, with whatever options it is given later."""
    return make_methods([name], lang_dir, vocab_size, device, Weights())[0]


def timed(device: torch.device, call: Callable) -> tuple:
    """What `call` returns, and the seconds it took."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started
