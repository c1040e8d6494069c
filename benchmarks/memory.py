"""Peak memory of data preparation and of the start of training, and how it grows with the corpus.

    python -m benchmarks.memory [--utterances 2000 20000 200000] [--output TABLE.md]

Every step runs in a process of its own. The peak is that of the resident set above its size before the step, when all
modules are loaded and the step has run on a few utterances. The manifests are made up: many recordings refer to a few
short audio files, whose headers are read as usual. Linux only.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.utils import fastcopy

from splitformer.cli import command
from splitformer.config import Config
from splitformer.corpora.fbank import write_audio_cuts
from splitformer.corpora.manifests import write_split
from splitformer.corpora.tokens import train_tokenizer
from splitformer.corpora.validation import validate_split
from splitformer.data.manifests import Pair, read_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import DataOptions, TrainingData
from splitformer.errors import UserError
from splitformer.files import atomic_write
from splitformer.model.subsampling import SAMPLING_RATE
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "manifests": "written, recordings and supervisions",
    "validation": "of the manifests and the headers of the audio",
    "cuts": "written without features",
    "start": "of training: cuts indexed, batches of an epoch drawn",
    "resumption": "of training: batches of an epoch drawn, with the index there",
    "list": "of all cuts (for comparison)",
}
WORDS = ("THE", "OF", "AND", "A", "TO", "IN", "WAS", "HE", "THAT", "HIS", "IT", "WITH", "FOR", "WHICH", "BEFORE")
WARM_UP = 200
"""Utterances of the run before the measured one."""


@dataclass(frozen=True)
class Options:
    """Measure the peak memory of data preparation and of the start of training, and how it grows with the corpus."""

    utterances: tuple[int, ...] = (2000, 20_000, 200_000)
    """sizes of the corpus, two or more"""
    output: Path | None = None
    """write the table there as well"""


def run(options: Options) -> None:
    if len(options.utterances) < 2:
        raise UserError("--utterances: give two or more numbers, to see what grows")
    text = table(sorted(options.utterances))
    print(text)
    if options.output:
        with atomic_write(options.output) as file:
            file.write(text)


def pairs(folder: Path, count: int) -> Iterator[Pair]:
    """Yield `count` recordings of 2 to 17 s with 2.5 words per second."""
    templates = []
    for seconds in range(2, 18):
        path = folder / f"{seconds}.wav"
        if not path.is_file():
            soundfile.write(path, np.zeros(seconds * SAMPLING_RATE), SAMPLING_RATE)
        templates.append(Recording.from_file(path))
    rng = random.Random(0)
    for number in range(count):
        template = rng.choice(templates)
        name = f"speaker-{number % 1000:04d}-utterance-{number:08d}"
        text = " ".join(rng.choices(WORDS, k=int(2.5 * template.duration)))
        segment = SupervisionSegment(name, name, 0.0, template.duration, 0, text, speaker=name[:12])
        yield fastcopy(template, id=name), [segment]


def run_step(step: str, folder: Path, count: int) -> None:
    """Run one step, which reads what the step before wrote to `folder`."""
    split = folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"
    if step == "manifests":
        folder.mkdir(parents=True, exist_ok=True)
        write_split(pairs(folder, count), *split)
        (folder / "text").write_text("\n".join(WORDS))
        train_tokenizer(folder / "text", folder, "char")
    elif step == "validation":
        kept, _, _ = validate_split(*split)
        assert kept == count
    elif step == "cuts":
        write_audio_cuts(*split, folder / "cuts.jsonl.gz")
    elif step == "list":
        assert len(list(read_cuts(folder / "cuts.jsonl.gz"))) == count
    else:
        options = DataOptions([folder / "cuts.jsonl.gz"], on_the_fly=True)
        data = TrainingData(options, Config(), Tokenizer(folder), seed=0)
        assert data.report.kept == count
        assert len(data.plan(1).batch(0))


def measure(steps: list[str], folder: Path, count: int) -> dict[str, float]:
    """Run these steps in this process and return their peak memory (bytes above the size before) and time (seconds)."""
    for step in STEPS:
        run_step(step, folder / "warm-up", WARM_UP)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    started = time.perf_counter()
    for step in steps:
        run_step(step, folder / "measured", count)
    return {"bytes": resident("VmHWM") - before, "seconds": time.perf_counter() - started}


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak since the mark was reset) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/self/status has no {field}: this needs Linux")


def measure_in_new_process(steps: list[str], folder: Path, count: int) -> dict[str, float]:
    """Return the result of `measure` in a new process."""
    call = f"measure({steps}, pathlib.Path({str(folder)!r}), {count})"
    code = f"import json, pathlib; from benchmarks.memory import measure; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(counts: list[int]) -> str:
    lines = ["# Memory of data preparation and of the start of training", ""]
    lines += ["Peak resident set above that of the process with its modules loaded, in MB; made by", ""]
    lines += [f"    {command_line(ROOT)}", ""]
    lines += [f"| step | {' | '.join(f'{count:,} utterances' for count in counts)} | bytes per utterance | time |"]
    lines += ["|---|" + "---:|" * (len(counts) + 2)]
    results: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            for step in STEPS:
                results[step].append(measure_in_new_process([step], Path(folder), count))
                print(step, count, results[step][-1], file=sys.stderr)
    for step, description in STEPS.items():
        peaks = [result["bytes"] for result in results[step]]
        growth = (peaks[-1] - peaks[0]) / (counts[-1] - counts[0])
        cells = " | ".join(f"{peak / 1e6:.1f}" for peak in peaks)
        lines.append(f"| {step} {description} | {cells} | {growth:.0f} | {results[step][-1]['seconds']:.0f} s |")
    lines += ["", f"Bytes per utterance: growth from {counts[0]:,} to {counts[-1]:,}; time: of the largest corpus."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(command(run))
