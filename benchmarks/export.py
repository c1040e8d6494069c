"""What exported models cost per exit beside PyTorch: time, memory, file size; and what 8 bits do to the words.

    python -m benchmarks.export --checkpoint EXP/averaged.pt --cuts CUTS --lang-dir LANG --output TABLES.md

CTC, utterances one at a time. PyTorch, TorchScript and onnxruntime go from features to log-probabilities; sherpa-onnx,
the client, from samples to text, with its own features and search. Each runtime has a process of its own, so that the
threads of one do not wait for the other's. Of each utterance the fastest of --rounds runs counts. Absolute times are
the machine's: look at the ratios, all of which are to PyTorch in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = ("PyTorch", "TorchScript", "ONNX fp32", "ONNX int8", "sherpa-onnx fp32", "sherpa-onnx int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cuts", type=Path, required=True)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--utterances", type=int, default=48, help="timed: the first so many; the WER is of all")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the tables there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = "\n".join(measure(args, Path(folder)))
    print(text)
    if args.output:
        from splitformer.files import atomic_write

        with atomic_write(args.output) as file:
            file.write("# Exported models beside PyTorch\n\n" + text)


def measure(args: argparse.Namespace, folder: Path) -> list[str]:
    """The tables, as lines; files are written to `folder`."""
    # here and not above, so that `peak_memory`'s processes load what they need alone
    import torch

    from splitformer.bin.export import Speech, word_errors
    from splitformer.checkpoint import load_model
    from splitformer.data.batches import load_cuts
    from splitformer.data.manifests import use_soundfile
    from splitformer.data.tokenizer import Tokenizer
    from splitformer.export.onnx_files import write_int8, write_onnx
    from splitformer.export.other_formats import write_torchscript
    from splitformer.export.wrappers import head_parts
    from splitformer.provenance import command_line

    use_soundfile()
    cuts = list(load_cuts([args.cuts]))
    timed = cuts[: args.utterances]
    inputs = {
        "features": [cut.load_features() for cut in timed],
        "samples": [cut.load_audio()[0].astype(np.float32) for cut in timed],
    }
    for kind, arrays in inputs.items():
        np.savez(folder / f"{kind}.npz", *arrays)
        np.savez(folder / f"longest_{kind}.npz", max(arrays, key=len))
    audio = sum(cut.duration for cut in timed)
    tokenizer = Tokenizer(args.lang_dir)
    (folder / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(tokenizer.tokens)), encoding="utf-8")
    features = [torch.from_numpy(cut.load_features()) for cut in cuts]
    utterances = [(x[None], torch.tensor([len(x)])) for x in features]
    speech = Speech([], utterances, [cut.supervisions[0].text for cut in cuts])

    layers = load_model(args.checkpoint)[1].model.exit_layers
    sizes: dict[tuple[int, str], int] = {}
    wers = []
    for layer in layers:
        model = load_model(args.checkpoint, exit_layer=layer)[0]
        (part,) = head_parts(model, "ctc")
        paths = files(folder, layer)
        write_torchscript(part, paths["TorchScript"], {})
        write_onnx(part, paths["ONNX fp32"], {})
        write_int8(paths["ONNX fp32"], paths["ONNX int8"])
        sizes |= {(layer, name): path.stat().st_size for name, path in paths.items() if path.is_file()}
        errors = [
            word_errors([paths[name]], "ctc", model, speech, tokenizer) for name in ("ONNX fp32", "ONNX int8")
        ]
        wers.append((layer, *errors))

    lines = [f"{len(timed)} utterances, {audio:.0f} s, one at a time; made by", "", f"    {command_line(ROOT)}", ""]
    for threads in args.threads:
        lines += [f"## Real-time factor, {threads} thread{'s' if threads > 1 else ''}", ""]
        lines += ["| layer | " + " | ".join(RUNTIMES) + " |", "|---:|" + "---:|" * len(RUNTIMES)]
        seconds = {}
        for name in RUNTIMES:
            given = [args.checkpoint, folder, threads, args.rounds, *layers]
            seconds[name] = in_a_process("tell_seconds", name, *given, threads=threads)
        for place, layer in enumerate(layers):
            total = {name: each[place] for name, each in seconds.items()}
            cells = [f"{total[n] / audio:.4f} ({total['PyTorch'] / total[n]:.1f} x)" for n in RUNTIMES]
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
        lines += ["", "In brackets: how many times as fast as PyTorch. sherpa-onnx computes features and text too.", ""]

    lines += ["## Peak memory in MB, one thread, the longest utterance", ""]
    lines += ["| layer | " + " | ".join(RUNTIMES) + " |", "|---:|" + "---:|" * len(RUNTIMES)]
    for layer in (layers[0], layers[-1]):
        cells = []
        for name in RUNTIMES:
            libraries, peak = in_a_process("tell_memory", name, args.checkpoint, folder, layer, threads=1)
            cells.append(f"{peak:.0f} ({peak - libraries:.0f})")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    lines += ["", "Of a process that does nothing else; in brackets without what it has once libraries are loaded.", ""]

    lines += ["## Files in MB, and WER of greedy search in 8 bits", ""]
    lines += ["| layer | TorchScript | ONNX fp32 | ONNX int8 | WER fp32 | WER int8 |", "|---:|" + "---:|" * 5]
    for layer, full, quantised in wers:
        cells = [f"{sizes[layer, name] / 1e6:.2f}" for name in RUNTIMES[1:4]]
        lines.append(f"| {layer} | " + " | ".join([*cells, f"{full.wer:.2f}", f"{quantised.wer:.2f}"]) + " |")
    lines += ["", f"WER in percent of {wers[0][1].ref_words} words, {len(cuts)} utterances, each alone.", ""]
    return lines


def files(folder: Path, layer: int) -> dict[str, Path]:
    """Runtime to its file."""
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
    """features (T, C), or samples for sherpa-onnx, to the answer, by one runtime."""
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
        from splitformer.export.wrappers import CtcExport

        module = CtcExport(load_model(checkpoint, exit_layer=layer)[0]).eval()

    def run(features: np.ndarray) -> Any:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(torch.from_numpy(features)[None], torch.tensor([len(features)]))

    return run


def in_a_process(function: str, *arguments: object, threads: int) -> list[float]:
    """What a function of this module prints, in a process that has loaded nothing else."""
    code = f"import sys; from benchmarks.export import {function}; {function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [float(each) for each in done.stdout.splitlines()[-1].split()]


def load_inputs(folder: str, name: str, stem: str = "") -> list[np.ndarray]:
    arrays = np.load(Path(folder) / f"{stem}{'samples' if name.startswith('sherpa') else 'features'}.npz")
    return [arrays[each] for each in arrays.files]


def tell_seconds(name: str, checkpoint: str, folder: str, threads: str, rounds: str, *layers: str) -> None:
    """Print for each layer the time of all utterances, of each the fastest run."""
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


def tell_memory(name: str, checkpoint: str, folder: str, layer: str) -> None:
    """Print MB after loading the libraries, and at the highest once the longest utterance has run thrice."""
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
    """MB of this process. Not getrusage's, which begin with those of the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    main()
