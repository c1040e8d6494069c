"""What it costs to load training data: stored features, Lhotse Shar, or features computed on the fly; noise mixed in.

    ./prepare.sh --corpus an4 --stop-stage manifests
    python -m benchmarks.loading --recordings egs/an4/data/manifests/train_recordings.jsonl.gz \
        --supervisions egs/an4/data/manifests/train_supervisions.jsonl.gz [--output TABLE.md]

One process, one thread, batches of 100 s in the plan's order, SpecAugment as it is by default; the fastest of several
rounds counts, after one that warms the disk's cache. Look at the ratios. The noise is white, in files of 10 s.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse.utils import is_module_available

from splitformer.config import AugmentConfig, DataConfig
from splitformer.corpora.fbank import compute_fbank, write_audio_cuts
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.musan import musan_pairs
from splitformer.corpora.shar import export_shar
from splitformer.corpora.tokens import train_tokenizer
from splitformer.data.features import SAMPLING_RATE, FbankOptions
from splitformer.data.manifests import read_supervisions
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import TrainingData
from splitformer.files import atomic_write
from splitformer.provenance import command_line

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--supervisions", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="write the table there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        text = table(args.recordings, args.supervisions, Path(folder))
    print(text)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(text)


def table(recordings: Path, supervisions: Path, folder: Path) -> str:
    split, options = (recordings, supervisions), FbankOptions()
    stored, audio, fast = folder / "stored.jsonl.gz", folder / "audio.jsonl.gz", folder / "fast.jsonl.gz"
    compute_fbank(*split, stored, folder / "feats", options)
    write_audio_cuts(*split, audio)
    write_audio_cuts(*split, fast, speed_perturb=True)
    (folder / "text").write_text("\n".join(each.text or "" for each in read_supervisions(supervisions)))
    train_tokenizer(folder / "text", folder, "char")
    noise_stored, noise_audio = make_noise(folder, options)

    noisy = AugmentConfig(noise_p=0.5)
    rows: dict[str, tuple[TrainingData, Path | None]] = {}

    def add(name: str, cuts: Path, size_of: Path | None, **how: object) -> None:
        how = {"augment": AugmentConfig(), **how}
        augment = how.pop("augment")
        data = DataConfig(max_duration=100.0)
        place = folder / f"index-{len(rows)}"
        made = TrainingData([cuts], Tokenizer(folder), data, augment, place, seed=0, **how)  # type: ignore[arg-type]
        rows[name] = made, size_of

    add("stored", stored, folder / "feats")
    for packing in ("numpy", "lilcom") if is_module_available("lilcom") else ("numpy",):
        export_shar(stored, folder / packing, packing)
        add(f"Shar, {packing}", folder / packing, folder / packing)
    add("on the fly", audio, None, on_the_fly=options)
    add("on the fly, two thirds of it speed-perturbed", fast, None, on_the_fly=options)
    add("stored, half of it with noise", stored, folder / "feats", augment=noisy, noise_cuts=[noise_stored])
    add("on the fly, half of it with noise", audio, None, augment=noisy, noise_cuts=[noise_audio], on_the_fly=options)

    best = dict.fromkeys(rows, float("inf"))
    for number in range(ROUNDS + 1):
        for name, (data, _) in rows.items():  # in turns: whatever else the machine does, does it to all
            cost = milliseconds_per_second(data)
            if number:
                best[name] = min(best[name], cost)
    hours = rows["stored"][0].report.seconds / 3600
    lines = ["# Loading of training data", "", f"{hours:.2f} hours of speech; made by", ""]
    lines += [f"    {command_line(ROOT)}", ""]
    lines += ["| features | ms of one core per second of audio | times those of stored | MB per hour |"]
    lines += ["|---|---:|---:|---:|"]
    for name, (_, size_of) in rows.items():
        size = sum(p.stat().st_size for p in size_of.rglob("*") if p.is_file()) / 1e6 / hours if size_of else 0.0
        lines.append(f"| {name} | {best[name]:.2f} | {best[name] / best['stored']:.1f} | {size:.1f} |")
    return "\n".join(lines) + "\n"


def make_noise(folder: Path, options: FbankOptions) -> tuple[Path, Path]:
    """Noise cuts, with features and with audio alone."""
    draw = np.random.default_rng(0)
    for number in range(20):
        path = folder / "musan/noise" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * draw.standard_normal(10 * SAMPLING_RATE), SAMPLING_RATE)
    split = folder / "noise_recordings.jsonl.gz", folder / "noise_supervisions.jsonl.gz"
    write_split(musan_pairs(folder / "musan", Skipped()), *split)
    compute_fbank(*split, folder / "noise.jsonl.gz", folder / "noise_feats", options)
    write_audio_cuts(*split, folder / "noise_audio.jsonl.gz")
    return folder / "noise.jsonl.gz", folder / "noise_audio.jsonl.gz"


def milliseconds_per_second(data: TrainingData) -> float:
    """Of the first batches of an epoch."""
    plan = data.plan(1)
    seconds, started = 0.0, time.perf_counter()
    for number, batch in enumerate(data.batches(plan, 1, 0, 1, range(1))):
        seconds += batch.seconds
        if number == 9:
            break
    return 1000 * (time.perf_counter() - started) / seconds


if __name__ == "__main__":
    main()
