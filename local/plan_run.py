#!/usr/bin/env python3
"""Check a run's configuration, methods and exit policy before any work, and print what the driver needs to know."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from splitformer.cli import command
from splitformer.config import load_config
from splitformer.decoding.methods import methods_of
from splitformer.early_exit.names import DEFAULT, POLICIES
from splitformer.errors import UserError


@dataclass(frozen=True)
class Options:
    """Check a run's configuration, methods and exit policy; print `name=value` lines and the resolved configuration.

    features, noise_p, heads, batch_seconds and exits (their number) come from the configuration; methods are those to
    decode with, graphs is what they read from the lang_dir, as the option --graphs of prepare.sh takes it, and policy
    the exit policy.
    """

    config: Path
    """conf file (TOML)"""
    set: tuple[str, ...] = ()
    """overrides SECTION.KEY=VALUE"""
    methods: tuple[str, ...] = ()
    """decoding methods (default: those of the model's heads)"""
    policy: str = DEFAULT
    """exit policy"""
    released: bool = False
    """decode a given checkpoint, for which greedy search with the authors' correction is shown as well"""


def run(options: Options) -> None:
    config = load_config(options.config, options.set)
    heads = config.model.heads
    if options.policy not in POLICIES:
        raise UserError(f"--policy {options.policy}: choose one of {', '.join(POLICIES)}")
    names = list(options.methods) or None
    if names is None and options.released and heads == ("ctc",):
        names = ["greedy_search", "greedy_search+lexicon", "ctc-decoding", "1best"]
    methods = methods_of(names, heads)
    graphs = [name for name in ("HLG", "LG", "G") if any(f"{name}.pt" in method.graphs for method in methods)]
    if not graphs:
        graphs = ["words"] if any(method.words for method in methods) else ["none"]
    facts = {
        "features": config.data.features,
        "noise_p": config.augment.noise_p,
        "heads": " ".join(heads),
        "batch_seconds": config.data.max_duration,
        "exits": len(config.model.exit_layers),
        "methods": " ".join(method.name for method in methods),
        "graphs": " ".join(graphs),
        "policy": options.policy,
    }
    for name, value in facts.items():
        print(f"{name}={value}")
    print("config:")
    print(json.dumps(config.to_dict(), indent=1, sort_keys=True))


if __name__ == "__main__":
    sys.exit(command(run))
