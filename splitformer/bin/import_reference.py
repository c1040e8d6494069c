"""Make a checkpoint of ours from what the authors released: a state dict, or several to average, and their tokens.

    python -m splitformer.bin.import_reference --state FILE [FILE ...] --bpe-model FILE --output DIR/averaged.pt \
        [--lang-dir DIR] [--case upper] [--config CONF.toml]

The shape of the model is read from the state dict: a Splitformer, an early-exit Conformer, or their U-Net. The tokens
go into the lang_dir, as `bpe.model` and `tokens.txt`, under the numbers that this project gives them; the rows of the
model's heads follow. Nothing in the files is executed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path

from splitformer.checkpoint import CheckpointError, save_checkpoint
from splitformer.config import Config, ConfigError, DataConfig, ModelConfig, load_config
from splitformer.corpora.tokens import CASES, import_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.export.reference import (
    convert_reference_state,
    infer_model_config,
    load_reference_states,
    reorder_heads,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, nargs="+", required=True, help="state dicts; of several, their mean")
    parser.add_argument("--bpe-model", type=Path, required=True, help="the sentencepiece model of their training")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint to write, such as DIR/averaged.pt")
    parser.add_argument("--lang-dir", type=Path, help="where the tokens go (default: the checkpoint's folder)")
    parser.add_argument("--config", type=Path, help="a conf that the model must be of, which the checkpoint then has")
    parser.add_argument("--num-heads", type=int, help="attention heads, which a state dict does not tell (default: 8)")
    parser.add_argument(
        "--blank-id", type=int, default=0, help="their number of CTC's blank (default: 0, as the released code has it)"
    )
    parser.add_argument(
        "--case", choices=CASES, default="keep", help="case of the pieces: that of the transcripts (default: keep)"
    )
    args = parser.parse_args()
    try:
        import_reference(args)
    except (CheckpointError, ConfigError, FileNotFoundError, ValueError) as error:
        print(f"import_reference: {error}", file=sys.stderr)
        return 1
    return 0


def import_reference(args: argparse.Namespace) -> None:
    """Write `args.output`, and the tokens into `args.lang_dir`.

    Raises:
      CheckpointError, ValueError: files that are not what they should be; a conf of another model.
    """
    config = load_config(args.config) if args.config else Config(data=DataConfig(features="linear-mel"))
    num_heads = args.num_heads or (config.model.num_heads if args.config else 8)
    state = load_reference_states(args.state)
    inferred = infer_model_config(state, num_heads)
    if args.config:
        _check_same(config.model, inferred, args)
        inferred = dataclasses.replace(config.model, vocab_size=inferred.vocab_size)
    model = convert_reference_state(state, inferred)

    lang_dir = args.lang_dir or args.output.parent
    rows = import_tokenizer(args.bpe_model, lang_dir, inferred.vocab_size, args.blank_id, args.case)
    config = dataclasses.replace(config, model=dataclasses.replace(inferred, vocab_size=len(rows)),)
    save_checkpoint(
        args.output,
        {
            "model": reorder_heads(model, rows),
            "config": config.to_dict(),
            "tokens": Tokenizer(lang_dir).tokens,
            # nothing is known of the training, and 0 is what records of an untrained model say
            "progress": {"epoch": 0, "step": 0, "seconds": 0.0},
            "epoch": 0,
            "avg": len(args.state),
            "seed": 0,
            "world_size": 1,
            "device": "none",
            "imported_from": {
                "states": {path.name: _checksum(path) for path in args.state},
                "bpe_model": {args.bpe_model.name: _checksum(args.bpe_model)},
                "blank_id": args.blank_id,
                "units": rows,
            },
        },
    )
    kind = "U-Net" if inferred.encoder == "unet" else f"parallel layers at {list(inferred.parallel_exits)}"
    print(
        f"{args.output}: exits at {list(inferred.exit_layers)}, {kind}, d_model {inferred.d_model}, {num_heads} heads, "
        f"{len(rows)} units; tokens in {lang_dir}"
    )


def _check_same(wanted: ModelConfig, found: ModelConfig, args: argparse.Namespace) -> None:
    """What a state dict says of the shape is what the conf says."""
    names = ["encoder", "num_mel_bins", "d_model", "num_heads", "feedforward_dim", "conv_kernel", "num_layers"]
    names += ["exit_layers", "parallel_exits", "unet_stacks"]
    different = [
        f"model.{name} = {getattr(wanted, name)} there, {getattr(found, name)} here"
        for name in names
        if getattr(wanted, name) != getattr(found, name)
    ]
    if different:
        raise ValueError(f"{args.config} is of another model than {args.state[0]}: {'; '.join(different)}")


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
