"""Draw WER against cost for every exit policy: fitted on a calibration set, shown on test sets.

    python -m splitformer.bin.tradeoff --checkpoint EXP/averaged.pt --cuts dev=CUTS --test-cuts test=CUTS \
        --lang-dir LANG --output-dir EXP/early_exit --corpus NAME

Writes tradeoff-TEST.json for each test set, which bin/report turns into tables and plots, and exits/SET.json, what
every exit gave for every utterance.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from splitformer.bin.calibrate import check_calibration_set, check_model, collect
from splitformer.checkpoint import CheckpointError
from splitformer.config import ConfigError
from splitformer.decoding.loading import (
    check_features,
    chosen_search,
    load_for_decoding,
    make_method,
    named_sets,
    system_name,
)
from splitformer.early_exit.calibration import FAMILY_NAMES, WITHOUT_CTC, make_family
from splitformer.early_exit.exit_table import fixed
from splitformer.early_exit.tradeoff import tradeoff
from splitformer.provenance import command_line, git_commit
from splitformer.report.records import TradeoffRecord

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
DYNAMIC = tuple(name for name in FAMILY_NAMES if name != "fixed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt")
    parser.add_argument("--cuts", required=True, metavar="NAME=PATH", help="the calibration set, such as dev=...")
    parser.add_argument("--test-cuts", nargs="+", required=True, metavar="NAME=PATH", help="of other speakers")
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument(
        "--decode-dir", type=Path, help="records of bin/decode (default: decode/ beside the checkpoint)"
    )
    parser.add_argument("--method", help="the search (default: the best one of the records on the calibration set)")
    parser.add_argument("--policies", nargs="+", choices=DYNAMIC, help="(default: all that the model has heads for)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--corpus", required=True, help="the name that the records carry")
    parser.add_argument("--system", help="likewise (default: the exp_dir's name, less its -seedN)")
    parser.add_argument("--repeats", type=int, default=2, help="timings of each utterance, the shortest counts")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        draw_curves(args)
    except (CheckpointError, ConfigError, FileNotFoundError, ValueError) as error:
        print(f"tradeoff: {error}", file=sys.stderr)
        return 1
    return 0


def draw_curves(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    [(name, path)] = named_sets("--cuts", [args.cuts]).items()
    tests = named_sets("--test-cuts", args.test_cuts)
    check_calibration_set(name, path, tests)
    model, config, checkpoint, tokenizer = load_for_decoding(args.checkpoint, args.lang_dir, device)
    policies = args.policies or [name for name in DYNAMIC if "ctc" in config.model.heads or name in WITHOUT_CTC]
    check_model(config.model, policies)
    for each in (path, *tests.values()):
        check_features(each, config)
    layers = config.model.exit_layers
    decode_dir = args.decode_dir or args.checkpoint.parent / "decode"
    method_name, options = chosen_search(decode_dir, name, args.method, layers, config.model.heads)
    method = make_method(method_name, args.lang_dir, tokenizer.vocab_size, device)

    tables = {}
    for each, cuts in {name: path, **tests}.items():
        tables[each] = collect(model, cuts, tokenizer, method, options, device, args.repeats, f"all exits of {each}")
        tables[each].save(args.output_dir / "exits" / f"{each}.json")
    for test in tests:
        table = tables[test]
        audio, last = float(table.audio_seconds.sum()), fixed(table, layers[-1])
        found = tradeoff(
            tables[name],
            table,
            [make_family(policy) for policy in policies],
            draws=args.draws,
            progress=lambda families, test=test: tqdm(families, desc=f"policies on {test}", disable=None, leave=False),
        )
        TradeoffRecord(
            corpus=args.corpus,
            system=args.system or system_name(args.checkpoint),
            seed=checkpoint["seed"],
            test_set=test,
            calibration_set=name,
            method=method_name,
            exit_layers=layers,
            num_utterances=len(table),
            ref_words=int(table.ref_words.sum()),
            audio_seconds=audio,
            last_wer=100.0 * float(last.errors.sum() / table.ref_words.sum()),
            last_macs_per_second=float(last.macs.sum()) / audio,
            last_rtf=float(last.seconds.sum()) / audio,
            points=found.points,
            savings=found.savings,
            budgets=found.budgets,
            commit=git_commit(ROOT),
            command=command_line(ROOT),
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        ).save(args.output_dir / f"tradeoff-{test}.json")
        for saving in found.savings:
            if saving.allowed == 0.05:
                log.info(
                    "%s %s, calibrated to +5 %%: %+.1f %% relative WER (95 %%: %+.1f to %+.1f), %.0f %% of MACs saved",
                    test,
                    saving.policy,
                    100 * saving.relative_wer,
                    100 * saving.relative_wer_low,
                    100 * saving.relative_wer_high,
                    100 * saving.macs_saved,
                )


if __name__ == "__main__":
    sys.exit(main())
