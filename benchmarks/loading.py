"""Cost of loading training data: stored features, Lhotse Shar, features computed on the fly, and noise.

    ./prepare.sh --corpus an4 --stop-stage manifests
    python -m benchmarks.loading --recordings egs/an4/data/manifests/train_recordings.jsonl.gz \
        --supervisions egs/an4/data/manifests/train_supervisions.jsonl.gz [--output TABLE.md]

One process, one thread, batches of 100 s in the order of the plan, SpecAugment with its defaults; processor time, so
that other load on the machine counts little. The fastest of several rounds counts, after one that warms the disk's
cache. The noise is white, in files of 10 s. The index is that of the training cuts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse.utils import is_module_available

from splitformer.cli import command
from splitformer.config import AugmentConfig, Config, DataConfig
from splitformer.corpora.fbank import compute_fbank, write_audio_cuts
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import musan_pairs
from splitformer.corpora.shar import export_shar
from splitformer.corpora.tokens import train_tokenizer
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import read_supervisions
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import DataOptions, TrainingData
from splitformer.files import atomic_write
from splitformer.model.subsampling import SAMPLING_RATE
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4
BATCHES = 10
"""Batches of a round."""


@dataclass(frozen=True)
class Options:
    """Measure the cost of loading training data: stored features, Lhotse Shar, on the fly, and with noise."""

    recordings: Path
    supervisions: Path
    output: Path | None = None
    """write the table there as well"""


@dataclass(frozen=True)
class Row:
    """One kind of training data; `stored` is the folder that its features take."""

    data: TrainingData
    stored: Path | None


def run(options: Options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = table(make_rows(options.recordings, options.supervisions, Path(folder)))
    print(text)
    if options.output:
        with atomic_write(options.output) as file:
            file.write(text)


def make_rows(recordings: Path, supervisions: Path, folder: Path) -> dict[str, Row]:
    """Prepare the training data of every row in `folder`."""
    split = recordings, supervisions
    stored, audio, perturbed = (folder / f"{name}.jsonl.gz" for name in ("stored", "audio", "perturbed"))
    compute_fbank(*split, stored, folder / "feats", FbankOptions())
    write_audio_cuts(*split, audio)
    write_audio_cuts(*split, perturbed, speed_perturb=True)
    (folder / "text").write_text("\n".join(each.text or "" for each in read_supervisions(supervisions)))
    train_tokenizer(folder / "text", folder, "char")
    noise_stored, noise_audio = make_noise(folder)
    rows: dict[str, Row] = {}

    def add(name: str, size_of: Path | None, options: DataOptions) -> None:
        augment = AugmentConfig(noise_p=0.5 if options.noise_cuts else 0.0)
        config = Config(data=DataConfig(max_duration=100.0), augment=augment)
        rows[name] = Row(TrainingData(options, config, Tokenizer(folder), seed=0), size_of)

    add("stored", folder / "feats", DataOptions([stored]))
    export_shar(stored, folder / "numpy", "numpy")
    add("Shar, numpy", folder / "numpy", DataOptions([folder / "numpy"]))
    if is_module_available("lilcom"):
        export_shar(stored, folder / "lilcom", "lilcom")
        add("Shar, lilcom", folder / "lilcom", DataOptions([folder / "lilcom"]))
    add("on the fly", None, DataOptions([audio], on_the_fly=True))
    add("on the fly, two thirds of it speed-perturbed", None, DataOptions([perturbed], on_the_fly=True))
    add("stored, half of it with noise", folder / "feats", DataOptions([stored], [noise_stored]))
    add("on the fly, half of it with noise", None, DataOptions([audio], [noise_audio], on_the_fly=True))
    return rows


def make_noise(folder: Path) -> tuple[Path, Path]:
    """Make noise cuts with features, and with audio alone."""
    rng = np.random.default_rng(0)
    for number in range(20):
        path = folder / "musan/noise" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(10 * SAMPLING_RATE), SAMPLING_RATE)
    split = folder / "noise_recordings.jsonl.gz", folder / "noise_supervisions.jsonl.gz"
    write_split(musan_pairs(folder / "musan", Skipped()), *split)
    compute_fbank(*split, folder / "noise.jsonl.gz", folder / "noise_feats", FbankOptions())
    write_audio_cuts(*split, folder / "noise_audio.jsonl.gz")
    return folder / "noise.jsonl.gz", folder / "noise_audio.jsonl.gz"


def table(rows: dict[str, Row]) -> str:
    best = dict.fromkeys(rows, float("inf"))
    for number in range(ROUNDS + 1):
        for name, row in rows.items():  # in turns, so that other load on the machine affects all rows
            cost = milliseconds_per_second(row.data)
            if number:
                best[name] = min(best[name], cost)
    hours = rows["stored"].data.report.seconds / 3600
    lines = ["# Loading of training data", "", f"{hours:.2f} hours of speech; made by", ""]
    lines += [f"    {command_line(ROOT)}", ""]
    lines += ["| features | ms of a core per second of audio | ratio to stored | MB per hour | index, bytes per cut |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, row in rows.items():
        size = sum(p.stat().st_size for p in row.stored.rglob("*") if p.is_file()) / 1e6 / hours if row.stored else 0.0
        index = sum(path.stat().st_size for path in row.data.index.folder.iterdir()) / len(row.data.index)
        lines.append(f"| {name} | {best[name]:.2f} | {best[name] / best['stored']:.1f} | {size:.1f} | {index:.0f} |")
    return "\n".join(lines) + "\n"


def milliseconds_per_second(data: TrainingData) -> float:
    """Return the processor time per second of audio for the first batches of an epoch."""
    plan = data.plan(1)
    seconds, started = 0.0, time.process_time()
    for number, batch in enumerate(data.batches(plan, 1, 0, 1, range(1)), 1):
        seconds += batch.seconds
        if number == BATCHES:
            break
    return 1000 * (time.process_time() - started) / seconds


if __name__ == "__main__":
    sys.exit(command(run))
