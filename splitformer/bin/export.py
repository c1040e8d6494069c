"""Write a model, cut off at an exit, for machines that have none of this: ONNX, TorchScript or safetensors.

    python -m splitformer.bin.export --checkpoint EXP/averaged.pt --lang-dir LANG --exit 6 --output-dir DIR \
        [--exit 2 ... | --all-exits] [--format onnx|torchscript|safetensors] [--head ctc|transducer] [--int8] \
        [--stages] [--check CUTS.jsonl.gz | AUDIO ...]

Files of the exit after layer 6: model-exit-06.onnx (CTC), {encoder,decoder,joiner}-exit-06.onnx (transducer),
encoder-stage-01.onnx ... (with --stages, one per exit up to the deepest that is asked for), *.int8.onnx and tokens.txt.
The layers above are in none of them. Every file is run beside PyTorch after it is written; one that computes something
else is removed. docs/export.md tells how to use them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitformer.checkpoint import CheckpointError, checkpoint_id, load_model
from splitformer.config import Config, ConfigError
from splitformer.data.batches import load_cuts
from splitformer.data.features import SAMPLING_RATE, FbankOptions, fbank_of_file
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.export.check import (
    TOLERANCE,
    Features,
    Function,
    ctc_difference,
    difference,
    random_features,
    reference_exits,
    stage_differences,
    transducer_differences,
    transducer_greedy,
)
from splitformer.export.onnx_files import (
    DEFAULT_OPSET,
    check_opset,
    count_parameters,
    onnx_function,
    write_int8,
    write_onnx,
)
from splitformer.export.other_formats import load_safetensors, write_safetensors, write_torchscript
from splitformer.export.wrappers import ExportError, Part, head_parts, stage_parts
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.provenance import git_commit
from splitformer.scoring import score

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {"onnx": ".onnx", "torchscript": ".torchscript", "safetensors": ".safetensors"}
CHECKED_UTTERANCES = 8
"""of --check, for the comparison with PyTorch; the WER of int8 is that of all"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="EXP/averaged.pt of bin/average, or an epoch")
    parser.add_argument("--lang-dir", type=Path, required=True)
    exits = parser.add_mutually_exclusive_group(required=True)
    exits.add_argument("--exit", type=int, action="append", metavar="L", help="the exit after layer L; may be repeated")
    exits.add_argument("--all-exits", action="store_true")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--head", choices=("ctc", "transducer"), help="(default: all that the model has)")
    parser.add_argument("--stages", action="store_true", help="also one file per exit, each going on from the last")
    parser.add_argument("--int8", action="store_true", help="also each ONNX file with its weights in 8 bits")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, help="of ONNX (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--check",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="audio, or cuts (*.jsonl.gz) with features, to compare with PyTorch on (default: random features)",
    )
    args = parser.parse_args()
    try:
        export(args)
    except (CheckpointError, ConfigError, ExportError, FileNotFoundError, ValueError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True)
class Speech:
    """What files are compared with PyTorch on; `texts` where the WER can be told, one for each of `utterances`."""

    batches: list[Features]
    utterances: list[Features]
    texts: list[str]


def export(args: argparse.Namespace) -> None:
    """Write and check every file that is asked for.

    Raises:
      ExportError: for options that do not go together, and for a file that computes something else than PyTorch.
      CheckpointError, FileNotFoundError, ValueError: a checkpoint, lang_dir or audio that cannot be read.
    """
    check_opset(args.opset)
    if args.format != "onnx" and (args.stages or args.int8):
        raise ExportError(f"--stages and --int8 are for --format onnx, not {args.format}")
    whole, config, contents = load_model(args.checkpoint)
    tokenizer = Tokenizer(args.lang_dir)
    if tokenizer.tokens != contents.get("tokens"):
        raise ValueError(f"{args.checkpoint} was trained with other tokens than those of {args.lang_dir}: give the "
                         "lang_dir of the training")  # fmt: skip
    layers = config.model.exit_layers if args.all_exits else sorted(set(args.exit))
    heads = [args.head] if args.head else list(config.model.heads)
    strangers = [head for head in heads if head not in config.model.heads]
    if strangers:
        raise ExportError(f"--head {strangers[0]}: the model has {', '.join(config.model.heads)}")
    models = {layer: load_model(args.checkpoint, exit_layer=layer)[:2] for layer in layers}
    extractor = "lhotse" if config.data.features == "fbank" else config.data.features
    speech = _speech(args.check, FbankOptions(extractor, config.model.num_mel_bins))
    common = _metadata(config, args.checkpoint)
    _write_tokens(tokenizer.tokens, args.output_dir / "tokens.txt")

    for layer, (model, cut_config) in models.items():
        told = {**common, "exit_layer": str(layer)}
        if args.format == "safetensors":
            path = args.output_dir / f"model-exit-{layer:02d}.safetensors"
            write_safetensors(model, cut_config, tokenizer.tokens, path, told)
            with _removed_if_wrong([path]):
                _report(path, _safetensors_difference(path, whole, layer, speech.batches))
            continue
        for head in heads:
            files = _write(head_parts(model, head), args, told)
            with _removed_if_wrong(files):
                functions = [_function(path) for path in files]
                for path, found in zip(files, _differences(functions, head, whole, layer, speech.batches)):
                    _report(path, found)
            if args.int8:
                _quantise(files, head, whole, layer, speech, tokenizer)
    if args.stages:
        model = models[max(layers)][0]
        files = _write(stage_parts(model), args, common)
        with _removed_if_wrong(files):
            functions = [_function(path) for path in files]
            for path, found in zip(files, stage_differences(functions, model, speech.batches)):
                _report(path, found)
        if args.int8:
            quantised = _write_int8(files)
            with _removed_if_wrong(quantised):
                functions = [_function(path) for path in quantised]
                for path, found in zip(quantised, stage_differences(functions, model, speech.batches)):
                    _report(path, found, ANY_NUMBER)


def _metadata(config: Config, checkpoint: Path) -> dict[str, str]:
    """What every file tells: the model, where it comes from and the features that it wants."""
    model = config.model
    return {
        "version": "1",
        "comment": "Splitformer, an early-exit Conformer",
        "num_layers": str(model.num_layers),
        "exit_layers": ",".join(map(str, model.exit_layers)),
        "vocab_size": str(model.vocab_size),
        "subsampling_factor": "4",
        "checkpoint": checkpoint_id(checkpoint),
        "commit": git_commit(ROOT),
        "feature_type": "fbank",
        "num_mel_bins": str(model.num_mel_bins),
        "cmvn": f"{model.cmvn}, in the graph",
        "sample_rate": str(SAMPLING_RATE),
        "frame_length_ms": "25",
        "frame_shift_ms": "10",
        "window_type": "povey",
        "snip_edges": "0",
        "dither": "0",
        "low_freq": "20",
        "high_freq": "-400",
    }


def _write_tokens(tokens: list[str], path: Path) -> None:
    """tokens.txt from the ids of the training: `symbol id`, the blank, which sherpa-onnx wants as <blk>, first."""
    with atomic_write(path) as file:
        file.writelines(f"{token} {i}\n" for i, token in enumerate(tokens))


def _write(parts: list[Part], args: argparse.Namespace, metadata: dict[str, str]) -> list[Path]:
    files = []
    for part in parts:
        path = args.output_dir / f"{part.stem}{FORMATS[args.format]}"
        if args.format == "onnx":
            write_onnx(part, path, metadata, args.opset)
        else:
            write_torchscript(part, path, metadata)
        files.append(path)
    return files


def _function(path: Path) -> Function:
    return onnx_function(path) if path.suffix == ".onnx" else torch.jit.load(str(path))


def _differences(
    functions: list[Function], head: str, whole: AsrModel, layer: int, batches: list[Features]
) -> tuple[float, ...]:
    if head == "ctc":
        return (ctc_difference(functions[0], whole, layer, batches),)
    return transducer_differences(*functions, whole, layer, batches)


class _removed_if_wrong:
    """Leave none of `files` behind where the check of one fails."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is not None:
            for path in self.files:
                path.unlink(missing_ok=True)


def _report(path: Path, found: float, tolerance: float = TOLERANCE) -> None:
    """Raises ExportError where the file is farther from PyTorch than `tolerance`."""
    if not found <= tolerance:
        raise ExportError(
            f"{path} differs from PyTorch by {found:.3g}, more than {tolerance:g}, and was removed; this is a fault of "
            "the export or of this machine's runtime: try another --opset"
        )
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, {_count(path) / 1e6:.3f} M parameters, largest difference from "
        f"PyTorch {found:.1e}"
    )


def _count(path: Path) -> int:
    """Parameters in the file; for ONNX with the scales of quantised weights and a few constants."""
    if path.suffix == ".onnx":
        return count_parameters(path)
    module = torch.jit.load(str(path)) if path.suffix == ".torchscript" else load_safetensors(path)[0]
    return sum(each.numel() for each in module.parameters())


def _safetensors_difference(path: Path, whole: AsrModel, layer: int, batches: list[Features]) -> float:
    """The model read back against the whole one; of the exit's output where it has no CTC head."""
    model = load_safetensors(path)[0]
    if "ctc" in model.heads:

        def run(x: torch.Tensor, x_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = reference_exits(model, x, x_lens)[layer]
            return model.ctc_log_probs(found), found.lengths

        return ctc_difference(run, whole, layer, batches)
    largest = 0.0
    for x, x_lens in batches:
        found, expected = (reference_exits(each, x, x_lens)[layer] for each in (model, whole))
        largest = max(largest, difference(found.encoder_out, found.lengths, expected.encoder_out, expected.lengths))
    return largest


# ---- int8


ANY_NUMBER = 1e30
"""As a tolerance: 8 bits may differ by any number, but not by NaN."""


def _quantise(
    files: list[Path], head: str, whole: AsrModel, layer: int, speech: Speech, tokenizer: Tokenizer
) -> None:
    """Write 8-bit copies, and tell how far they are from PyTorch and, where there are texts, from the words."""
    quantised = _write_int8(files)
    with _removed_if_wrong(quantised):
        functions = [_function(path) for path in quantised]
        for path, found in zip(quantised, _differences(functions, head, whole, layer, speech.batches)):
            _report(path, found, ANY_NUMBER)
    if speech.texts:
        for name, these in (("fp32", files), ("int8", quantised)):
            errors = word_errors(these, head, whole, speech, tokenizer)
            print(f"exit {layer} {head} greedy {name}: WER {errors.wer:.2f} % of {errors.ref_words} words")


def _write_int8(files: list[Path]) -> list[Path]:
    quantised = [path.with_suffix(".int8.onnx") for path in files]
    for path, int8_path in zip(files, quantised):
        write_int8(path, int8_path)
    return quantised


def word_errors(files: list[Path], head: str, model: AsrModel, speech: Speech, tokenizer: Tokenizer) -> Any:
    """The `Score` of greedy search through ONNX files, each utterance alone: 8 bits depend on the batch."""
    search = greedy_search(files, head, model)
    found = []
    for number, ((x, x_lens), text) in enumerate(zip(speech.utterances, speech.texts, strict=True)):
        found.append((str(number), text.split(), tokenizer.decode(search(x, x_lens)).split()))
    return score(found)


def greedy_search(
    files: list[Path], head: str, model: AsrModel
) -> Callable[[torch.Tensor, torch.Tensor], list[int]]:
    """x (1, T, C) with x_lens (1,) to tokens."""
    functions = [_function(path) for path in files]

    def search(x: torch.Tensor, x_lens: torch.Tensor) -> list[int]:
        if head == "ctc":
            return ctc_greedy_search(*functions[0](x, x_lens))[0].tokens
        return transducer_greedy(*functions, model.decoder.context_size, x, x_lens)[0].tokens

    return search


# ---- speech to check on


def _speech(files: Iterable[Path] | None, options: FbankOptions) -> Speech:
    """Features of audio or cuts; random ones without either."""
    num_mel_bins = options.num_mel_bins
    if files is None:
        return Speech(random_features(num_mel_bins), [], [])
    utterances, texts = [], []
    for path in files:
        if ".jsonl" in path.name:
            for cut in load_cuts([path]):
                if not cut.has_features:
                    raise ValueError(f"{path}: cut {cut.id} has no features; give cuts of prepare.sh, or audio files")
                utterances.append(_alone(torch.from_numpy(cut.load_features())))
                texts.append(" ".join(each.text or "" for each in cut.supervisions))
        else:
            utterances.append(_alone(fbank_of_file(path, options)))
    for x, _ in utterances[:1]:
        if x.size(2) != num_mel_bins:
            raise ValueError(f"--check: features of {x.size(2)} mel bins, and the model takes {num_mel_bins}")
    if not utterances:
        raise ValueError("--check: no utterance in the files given")
    some = utterances[:CHECKED_UTTERANCES]
    together = torch.nn.utils.rnn.pad_sequence([x[0] for x, _ in some], batch_first=True, padding_value=-23.0259)
    batches = [*some[:2], (together, torch.cat([lens for _, lens in some])), *random_features(num_mel_bins)[-2:]]
    return Speech(batches, utterances, texts if len(texts) == len(utterances) else [])


def _alone(features: torch.Tensor) -> Features:
    return features.unsqueeze(0), torch.tensor([len(features)])


if __name__ == "__main__":
    sys.exit(main())
