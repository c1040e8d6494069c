"""Export a checkpoint at some of its exits, and compare every file with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from splitformer.checkpoint import checkpoint_id, load_model
from splitformer.config import Config
from splitformer.data.batches import load_cuts
from splitformer.data.cut_features import load_all_frames
from splitformer.data.features import fbank_of_file, fbank_options, features_of
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.export import check, formats
from splitformer.export.wrappers import ExportError, Part, head_parts, stage_parts
from splitformer.files import atomic_write
from splitformer.model.asr import AsrModel
from splitformer.model.subsampling import SAMPLING_RATE
from splitformer.provenance import git_commit
from splitformer.scoring import Score, score

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3
"""Largest absolute difference from PyTorch that a file in float32 may have."""
INT8_AGREEMENT = 0.9
"""Smallest share of frames of speech in which an 8-bit file must have PyTorch's best symbol."""
MAX_CHECKED = 32
"""Number of utterances of --check that files are compared on; the WER of 8-bit files is that of all."""
CHECK_BATCH = 8
Compare = Callable[..., "list[check.Comparison]"]
"""Takes functions, the whole model and batches; returns a comparison of each function."""
FEATURES_METADATA = {
    "fbank": {"feature_type": "fbank", "frame_length_ms": "25", "window_type": "povey", "snip_edges": "0",
              "dither": "0", "low_freq": "20", "high_freq": "-400"},
    "linear-mel": {"feature_type": "linear-mel", "frame_length_ms": "20", "window_type": "hann", "n_fft": "1024"},
}
"""{data.features: what the files say about the features that the model takes}"""


@dataclass(frozen=True)
class ExportOptions:
    """Export a model, truncated at an exit, as ONNX, TorchScript or safetensors files.

    Files of the exit after layer 6: model-exit-06.onnx (CTC), {encoder,decoder,joiner}-exit-06.onnx (transducer),
    encoder-stage-01.onnx ... (--stages), each also as *.int8.onnx (--int8), and tokens.txt. Every file is compared with
    PyTorch and removed if it computes something else. docs/export.md describes the files and the comparison.
    """

    checkpoint: Path
    """EXP/averaged.pt, or the checkpoint of an epoch"""
    lang_dir: Path
    """lang_dir of the training"""
    output_dir: Path
    """folder to write to"""
    exit: tuple[int, ...] = ()
    """encoder layers of the exits to export"""
    all_exits: bool = False
    """export every exit"""
    format: Literal["onnx", "torchscript", "safetensors"] = "onnx"
    """format of the files"""
    head: Literal["ctc", "transducer"] | None = None
    """export this head only (default: all heads of the model)"""
    stages: bool = False
    """also write one ONNX file per exit up to the deepest one, each continuing from the one before"""
    int8: bool = False
    """also write each ONNX file with 8-bit weights"""
    opset: formats.Opset = formats.DEFAULT_OPSET
    """ONNX operator set"""
    check: tuple[Path, ...] = ()
    """audio files, or cuts with features (*.jsonl.gz), to compare with PyTorch on (default: random features)"""


def export_model(options: ExportOptions) -> None:
    """Write every requested file, compare it with PyTorch and print the result.

    Raise a UserError for options that do not go together, input that cannot be read, or a file that is wrong.
    """
    if bool(options.exit) == options.all_exits:
        raise ExportError("give either --exit LAYER ... or --all-exits")
    if options.format != "onnx" and (options.stages or options.int8):
        raise ExportError(f"--stages and --int8 need --format onnx, not {options.format}")
    whole, config, contents = load_model(options.checkpoint)
    tokenizer = Tokenizer(options.lang_dir)
    if tokenizer.tokens != contents.get("tokens"):
        raise ExportError(f"{options.lang_dir} has other tokens than the checkpoint: give the lang_dir of the training")
    if options.head and options.head not in config.model.heads:
        raise ExportError(f"--head {options.head}: the model has {', '.join(config.model.heads)}")
    layers = config.model.exit_layers if options.all_exits else sorted(set(options.exit))
    truncated = {layer: load_model(options.checkpoint, exit_layer=layer)[:2] for layer in layers}
    speech, metadata = read_speech(options.check, config), _metadata(config, options.checkpoint)
    with atomic_write(options.output_dir / "tokens.txt") as file:  # sherpa-onnx expects the blank first, as <blk>
        file.writelines(f"{token} {i}\n" for i, token in enumerate(tokenizer.tokens))
    if options.format == "safetensors":
        for layer, (model, its_config) in truncated.items():
            path = options.output_dir / f"model-exit-{layer:02d}.safetensors"
            _write_weights(model, its_config, tokenizer.tokens, path, metadata | {"exit_layer": str(layer)})
        return
    writer = Writer(options, whole, speech, metadata)
    for layer, (model, _) in truncated.items():
        for head in [options.head] if options.head else config.model.heads:
            compare = partial(check.compare_ctc if head == "ctc" else check.compare_transducer, layer=layer)
            files = writer.write_parts(head_parts(model, head), compare)
            if options.int8 and speech.texts:
                for name, some in (("fp32", files), ("int8", int8_files(files))):
                    errors = word_errors(some, model, speech, tokenizer)
                    print(f"exit {layer} {head} greedy {name}: WER {errors.wer:.2f} % of {errors.ref_words} words")
    if options.stages:
        writer.write_parts(stage_parts(truncated[layers[-1]][0]), check.compare_stages)


def _metadata(config: Config, checkpoint: Path) -> dict[str, str]:
    """Return what all files say about the model, its origin and its features."""
    model = config.model
    return {
        "version": "1",
        "comment": "Splitformer, an early-exit Conformer",
        "subsampling_factor": "4",
        "num_layers": str(model.num_layers),
        "exit_layers": ",".join(map(str, model.exit_layers)),
        "vocab_size": str(model.vocab_size),
        "checkpoint": checkpoint_id(checkpoint),
        "commit": git_commit(ROOT),
        "num_mel_bins": str(model.num_mel_bins),
        "cmvn": f"{model.cmvn}, in the graph",
        "sample_rate": str(SAMPLING_RATE),
        "frame_shift_ms": "10",
        **FEATURES_METADATA[config.data.features],
    }


class Speech(NamedTuple):
    """Utterances (1, T, C) to check files on; `texts` is empty unless all of them are cuts and one has a text."""

    utterances: list[check.Features]
    texts: list[str]


def read_speech(files: Sequence[Path], config: Config) -> Speech:
    """Return the features of audio files and of cuts, with the texts of the cuts.

    Raise a UserError if audio cannot be read, or the features of cuts are not those of the model.
    """
    features, texts = [], []
    for path in files:
        if ".jsonl" not in path.name:
            features.append(fbank_of_file(path, fbank_options(config)))
            continue
        for cut in load_cuts([path]):
            if (kind := features_of(cut)) != config.data.features:
                raise ExportError(f"--check {path}: cut {cut.id} has {kind or 'no'} features, and the model takes "
                                  f"{config.data.features}; give cuts that were prepared for it, or audio")  # fmt: skip
            features.append(torch.from_numpy(load_all_frames(cut)))
            texts.append(" ".join(each.text or "" for each in cut.supervisions))
    if files and not features:
        raise ExportError(f"--check {' '.join(map(str, files))}: there is no utterance")
    for x in features:
        if x.size(1) != config.model.num_mel_bins:
            raise ExportError(f"--check: {x.size(1)} mel bins, but the model takes {config.model.num_mel_bins}")
    utterances = [(x.unsqueeze(0), torch.tensor([len(x)])) for x in features]
    return Speech(utterances, texts if len(texts) == len(utterances) and any(texts) else [])


class Writer:
    """Writes files of one model, compares them with PyTorch and removes those that are wrong.

    Files in float32 are compared on utterances alone, in batches, and on random features of a few frames. 8-bit files
    are compared on utterances alone, because what they compute depends on the batch.
    """

    def __init__(self, options: ExportOptions, whole: AsrModel, speech: Speech, metadata: dict[str, str]) -> None:
        self.options, self.whole, self.metadata = options, whole, metadata
        alone = speech.utterances[:MAX_CHECKED]
        batches = [_padded(alone[i : i + CHECK_BATCH]) for i in range(0, len(alone), CHECK_BATCH)]
        noise = check.random_features(int(metadata["num_mel_bins"]))
        self.alone = check.run_pytorch(whole, alone)
        self.batches = self.alone + check.run_pytorch(whole, batches + (noise[-2:] if alone else noise))
        print(f"comparing with PyTorch on {len(alone) or 'no'} utterances of --check and on random features")

    def write_parts(self, parts: Sequence[Part], compare: Compare) -> list[Path]:
        """Write the files of one model, and their 8-bit copies if the options ask for them; return the former.

        Raise an ExportError if a file differs too much from PyTorch.
        """
        files = [self.options.output_dir / f"{part.stem}.{self.options.format}" for part in parts]
        with removed_on_error(files):
            for part, path in zip(parts, files):
                if path.suffix == ".onnx":
                    formats.write_onnx(part, path, self.metadata, self.options.opset)
                else:
                    formats.write_torchscript(part, path, self.metadata)
            for path, comparison in self._compare(files, compare, self.batches):
                if comparison.difference > TOLERANCE:
                    what = f"{path} differs from PyTorch by {comparison.difference:.3g}, more than {TOLERANCE:g}"
                    raise ExportError(f"{what}: the export or this machine's runtime is at fault; try another --opset")
        if self.options.int8:
            with removed_on_error(int8_files(files)):
                for path, quantised in zip(files, int8_files(files)):
                    formats.write_int8(path, quantised)
                for path, comparison in self._compare(int8_files(files), compare, self.alone or self.batches):
                    if self.alone and comparison.agreement < INT8_AGREEMENT:
                        what = f"{path} has PyTorch's best symbol in {100 * comparison.agreement:.1f} % of frames"
                        raise ExportError(f"{what}, less than {100 * INT8_AGREEMENT:g} %: export it without --int8")
        return files

    def _compare(
        self, files: Sequence[Path], compare: Compare, batches: Sequence[check.CheckBatch]
    ) -> list[tuple[Path, check.Comparison]]:
        """Return and print the comparison of each file."""
        compared = list(zip(files, compare(_functions(files), self.whole, batches=batches)))
        for path, comparison in compared:
            symbols = f", same best symbol in {100 * comparison.agreement:.1f} % of frames" if comparison.frames else ""
            _print_size(path, f"largest difference from PyTorch {comparison.difference:.1e}{symbols}")
        return compared


def _write_weights(model: AsrModel, config: Config, tokens: list[str], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file and read it back: the weights must be the same."""
    with removed_on_error([path]):
        formats.write_safetensors(model, config, tokens, path, metadata)
        state = formats.load_safetensors(path)[0].state_dict()
        if any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()):
            raise ExportError(f"{path} does not hold the weights that were written: is the disk damaged?")
    _print_size(path, "the same weights when read back")


def int8_files(files: Sequence[Path]) -> list[Path]:
    """Return the names of the 8-bit copies."""
    return [path.with_suffix(".int8.onnx") for path in files]


def _padded(utterances: Sequence[check.Features]) -> check.Features:
    x = torch.nn.utils.rnn.pad_sequence([x[0] for x, _ in utterances], batch_first=True, padding_value=-23.0259)
    return x, torch.cat([x_lens for _, x_lens in utterances])


@contextmanager
def removed_on_error(files: Sequence[Path]) -> Iterator[None]:
    """Remove all `files` if the block raises; an ExportError then names them."""
    try:
        yield
    except BaseException as error:
        for path in files:
            path.unlink(missing_ok=True)
        if isinstance(error, ExportError):
            raise ExportError(f"{error} (removed: {', '.join(map(str, files))})") from error
        raise


def _functions(files: Sequence[Path]) -> list[check.Function]:
    return [formats.onnx_function(path) if path.suffix == ".onnx" else torch.jit.load(str(path)) for path in files]


def _print_size(path: Path, result: str) -> None:
    size, parameters = path.stat().st_size / 1e6, formats.count_parameters(path) / 1e6
    print(f"{path}: {size:.2f} MB, {parameters:.3f} M parameters, {result}")


def word_errors(files: Sequence[Path], model: AsrModel, speech: Speech, tokenizer: Tokenizer) -> Score:
    """Return the errors of greedy search through one CTC file or three transducer files, each utterance alone."""
    functions, results = _functions(files), []
    for number, ((x, x_lens), text) in enumerate(zip(speech.utterances, speech.texts, strict=True)):
        if len(functions) == 1:
            [hypothesis] = ctc_greedy_search(*functions[0](x, x_lens))
        else:
            [hypothesis] = check.transducer_greedy(functions, model.decoder.context_size, x, x_lens)
        results.append((str(number), text.split(), tokenizer.decode(hypothesis.tokens).split()))
    return score(results)
