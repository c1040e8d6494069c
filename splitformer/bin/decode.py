"""Decode test sets at every exit, or with an exit policy.

    python -m splitformer.bin.decode --checkpoint EXP/averaged.pt --cuts dev=CUTS test=CUTS --lang-dir LANG \
        --tune-set dev --output-dir EXP/decode --corpus NAME [--methods greedy_search 1best ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitformer.checkpoint import averaged
from splitformer.cli import command
from splitformer.decoding.decode import decode_sets, read_hot_words, system_name, tune_sets
from splitformer.decoding.loading import check_features, load_for_decoding, named_sets
from splitformer.decoding.methods import methods_of
from splitformer.decoding.searches import NOT_TUNED, Weights, make_methods
from splitformer.early_exit.decode import check_settled, decode_early
from splitformer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Decode test sets, and write the words, the errors and a JSON record for each exit and method.

    The weights of a method (of the language model, a blank penalty) are chosen for each exit on the --tune-set alone.
    With --exit-policy, the policy chooses the exit of each utterance, and there is one record for each set.
    """

    checkpoint: Path | None = None
    """checkpoint, such as averaged.pt of bin/average"""
    exp_dir: Path | None = None
    """instead of --checkpoint: folder of a training, whose epochs are averaged on the fly"""
    epoch: int | None = None
    """of --exp-dir: last epoch of the average (default: the newest)"""
    avg: int | None = None
    """of --exp-dir: epochs to average (default: training.average_epochs; training keeps that many and one more)"""
    cuts: tuple[str, ...]
    """sets to decode, as NAME=PATH"""
    lang_dir: Path
    """lang_dir of the training, with the graphs of the methods"""
    methods: tuple[str, ...] = ()
    """search methods (default: greedy_search, ctc-decoding and 1best for CTC alone, all with a transducer)"""
    exit: int | None = None
    """load and run the model up to the exit after this layer"""
    exit_policy: Path | None = None
    """policy.json of bin/calibrate, which chooses an exit for each utterance"""
    tune_set: tuple[str, ...] = ()
    """name of the set of --cuts on which weights are chosen; SET=NAME names another one for a single set"""
    hlg_scales: tuple[float, ...] = ()
    """weights of the language model to choose from, for CTC (1: unscaled)"""
    ngram_lm_scales: tuple[float, ...] = ()
    """weights of the language model to choose from, for a transducer"""
    blank_penalties: tuple[float, ...] = ()
    """blank penalties to choose from, in nats (0: none)"""
    hot_words: Path | None = None
    """phrases to favour, one per line, with prefix_beam_search, modified_beam_search and fast_beam_search"""
    hot_word_boost: float = 1.5
    """nats for each token of a phrase"""
    word_list: Path | None = None
    """words of greedy_search+lexicon, one per line; the first wins ties (default: words.txt of the lang_dir)"""
    output_dir: Path
    """folder of the results"""
    corpus: str
    """name of the corpus in the records"""
    system: str | None = None
    """name of the system in the records (default: that of the exp_dir, without -seedN)"""
    notice: str = ""
    """sentence that reports show above every table with these results"""
    max_duration: float = 60.0
    """seconds of audio in a batch"""


def run(options: Options) -> None:
    source = options.checkpoint or options.exp_dir
    if source is None or (options.checkpoint and options.exp_dir):
        raise UserError("give either --checkpoint FILE or --exp-dir DIR")
    if options.checkpoint and (options.epoch is not None or options.avg is not None):
        raise UserError("--epoch and --avg choose checkpoints of --exp-dir; leave them out, or give --exp-dir")
    weights = {name: getattr(options, name) for name in Weights._fields if getattr(options, name)}
    if not options.tune_set and (several := [name for name, values in weights.items() if len(values) > 1]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in several)
        raise UserError(f"{names}: several values to choose from; name the set to choose on with --tune-set")
    sets = named_sets("--cuts", options.cuts)
    if options.exit_policy:
        run_with_policy(options, options.exit_policy, sets, weights)
        return
    tune_set_of = tune_sets(options.tune_set, sets)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = options.checkpoint or averaged(source, options.epoch, options.avg)
    loaded = load_for_decoding(checkpoint, options.lang_dir, device, options.exit)
    for path in sets.values():
        check_features(path, loaded.config)
    hot_words = None
    if options.hot_words:
        hot_words = read_hot_words(options.hot_words, options.hot_word_boost, loaded.tokenizer)
    methods = make_methods(
        [method.name for method in methods_of(options.methods or None, loaded.config.model.heads)],
        options.lang_dir,
        loaded.tokenizer.vocab_size,
        device,
        Weights(**weights) if options.tune_set else NOT_TUNED._replace(**weights),
        hot_words,
        options.word_list,
    )
    decode_sets(
        loaded,
        methods,
        sets,
        tune_set_of,
        options.output_dir,
        options.corpus,
        options.system or system_name(source),
        options.max_duration,
        options.notice,
    )


def run_with_policy(options: Options, policy: Path, sets: dict[str, Path], weights: dict[str, Any]) -> None:
    if options.checkpoint is None:
        raise UserError("--exit-policy needs --checkpoint FILE: a policy belongs to the file that it was fitted for")
    given = {"tune_set": options.tune_set, "hot_words": options.hot_words, **weights}
    check_settled(policy, options.methods, [f"--{name.replace('_', '-')}" for name, value in given.items() if value])
    decode_early(
        policy,
        options.checkpoint,
        sets,
        options.lang_dir,
        options.output_dir,
        options.corpus,
        options.system,
        options.exit,
        options.max_duration,
        options.notice,
    )


if __name__ == "__main__":
    sys.exit(command(run))
