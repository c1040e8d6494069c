"""Loading models, tokenizers and sets for the commands that decode."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from splitformer.checkpoint import load_model
from splitformer.config import Config
from splitformer.data.batches import load_cuts
from splitformer.data.features import EXTRACTOR_FOR, features_of
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.lang import lang_file
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model with its configuration, the contents of its checkpoint, and its tokenizer."""

    model: AsrModel
    config: Config
    contents: dict[str, Any]
    tokenizer: Tokenizer


def load_for_decoding(
    checkpoint: Path | Mapping[str, Any], lang_dir: Path, device: torch.device, exit_layer: int | None = None
) -> Loaded:
    """Load a checkpoint (a file, or its contents), truncated at `exit_layer`, and the tokenizer of its training.

    Raises:
      UserError: see load_model; or the tokens of lang_dir are not those of the training.
    """
    model, config, contents = load_model(checkpoint, device, exit_layer)
    lang_file(lang_dir, "bpe.model")
    tokenizer = Tokenizer(lang_dir)
    if tokenizer.tokens != contents["tokens"]:
        source = "the checkpoint" if isinstance(checkpoint, Mapping) else checkpoint
        raise UserError(
            f"{source} was trained with other tokens than those of {lang_dir} ({tokenizer.vocab_size} of them, "
            f"{config.model.vocab_size} in training): give the lang_dir of the training"
        )
    if exit_layer is not None:
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        size = sum(p.numel() * p.element_size() for p in [*parameters, *model.buffers()])
        log.info("up to layer %d: %.2f M parameters, %.1f MB in memory", exit_layer, count / 1e6, size / 1e6)
    return Loaded(model, config, contents, tokenizer)


def named_sets(option: str, items: Iterable[str]) -> dict[str, Path]:
    """Return {NAME: PATH} for the items NAME=PATH of an option. Raises UserError if there are no cuts at a path."""
    sets = {}
    for item in items:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise UserError(f"{option} {item!r}: expected NAME=PATH")
        if name in sets:
            raise UserError(f"{option}: {name} is given twice; give each set a name of its own")
        if next(iter(load_cuts([path])), None) is None:
            raise UserError(f"{option} {item}: there are no cuts in it; leave it out, or make it again (prepare.sh)")
        sets[name] = Path(path)
    return sets


def speakers_of(cuts: Path) -> dict[str, str]:
    """Return {cut id: speaker}; "" for an unknown speaker."""
    return {cut.id: next((each.speaker for each in cut.supervisions if each.speaker), "") for cut in load_cuts([cuts])}


def check_features(cuts: Path, config: Config) -> None:
    """Raise UserError if the stored features are not of the kind that the model was trained on."""
    first = next(iter(load_cuts([cuts])), None)
    stored, wanted = None if first is None else features_of(first), config.data.features
    if stored not in (None, wanted):
        raise UserError(
            f"{cuts} has {stored} features, and the model was trained with data.features = {wanted}: prepare the set "
            f"with --fbank {EXTRACTOR_FOR[wanted]}"
        )
