"""Train one system: the losses of its heads at every exit, on cuts that prepare.sh made.

    python -m splitformer.bin.train --config CONF --exp-dir EXP --train-cuts CUTS \
        --dev-cuts CUTS --lang-dir LANG [--seed 42] [--resume] [--set optim.base_lr=0.003]

Under `torchrun --nproc_per_node N --rdzv_backend c10d --rdzv_endpoint localhost:0` it trains on N GPUs, or in N CPU
processes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from splitformer.checkpoint import CheckpointError
from splitformer.config import Config, ConfigError, load_config
from splitformer.data.cut_index import DataError
from splitformer.report.tables import markdown_table
from splitformer.training.distributed import process_group
from splitformer.training.lock import LockError, locked
from splitformer.training.loop import RunOptions, Trainer, TrainingError
from splitformer.training.precision import PRECISIONS
from splitformer.training.stopping import Stopped

log = logging.getLogger(__name__)
STOPPED = 143
"""exit status of a run that was asked to stop, as a shell has it for SIGTERM: callers must not take it for finished"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="conf file (TOML)")
    parser.add_argument("--exp-dir", type=Path, required=True, help="for epoch-N.pt, training.jsonl and tensorboard/")
    parser.add_argument("--train-cuts", type=Path, nargs="+", required=True, help="manifests, or Lhotse Shar folders")
    parser.add_argument("--dev-cuts", type=Path, nargs="+", required=True)
    parser.add_argument("--lang-dir", type=Path, required=True, help="with bpe.model and tokens.txt")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num-workers", type=int, default=1, help="processes that load data, for each rank")
    parser.add_argument("--on-the-fly", action="store_true", help="compute features of training data from audio")
    parser.add_argument(
        "--noise-cuts", type=Path, nargs="+", default=[], help="mixed in with probability augment.noise_p"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument(
        "--init-from", type=Path, metavar="CHECKPOINT", help="start from these weights, as far as they fit"
    )
    parser.add_argument(
        "--freeze-encoder-layers", type=int, default=0, metavar="N", help="the front end and N layers are not trained"
    )
    parser.add_argument(
        "--accum-grad", type=int, default=1, help="parts in which a rank takes its share of a batch: less memory"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of products; auto: by the device")
    parser.add_argument(
        "--save-minutes", type=float, default=15.0, help="between checkpoints inside an epoch; 0: after every step"
    )
    parser.add_argument(
        "--max-skipped", type=int, default=10, help="batches in a row without finite gradients that are borne"
    )
    parser.add_argument(
        "--timeout-minutes", type=float, default=30.0, help="after which ranks give up waiting for one another"
    )
    parser.add_argument(
        "--inspect", action="store_true", help="print statistics of every layer and exit for the next batch, and end"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value of the conf"
    )
    args = parser.parse_args()

    with process_group(args.timeout_minutes) as ranks:
        logging.basicConfig(level=logging.INFO if ranks.is_main else logging.WARNING, format="%(asctime)s %(message)s")
        options = RunOptions(
            exp_dir=args.exp_dir,
            train_cuts=args.train_cuts,
            dev_cuts=args.dev_cuts,
            lang_dir=args.lang_dir,
            seed=args.seed,
            num_workers=args.num_workers,
            resume=args.resume,
            accum_grad=args.accum_grad,
            precision=args.precision,
            save_minutes=args.save_minutes,
            max_skipped=args.max_skipped,
            inspect=args.inspect,
            timeout_minutes=args.timeout_minutes,
            on_the_fly=args.on_the_fly,
            noise_cuts=tuple(args.noise_cuts),
            init_from=args.init_from,
            freeze_encoder_layers=args.freeze_encoder_layers,
        )
        try:
            config = load_config(args.config, args.set)
            with locked(args.exp_dir) if ranks.is_main else nullcontext():
                trainer = Trainer(config, options, ranks, _transducer_loss(config))
                if not args.inspect:
                    trainer.train()
                elif ranks.is_main:
                    _print_inspection(trainer)
        except Stopped as stopped:
            log.info("%s", stopped)
            return STOPPED
        except (TrainingError, CheckpointError, DataError, LockError, OSError, ValueError) as error:
            print(f"train: {error}", file=sys.stderr)
            return 1
    return 0


def _print_inspection(trainer: Trainer) -> None:
    layers, exits = trainer.inspect()
    header = ["output of", "rms", "largest", "gradient rms", "weight rms", "not finite"]
    rows = []
    for each in layers:
        values = (each.rms, each.largest, each.gradient_rms, each.weight_rms)
        rows.append([each.name, *(f"{value:.3g}" for value in values), f"{100 * each.not_finite:.2g} %"])
    progress = trainer.progress
    print(f"epoch {progress.epoch + 1}, batch {progress.batch}, before step {progress.step + 1}\n")
    print(markdown_table(header, rows))
    if exits:
        rows = [[f"{each.layer}", f"{each.loss:.3f}", f"{each.blank:.3f}", f"{each.entropy:.3f}"] for each in exits]
        print("\n" + markdown_table(["exit", "CTC loss", "blank posterior", "entropy"], rows))


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
