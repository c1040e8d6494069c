"""Fit an exit policy on a calibration set, so that it meets a target, and write policy.json.

    python -m splitformer.bin.calibrate --checkpoint EXP/averaged.pt --cuts dev=CUTS --test-cuts test=CUTS \
        --lang-dir LANG --policy learned_nbest --max-relative-wer 0.05

Every utterance of the set is run through all exits once and searched at each, by the search and with the weights that
bin/decode chose on that set. The setting is chosen with the set's speakers left out of the fit in turn.
`bin/decode --exit-policy EXP/policy.json` then applies the policy.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from splitformer.checkpoint import CheckpointError, checkpoint_id
from splitformer.config import ConfigError, ModelConfig
from splitformer.data.batches import Batch, evaluation_batches, load_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.loading import (
    check_features,
    chosen_search,
    load_for_decoding,
    make_method,
    named_sets,
    speakers_of,
    timed,
)
from splitformer.decoding.searches import Method, Options
from splitformer.early_exit.calibration import FAMILY_NAMES, WITHOUT_CTC, Fitted, Target, calibrate, make_family
from splitformer.early_exit.exit_table import ExitTable
from splitformer.early_exit.policies import FittedPolicy
from splitformer.early_exit.running import has_nan
from splitformer.early_exit.search import exit_view
from splitformer.early_exit.statistics import Meter
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import counted, transducer_heads
from splitformer.model.encoder import ExitOutput
from splitformer.provenance import command_line, git_commit
from splitformer.scoring import word_errors

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt")
    parser.add_argument("--cuts", required=True, metavar="NAME=PATH", help="the calibration set, such as dev=...")
    parser.add_argument(
        "--test-cuts",
        nargs="*",
        default=[],
        metavar="NAME=PATH",
        help="sets that results will be told on: none may share a speaker with the calibration set",
    )
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument(
        "--decode-dir", type=Path, help="records of bin/decode (default: decode/ beside the checkpoint)"
    )
    parser.add_argument("--method", help="the search (default: the best one of the records on the calibration set)")
    parser.add_argument("--policy", default="learned_nbest", choices=FAMILY_NAMES, help="(default: learned_nbest)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--max-relative-wer",
        type=float,
        metavar="X",
        help="errors at most (1 + X) times the last exit's (default: 0.05)",
    )
    target.add_argument("--target-layers", type=float, metavar="N", help="mean layers run, at most")
    target.add_argument(
        "--target-macs", type=float, metavar="X", help="share of the last exit's multiply-accumulates, at most"
    )
    target.add_argument("--target-rtf", type=float, metavar="X", help="real-time factor on this machine, at most")
    target.add_argument(
        "--deadline-ms", type=float, metavar="MS", help="with --policy deadline: milliseconds for each utterance"
    )
    parser.add_argument("--exit", type=int, metavar="L", help="of a model that ends at this exit")
    parser.add_argument("--repeats", type=int, default=2, help="timings of each utterance, the shortest counts")
    parser.add_argument("--output", type=Path, help="(default: policy.json beside the checkpoint)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        fit_policy(args)
    except (CheckpointError, ConfigError, FileNotFoundError, ValueError) as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    return 0


def fit_policy(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    [(name, path)] = named_sets("--cuts", [args.cuts]).items()
    check_calibration_set(name, path, named_sets("--test-cuts", args.test_cuts))
    target = _target(args)
    model, config, _, tokenizer = load_for_decoding(args.checkpoint, args.lang_dir, device, args.exit_layer)
    check_model(config.model, [args.policy])
    check_features(path, config)
    layers = config.model.exit_layers
    decode_dir = args.decode_dir or args.checkpoint.parent / "decode"
    method_name, options = chosen_search(decode_dir, name, args.method, layers, config.model.heads)
    method = make_method(method_name, args.lang_dir, tokenizer.vocab_size, device)
    table = collect(model, path, tokenizer, method, options, device, args.repeats, f"all exits of {name}")

    family = make_family(args.policy, "layers" if target and target.kind == "layers" else "macs")
    if target is None:
        policy = family.fit(table)(args.deadline_ms / 1000)
        setting, did = family.describe(args.deadline_ms / 1000), {}
    else:
        fitted = calibrate(table, family, target)
        policy, setting, did = fitted.policy, fitted.setting, _told(fitted)
    output = args.output or args.checkpoint.parent / "policy.json"
    FittedPolicy(
        title=args.policy,
        policy=policy,
        exit_layers=layers,
        checkpoint=checkpoint_id(args.checkpoint),
        method=method_name,
        options={layer: dict(each) for layer, each in options.items()},
        fitted_on={
            "set": name,
            "utterances": len(table),
            "speakers": sorted(set(table.speakers) - {""}),
            "without_speaker": [cut for cut, speaker in zip(table.utterances, table.speakers) if not speaker],
            "target": str(target or f"deadline_ms {args.deadline_ms:g}"),
            "setting": setting,
            "unseen_speakers": did,
            "machine": platform.processor() or platform.machine(),
            "commit": git_commit(ROOT),
            "command": command_line(ROOT),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    ).save(output)
    told = ", ".join(f"{key} {value:.4g}" for key, value in did.items())
    log.info("%s for %s, %s: %s", args.policy, target or "the deadline", setting, told or "no choice")
    print(output)


def _told(fitted: Fitted) -> dict[str, float]:
    return {
        "wer": fitted.wer,
        "last_exit_wer": fitted.last_wer,
        "layers": fitted.layers,
        "macs_share": fitted.macs_share,
        "rtf": fitted.rtf,
    }


def _target(args: argparse.Namespace) -> Target | None:
    """None for a deadline in milliseconds, which is the setting itself."""
    if args.deadline_ms is not None:
        if args.policy != "deadline" or not 0 < args.deadline_ms < math.inf:
            raise ValueError(f"--deadline-ms {args.deadline_ms:g} is for --policy deadline, and above 0")
        return None
    given = {"max_relative_wer": args.max_relative_wer, "layers": args.target_layers}
    given |= {"macs": args.target_macs, "rtf": args.target_rtf}
    kind, value = next(
        ((kind, value) for kind, value in given.items() if value is not None), ("max_relative_wer", 0.05)
    )
    if kind == "max_relative_wer":
        if not 0 <= value < math.inf:
            raise ValueError(f"the target {kind} {value:g} must be 0 or above, such as 0.05")
    elif not 0 < value < math.inf:
        raise ValueError(f"the target {kind} {value:g} must be above 0")
    if kind == "macs" and value > 1:
        raise ValueError(f"--target-macs {value:g} is a share of the last exit's multiply-accumulates: at most 1")
    return Target(kind, value)


def check_calibration_set(name: str, path: Path, tests: Mapping[str, Path]) -> None:
    """Raises ValueError where the set is a test set, or shares an utterance or a known speaker with one."""
    if name in tests or re.search("(?<![a-z])test(?![a-z])", name.lower()):
        raise ValueError(
            f"{name} is a test set: what is fitted on it cannot be told on it. Calibrate on a dev set (--cuts dev=PATH)"
        )
    ours = speakers_of(path)
    for test, test_path in tests.items():
        theirs = speakers_of(test_path)
        for what, shared in (
            ("utterances", ours.keys() & theirs.keys()),
            ("speakers", (set(ours.values()) & set(theirs.values())) - {""}),
        ):
            if shared:
                raise ValueError(
                    f"{name} and the test set {test} share {len(shared)} {what} ({', '.join(sorted(shared)[:5])}): a "
                    "policy fitted on them cannot be told there; calibrate on a set of other speakers"
                )


def check_model(model: ModelConfig, policies: Sequence[str]) -> None:
    """Raises ValueError where the model has no exits to choose from, or lacks the head that a policy reads."""
    if len(model.exit_layers) == 1:
        raise ValueError(
            f"the model has one exit, after layer {model.exit_layers[0]}: there is nothing to choose; take a model "
            "with several (model.exit_layers)"
        )
    strangers = [policy for policy in policies if policy not in WITHOUT_CTC]
    if "ctc" not in model.heads and strangers:
        raise ValueError(
            f"{', '.join(strangers)}: read from CTC's log-probabilities, and this model's heads are "
            f"{', '.join(model.heads)}; choose among {', '.join(WITHOUT_CTC)}"
        )


@torch.no_grad()
def collect(
    model: AsrModel,
    cuts: Path,
    tokenizer: Tokenizer,
    method: Method,
    options: Mapping[int, Options],
    device: torch.device,
    repeats: int = 2,
    doing: str = "all exits",
) -> ExitTable:
    """Run every utterance through all exits, alone, and search each: what any policy would have seen and given.

    Times are the shortest of `repeats` runs, so that what else the machine does counts less.
    """
    speakers = speakers_of(cuts)
    names = ["entropy", "entropy_non_blank", "posterior", "nbest_posterior", "disagreement"]
    if "ctc" not in model.heads:
        names = []
    rows: list[dict[str, list[float]]] = []
    utterances, seconds, ref_words = [], [], []
    batches: Iterable[Batch] = evaluation_batches(load_cuts([cuts]), tokenizer, None, max_cuts=1)
    for batch in tqdm(batches, desc=doing, unit="cut", total=len(speakers), disable=None, leave=False):
        batch = batch.to(device)
        reference = batch.texts[0].split()
        runs = [_all_exits(model, batch, method, options, names, tokenizer, reference) for _ in range(repeats)]
        row = {key: value for key, value in runs[0].items() if not key.startswith("seconds:")}
        row |= {
            key: [min(each) for each in zip(*(run[key] for run in runs))]
            for key in runs[0]
            if key.startswith("seconds:")
        }
        rows.append(row | _multiply_accumulates(model, batch, method))
        utterances.append(batch.cut_ids[0])
        seconds.append(batch.seconds)
        ref_words.append(len(reference))

    def column(key: str) -> Tensor:
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    encoder, heads = column("seconds:encoder"), column("seconds:head")
    frames = column("frames")
    statistics = {name: column(name) for name in names}
    statistics |= {"frames": frames, "batch_frames": frames, "elapsed": encoder + heads.cumsum(dim=1)}
    return ExitTable(
        layers=model.encoder.exit_layers,
        utterances=utterances,
        speakers=[speakers[utterance] for utterance in utterances],
        audio_seconds=torch.tensor(seconds, dtype=torch.float64),
        ref_words=torch.tensor(ref_words, dtype=torch.float64),
        errors=column("errors"),
        statistics=statistics,
        encoder_macs=column("encoder_macs"),
        head_macs=column("head_macs"),
        search_macs=column("search_macs"),
        encoder_seconds=encoder,
        head_seconds=heads,
        search_seconds=column("seconds:search"),
        statistic_seconds={name: column(f"seconds:{name}") for name in names},
    )


def _all_exits(
    model: AsrModel,
    batch: Batch,
    method: Method,
    options: Mapping[int, Options],
    names: list[str],
    tokenizer: Tokenizer,
    reference: list[str],
) -> dict[str, list[float]]:
    """One utterance at every exit: {statistic: values}, errors, and {"seconds:" + what: times}."""
    row: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        row.setdefault(key, []).append(value)

    def doubt(_: Tensor, exit_output: ExitOutput, log_probs: Tensor | None) -> Tensor:
        return method.run_with_uncertainty(exit_view(model, exit_output, log_probs), chosen)[2]

    meters = {name: Meter(1, (name,), doubt) for name in names}
    first = torch.zeros(1, dtype=torch.long, device=batch.x.device)
    exits = model.encoder(batch.x, batch.x_lens)
    encoder_seconds = 0.0
    while True:
        exit_output, seconds = timed(batch.x.device, lambda: next(exits, None))
        if exit_output is None:
            return row
        encoder_seconds += seconds
        chosen = options.get(exit_output.layer, method.default)
        log_probs, head_seconds = None, 0.0
        if "ctc" in model.heads:
            log_probs, head_seconds = timed(batch.x.device, lambda out=exit_output: model.ctc_log_probs(out))
        _check_sound(exit_output, log_probs, batch.cut_ids[0])
        for name, meter in meters.items():
            if name == "nbest_posterior" and exit_output.lengths[0] == 0:
                measured, seconds = {name: torch.zeros(1, 1)}, 0.0
            else:
                measured, seconds = timed(
                    batch.x.device, lambda m=meter, out=exit_output, lp=log_probs: m.measure(first, out, lp)
                )
            note(name, float(measured[name][0, -1]))
            note(f"seconds:{name}", seconds)
        view = exit_view(model, exit_output, log_probs)
        (hypotheses, _), search_seconds = timed(batch.x.device, lambda v=view, o=chosen: method.run(v, o))
        words = hypotheses[0].words
        words = tokenizer.decode(hypotheses[0].tokens).split() if words is None else words
        note("errors", word_errors(reference, words))
        note("frames", int(exit_output.lengths[0]))
        note("seconds:encoder", encoder_seconds)
        note("seconds:head", head_seconds)
        note("seconds:search", search_seconds)


def _check_sound(exit_output: ExitOutput, log_probs: Tensor | None, utterance: str) -> None:
    """Raises ValueError where the exit gives NaN: decoding passes such an exit, and a table has no place for that."""
    if has_nan(exit_output.encoder_out if log_probs is None else log_probs, exit_output.lengths).any():
        raise ValueError(
            f"the exit after layer {exit_output.layer} gives NaN for {utterance}, and nothing can be fitted to that: "
            "has the training diverged? Take another checkpoint, or end the model below (bin/calibrate --exit)"
        )


def _multiply_accumulates(model: AsrModel, batch: Batch, method: Method) -> dict[str, list[float]]:
    heads = {"head_macs": getattr(model, "ctc_heads", {})}
    heads["search_macs"] = transducer_heads(model) if method.head == "transducer" else {}
    row: dict[str, list[float]] = {"encoder_macs": [], "head_macs": [], "search_macs": []}
    with counted(model.encoder) as encoder:
        for exit_output in model.encoder(batch.x, batch.x_lens):
            row["encoder_macs"].append(encoder.macs)
            for key, of_layer in heads.items():
                row[key].append(0)
                if str(exit_output.layer) in of_layer:
                    head = of_layer[str(exit_output.layer)]
                    with counted(head) as own:
                        head(exit_output.encoder_out)
                    row[key][-1] = own.macs
    return row


if __name__ == "__main__":
    sys.exit(main())
