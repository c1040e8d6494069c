"""What preparing and starting to train take of memory, and how it grows with the corpus, on manifests made here.

    python -m benchmarks.memory [--utterances 2000 20000 200000] [--output TABLE.md]

Each step runs in a process of its own. What counts is by how much its peak resident set is above what it had before,
with all modules loaded and after a run on a few utterances. The audio is a few short files, each the source of many
recordings: headers are read as ever, samples are not. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.utils import fastcopy

from splitformer.config import AugmentConfig, DataConfig
from splitformer.corpora.fbank import write_audio_cuts
from splitformer.corpora.manifests import write_split
from splitformer.corpora.tokens import train_tokenizer
from splitformer.corpora.validation import validate_split
from splitformer.data.features import SAMPLING_RATE, FbankOptions
from splitformer.data.manifests import Pair, read_cuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import TrainingData
from splitformer.files import atomic_write
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "manifests": "written of recordings and supervisions",
    "validation": "of the manifests and the audio's headers",
    "cuts": "written without features",
    "start": "of training: the cuts indexed, the batches of an epoch drawn",
    "resumption": "of training: the index is there, the batches of an epoch drawn",
    "list": "of all cuts, which nothing here makes: for comparison",
}
WORDS = ("THE", "OF", "AND", "A", "TO", "IN", "WAS", "HE", "THAT", "HIS", "IT", "WITH", "FOR", "WHICH", "BEFORE")
WARM = 200
"""utterances of a run before the one that counts"""


def pairs(folder: Path, count: int) -> Iterator[Pair]:
    """So many recordings of 2 to 17 s with 2.5 words a second."""
    templates = []
    for seconds in range(2, 18):
        path = folder / f"{seconds}.wav"
        if not path.is_file():
            soundfile.write(path, np.zeros(seconds * SAMPLING_RATE), SAMPLING_RATE)
        templates.append(Recording.from_file(path))
    draw = random.Random(0)
    for number in range(count):
        template = draw.choice(templates)
        name = f"speaker-{number % 1000:04d}-utterance-{number:08d}"
        text = " ".join(draw.choices(WORDS, k=int(2.5 * template.duration)))
        segment = SupervisionSegment(name, name, 0.0, template.duration, 0, text, speaker=name[:12])
        yield fastcopy(template, id=name), [segment]


def run_step(step: str, folder: Path, count: int) -> None:
    """One step, which reads what the one before wrote to `folder`."""
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
        data = TrainingData(
            [folder / "cuts.jsonl.gz"],
            Tokenizer(folder),
            DataConfig(),
            AugmentConfig(),
            folder / "index",
            seed=0,
            on_the_fly=FbankOptions(),
        )
        assert data.report.kept == count
        assert len(data.plan(1).batch(0))


def measure(steps: list[str], folder: Path, count: int) -> dict[str, float]:
    """Peak of these steps, one after the other, above what this process had before: bytes; and the seconds."""
    for step in STEPS:
        run_step(step, folder / "warm", WARM)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    started = time.perf_counter()
    for step in steps:
        run_step(step, folder / "measured", count)
    return {"bytes": resident("VmHWM") - before, "seconds": time.perf_counter() - started}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most, since the mark was set) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}: this needs Linux")


def measured(steps: list[str], folder: Path, count: int) -> dict[str, float]:
    """As `measure`, in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", *steps]
    command += ["--folder", str(folder), "--utterances", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(counts: list[int]) -> str:
    lines = ["# Memory of preparation and of training's start", ""]
    lines += ["Peak resident set above that of the process with its modules loaded, in MB; made by", ""]
    lines += [f"    {command_line(ROOT)}", ""]
    lines += [f"| step | {' | '.join(f'{count:,} utterances' for count in counts)} | bytes per utterance | time |"]
    lines += ["|---|" + "---:|" * (len(counts) + 2)]
    found: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            for step in STEPS:
                found[step].append(measured([step], Path(folder), count))
                print(step, count, found[step][-1], file=sys.stderr)
    for step, what in STEPS.items():
        peaks = [each["bytes"] for each in found[step]]
        growth = (peaks[-1] - peaks[0]) / (counts[-1] - counts[0])
        cells = " | ".join(f"{peak / 1e6:.1f}" for peak in peaks)
        lines.append(f"| {step}, {what} | {cells} | {growth:.0f} | {found[step][-1]['seconds']:.0f} s |")
    lines += ["", f"Bytes per utterance: from {counts[0]:,} to {counts[-1]:,}; the time is that of the largest."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, nargs="+", default=[2000, 20_000, 200_000])
    parser.add_argument("--output", type=Path, help="write the table there as well")
    parser.add_argument("--measure", nargs="+", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.folder, args.utterances[0])))
        return
    if len(args.utterances) < 2:
        parser.error("--utterances: give two or more numbers, to see what grows")
    text = table(sorted(args.utterances))
    print(text)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(text)


if __name__ == "__main__":
    main()
