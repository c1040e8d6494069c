"""Train one system: the losses of its heads at every exit, on cuts that prepare.sh made.

    python -m splitformer.bin.train --config CONF --exp-dir EXP --train-cuts CUTS \
        --dev-cuts CUTS --lang-dir LANG [--seed 42] [--resume] [--set optim.base_lr=0.003]

Under `torchrun --standalone --nproc_per_node N` it trains on N GPUs, or on N CPU processes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from splitformer.config import Config, ConfigError, load_config
from splitformer.training.distributed import process_group
from splitformer.training.loop import RunOptions, Trainer, TrainingError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="conf file (TOML)")
    parser.add_argument("--exp-dir", type=Path, required=True, help="for epoch-N.pt, training.jsonl and tensorboard/")
    parser.add_argument("--train-cuts", type=Path, nargs="+", required=True)
    parser.add_argument("--dev-cuts", type=Path, nargs="+", required=True)
    parser.add_argument("--lang-dir", type=Path, required=True, help="with bpe.model and tokens.txt")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num-workers", type=int, default=1, help="processes that load data, for each rank")
    parser.add_argument("--resume", action="store_true", help="go on from the newest epoch-N.pt, if there is one")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value of the conf"
    )
    args = parser.parse_args()

    with process_group() as ranks:
        logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(asctime)s %(message)s")
        options = RunOptions(
            exp_dir=args.exp_dir,
            train_cuts=args.train_cuts,
            dev_cuts=args.dev_cuts,
            lang_dir=args.lang_dir,
            seed=args.seed,
            num_workers=args.num_workers,
            resume=args.resume,
        )
        try:
            config = load_config(args.config, args.set)
            Trainer(config, options, ranks, _transducer_loss(config)).train()
        except (ConfigError, TrainingError, FileNotFoundError, ValueError) as error:
            print(f"train: {error}", file=sys.stderr)
            return 1
    return 0


def _transducer_loss(config: Config) -> type | None:
    """The class of the transducer's loss, where `config` has transducer heads: CTC trains without k2."""
    if "transducer" not in config.model.heads:
        return None
    try:
        from splitformer.losses.pruned_transducer import PrunedTransducerLoss
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.heads = {list(config.model.heads)} trains a transducer, whose loss needs k2 ({error}): use the "
            'environment of ./setup.sh, or heads = ["ctc"]'
        ) from None
    return PrunedTransducerLoss


if __name__ == "__main__":
    sys.exit(main())
