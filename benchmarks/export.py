"""Measure exported models at each exit beside PyTorch: time, memory, file size, and the WER of 8-bit files.

    python -m benchmarks.export --checkpoint EXP/averaged.pt --cuts CUTS --lang-dir LANG --output TABLES.md

CTC, one utterance at a time. PyTorch, TorchScript and onnxruntime compute log-probabilities from features; sherpa-onnx,
the client, computes text from samples, with its own features and search. Each runtime has its own process, so that the
threads of one do not wait for those of another. The fastest of --rounds runs of an utterance counts. Absolute times
depend on the machine: compare the ratios, which all refer to PyTorch in the same run.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# All other imports are inside functions, so that the measured processes load only what they need.
if TYPE_CHECKING:
    from lhotse.cut import Cut

    from splitformer.scoring import Score

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("PyTorch", "TorchScript", "ONNX fp32", "ONNX int8", "sherpa-onnx fp32", "sherpa-onnx int8")


@dataclass(frozen=True)
class Options:
    """Measure exported models at each exit beside PyTorch: time, memory, file size, and the WER of 8-bit files."""

    checkpoint: Path
    """EXP/averaged.pt"""
    cuts: Path
    """cuts with features, audio and texts"""
    lang_dir: Path
    """lang_dir of the training"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of threads to measure with"""
    utterances: int = 48
    """number of utterances that are timed; the WER is that of all"""
    rounds: int = 4
    """runs of each utterance, of which the fastest counts"""
    output: Path | None = None
    """also write the tables to this file"""


def run(options: Options) -> None:
    from splitformer.data.batches import load_cuts
    from splitformer.files import atomic_write
    from splitformer.provenance import command_line

    cuts = list(load_cuts([options.cuts]))
    timed = cuts[: options.utterances]
    audio = sum(cut.duration for cut in timed)
    lines = ["# Exported models beside PyTorch", ""]
    lines += [f"{len(timed)} utterances, {audio:.0f} s, one at a time; made by", "", f"    {command_line(ROOT)}", ""]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(timed, folder)
        wers = export_exits(options, cuts, folder)
        for threads in options.threads:
            lines += time_table(options, folder, list(wers), threads, audio)
        lines += memory_table(options, folder, list(wers))
        lines += size_table(folder, wers, len(cuts))
    text = "\n".join(lines)
    print(text)
    if options.output:
        with atomic_write(options.output) as file:
            file.write(text)


def write_inputs(cuts: list[Cut], folder: Path) -> None:
    """Write features.npz and samples.npz of the cuts, and of the longest one."""
    from splitformer.data.manifests import use_soundfile

    use_soundfile()
    inputs = {
        "features": [cut.load_features() for cut in cuts],
        "samples": [cut.load_audio()[0].astype(np.float32) for cut in cuts],
    }
    for kind, arrays in inputs.items():
        np.savez(folder / f"{kind}.npz", *arrays)
        np.savez(folder / f"longest_{kind}.npz", max(arrays, key=len))


def export_exits(options: Options, cuts: list[Cut], folder: Path) -> dict[int, tuple[Score, Score]]:
    """Write the files of every exit, and return {layer: errors of the ONNX file in 32 and in 8 bits}."""
    import torch

    from splitformer.checkpoint import load_model
    from splitformer.data.tokenizer import Tokenizer
    from splitformer.export.exporter import Speech, word_errors
    from splitformer.export.formats import write_int8, write_onnx, write_torchscript
    from splitformer.export.wrappers import head_parts

    tokenizer = Tokenizer(options.lang_dir)
    (folder / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(tokenizer.tokens)), encoding="utf-8")
    features = [torch.from_numpy(cut.load_features()) for cut in cuts]
    utterances = [(x[None], torch.tensor([len(x)])) for x in features]
    speech = Speech(utterances, [cut.supervisions[0].text or "" for cut in cuts])
    wers = {}
    for layer in load_model(options.checkpoint)[1].model.exit_layers:
        model = load_model(options.checkpoint, exit_layer=layer)[0]
        (part,) = head_parts(model, "ctc")
        paths = files(folder, layer)
        write_torchscript(part, paths["TorchScript"], {})
        write_onnx(part, paths["ONNX fp32"], {})
        write_int8(paths["ONNX fp32"], paths["ONNX int8"])
        fp32, int8 = (word_errors([paths[name]], model, speech, tokenizer) for name in ("ONNX fp32", "ONNX int8"))
        wers[layer] = fp32, int8
    return wers


def time_table(options: Options, folder: Path, layers: list[int], threads: int, audio: float) -> list[str]:
    lines = [f"## Real-time factor, {threads} thread{'s' if threads > 1 else ''}", ""]
    lines += ["| layer | " + " | ".join(RUNTIMES) + " |", "|---:|" + "---:|" * len(RUNTIMES)]
    given = [options.checkpoint, folder, threads, options.rounds, *layers]
    seconds = {name: in_process("print_seconds", name, *given, threads=threads) for name in RUNTIMES}
    for row, layer in enumerate(layers):
        total = {name: each[row] for name, each in seconds.items()}
        cells = [f"{total[n] / audio:.4f} ({total['PyTorch'] / total[n]:.1f} x)" for n in RUNTIMES]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    note = "In brackets: how many times as fast as PyTorch. sherpa-onnx computes features and text too."
    return [*lines, "", note, ""]


def memory_table(options: Options, folder: Path, layers: list[int]) -> list[str]:
    lines = ["## Peak memory in MB, one thread, the longest utterance", ""]
    lines += ["| layer | " + " | ".join(RUNTIMES) + " |", "|---:|" + "---:|" * len(RUNTIMES)]
    for layer in (layers[0], layers[-1]):
        cells = []
        for name in RUNTIMES:
            libraries, peak = in_process("print_memory", name, options.checkpoint, folder, layer, threads=1)
            cells.append(f"{peak:.0f} ({peak - libraries:.0f})")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    note = "Of a process that does nothing else; in brackets without the memory of the loaded libraries."
    return [*lines, "", note, ""]


def size_table(folder: Path, wers: dict[int, tuple[Score, Score]], utterances: int) -> list[str]:
    lines = ["## Files in MB, and WER of greedy search in 8 bits", ""]
    lines += ["| layer | TorchScript | ONNX fp32 | ONNX int8 | WER fp32 | WER int8 |", "|---:|" + "---:|" * 5]
    for layer, errors in wers.items():
        cells = [f"{files(folder, layer)[name].stat().st_size / 1e6:.2f}" for name in RUNTIMES[1:4]]
        lines.append(f"| {layer} | " + " | ".join([*cells, *(f"{each.wer:.2f}" for each in errors)]) + " |")
    words = next(iter(wers.values()))[0].ref_words
    return [*lines, "", f"WER in percent of {words} words, {utterances} utterances, each alone.", ""]


def files(folder: Path, layer: int) -> dict[str, Path]:
    """Return {runtime: its file}."""
    stem = f"model-exit-{layer:02d}"
    fp32, int8 = folder / f"{stem}.onnx", folder / f"{stem}.int8.onnx"
    return {
        "TorchScript": folder / f"{stem}.torchscript",
        "ONNX fp32": fp32,
        "ONNX int8": int8,
        "sherpa-onnx fp32": fp32,
        "sherpa-onnx int8": int8,
    }


def runner(name: str, checkpoint: Path, folder: Path, layer: int, threads: int) -> Callable[[np.ndarray], Any]:
    """Return the function of one runtime; it takes features (T, C), or samples for sherpa-onnx."""
    path = files(folder, layer).get(name)
    if name.startswith("sherpa"):
        import sherpa_onnx

        recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(
            model=str(path), tokens=str(folder / "tokens.txt"), num_threads=threads
        )

        def recognise(samples: np.ndarray) -> Any:
            stream = recognizer.create_stream()
            stream.accept_waveform(16000, samples)
            recognizer.decode_stream(stream)
            return stream.result.text

        return recognise
    if name.startswith("ONNX"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda features: session.run(None, {"x": features[np.newaxis], "x_lens": np.array([len(features)])})

    import torch

    if name == "TorchScript":
        module = torch.jit.load(str(path))
    else:
        from splitformer.checkpoint import load_model
        from splitformer.export.wrappers import head_parts

        module = head_parts(load_model(checkpoint, exit_layer=layer)[0], "ctc")[0].module

    def run(features: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(torch.from_numpy(features)[None], torch.tensor([len(features)]))

    return run


def in_process(function: str, *arguments: object, threads: int) -> list[float]:
    """Return what a function of this module prints, in a process that has loaded nothing else."""
    code = f"import sys; from benchmarks.export import {function}; {function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [float(each) for each in done.stdout.splitlines()[-1].split()]


def load_inputs(folder: str, name: str, stem: str = "") -> list[np.ndarray]:
    arrays = np.load(Path(folder) / f"{stem}{'samples' if name.startswith('sherpa') else 'features'}.npz")
    return [arrays[each] for each in arrays.files]


def print_seconds(name: str, checkpoint: str, folder: str, threads: str, rounds: str, *layers: str) -> None:
    """Print for each layer the time of all utterances, from the fastest run of each."""
    inputs, totals = load_inputs(folder, name), []
    for layer in layers:
        run = runner(name, Path(checkpoint), Path(folder), int(layer), int(threads))
        seconds = [float("inf")] * len(inputs)
        for _ in range(int(rounds)):
            for i, each in enumerate(inputs):
                started = time.perf_counter()
                run(each)
                seconds[i] = min(seconds[i], time.perf_counter() - started)
        totals.append(sum(seconds))
    print(*totals)


def print_memory(name: str, checkpoint: str, folder: str, layer: str) -> None:
    """Print the MB after loading the libraries, and the peak after three runs of the longest utterance."""
    needed = {"sherpa": ["sherpa_onnx"], "ONNX": ["onnxruntime"], "Torch": ["torch"]}
    needed |= {"PyTorch": ["torch", "splitformer.checkpoint", "splitformer.export.wrappers"]}
    for module in next(modules for start, modules in needed.items() if name.startswith(start)):
        importlib.import_module(module)
    libraries = memory("VmRSS")
    run = runner(name, Path(checkpoint), Path(folder), int(layer), 1)
    for _ in range(3):
        run(*load_inputs(folder, name, "longest_"))
    print(libraries, memory("VmHWM"))


def memory(what: str) -> float:
    """Return MB of this process. getrusage would include the peak of the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    from splitformer.cli import command

    sys.exit(command(run))
