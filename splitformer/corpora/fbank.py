"""Mel filterbank features (fbank): computed in parallel, stored in shards, continued after a fault; or none at all.

A shard is a folder with the features of SHARD_CUTS consecutive cuts and their manifest. It is written under a
temporary name and moved into place when complete, so that a run that was killed, or met a full disk, goes on
where it stopped; and the result does not depend on the number of jobs. Cuts without features (`write_audio_cuts`) are
for training that computes them as it goes: `on_the_fly` does so by the same functions.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhotse import (
    LilcomChunkyWriter,
)
from lhotse.cut import MonoCut
from lhotse.features.io import FeaturesWriter, NumpyFilesWriter
from lhotse.utils import is_module_available
from tqdm import tqdm

from splitformer.corpora.manifests import manifest_writer
from splitformer.data.features import SAMPLING_RATE, FbankOptions, audio_of, extract, make_extractor, with_features
from splitformer.data.manifests import ManifestError, cuts_from_manifests, read_cuts, read_pairs, use_soundfile

SPEED_FACTORS = (0.9, 1.1)
"""The three-fold speed perturbation of Ko et al., "Audio augmentation for speech recognition" (2015)."""
SHARD_CUTS = 100


class DiskFullError(OSError):
    """The disk, or a quota, is full; the shards that were complete are kept."""


@dataclass
class FbankSummary:
    """num_cuts, seconds: of the stored cuts, speed-perturbed copies included; skipped: cut -> reason."""

    num_cuts: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


def make_writer(folder: Path, options: FbankOptions) -> FeaturesWriter:
    """Lhotse's lilcom archive (lossy, a third of the size); plain numpy files where lilcom is absent.

    Energies without logarithm are stored as they are: they span nine orders of magnitude, and lilcom rounds to steps
    of 2 ** -5, which is nothing to a logarithm and more than most of these energies.
    """
    if options.extractor == "linear-mel" or not is_module_available("lilcom"):
        return NumpyFilesWriter(folder)
    return LilcomChunkyWriter(folder / "feats")


def all_cuts(recordings: str | Path, supervisions: str | Path, speed_perturb: bool) -> Iterator[MonoCut]:
    """The cuts at SAMPLING_RATE; with `speed_perturb` followed by all of them at 0.9 and at 1.1 of the speed."""
    for factor in (1.0, *SPEED_FACTORS) if speed_perturb else (1.0,):
        for cut in cuts_from_manifests(recordings, supervisions):
            if cut.sampling_rate != SAMPLING_RATE:
                cut = cut.resample(SAMPLING_RATE)
            yield cut if factor == 1.0 else cut.perturb_speed(factor)


def write_audio_cuts(
    recordings: str | Path, supervisions: str | Path, output_cuts: str | Path, *, speed_perturb: bool = False
) -> FbankSummary:
    """Write the cuts of a split without features: what `compute_fbank` would have computed them from.

    Raises:
      ManifestError: no cut at all.
    """
    summary = FbankSummary()
    with manifest_writer(output_cuts) as write_cut:
        cuts = all_cuts(recordings, supervisions, speed_perturb)
        for cut in tqdm(cuts, desc=f"cuts {Path(output_cuts).name}", unit=" cuts"):
            write_cut(cut)
            summary.num_cuts += 1
            summary.seconds += cut.duration
        if not summary.num_cuts:
            raise ManifestError(f"{supervisions} is empty: there is nothing to train on")
    return summary


def compute_fbank(
    recordings: str | Path,
    supervisions: str | Path,
    output_cuts: str | Path,
    storage_dir: str | Path,
    options: FbankOptions,
    *,
    num_jobs: int = 1,
    speed_perturb: bool = False,
) -> FbankSummary:
    """Compute and store the features of a split, and write its cuts.

    Shards in `storage_dir` that an earlier call completed from the same cuts with the same options are kept.

    Args:
      output_cuts: cuts manifest to write, `.jsonl` or `.jsonl.gz`; it refers to the features by `storage_dir`
        as given.
      num_jobs: processes; no more are started than there are shards.
    Raises:
      ManifestError: no cut at all; unreadable audio, where `options.strict`.
      DiskFullError: what could not be written; calling again continues.
    """
    storage_dir = Path(storage_dir)
    storage_dir.mkdir(parents=True, exist_ok=True)
    copies = 1 + len(SPEED_FACTORS) if speed_perturb else 1
    num_cuts = copies * sum(len(group) for _, group in read_pairs(recordings, supervisions))
    if not num_cuts:
        raise ManifestError(f"{supervisions} is empty: there are no features to compute")
    num_shards = -(-num_cuts // SHARD_CUTS)

    tasks = (
        (storage_dir / f"{number:05d}", cuts, options)
        for number, cuts in enumerate(_groups(all_cuts(recordings, supervisions, speed_perturb), SHARD_CUTS))
    )
    summary = FbankSummary()
    try:
        with (
            manifest_writer(output_cuts) as write_cut,
            tqdm(total=num_cuts, desc=f"fbank {Path(output_cuts).name}", unit=" cuts") as bar,
        ):
            for shard in _run(tasks, min(num_jobs, num_shards)):
                skipped = json.loads((shard / "skipped.json").read_text(encoding="utf-8"))
                summary.skipped.update(skipped)
                stored = 0
                # a shard of which everything was skipped is an empty file, which Lhotse's reader would reject
                for cut in read_cuts(shard / "cuts.jsonl") if (shard / "cuts.jsonl").stat().st_size else ():
                    write_cut(cut)
                    stored += 1
                    summary.seconds += cut.duration
                summary.num_cuts += stored
                bar.update(stored + len(skipped))
            if not summary.num_cuts:
                cut, reason = next(iter(summary.skipped.items()))
                raise ManifestError(f"{recordings}: none of {num_cuts} cuts has readable audio; {cut}: {reason}")
    except OSError as error:
        if _is_disk_full(error):
            complete = sum(1 for path in storage_dir.iterdir() if not path.name.startswith("."))
            raise DiskFullError(
                error.errno or errno.ENOSPC,
                f"{error.strerror or error} while writing to {storage_dir}; {complete} of {num_shards} shards are "
                "complete and kept. Free some space and run the same command again: it goes on from there",
            ) from error
        raise
    _remove_leftovers(storage_dir, num_shards)
    return summary


def _is_disk_full(error: OSError) -> bool:
    # numpy.save's own error has no number, only "32000 requested and 6112 written"
    short_write = error.errno is None and "requested and" in str(error)
    return short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _groups(items: Iterable[MonoCut], size: int) -> Iterator[list[MonoCut]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _run(tasks: Iterable[tuple[Path, list[MonoCut], FbankOptions]], num_jobs: int) -> Iterator[Path]:
    """Carry out the tasks and yield their folders in order, with at most a few of them in memory."""
    if num_jobs <= 1:
        for task in tasks:
            yield make_shard(*task)
        return
    pool = ProcessPoolExecutor(
        num_jobs,
        mp_context=multiprocessing.get_context("fork"),  # the parent computes nothing that a fork could break
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    try:
        waiting: deque[Future[Path]] = deque()
        for task in tasks:
            waiting.append(pool.submit(make_shard, *task))
            if len(waiting) >= 3 * num_jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def make_shard(folder: Path, cuts: list[MonoCut], options: FbankOptions) -> Path:
    """Make the folder of one shard, or keep the one that was made from the same cuts and options.

    It holds `cuts.jsonl` (cuts with features), `skipped.json` (cut id -> reason), `made_from`, the features.
    """
    made_from = _fingerprint(cuts, options)
    if (folder / "made_from").is_file() and (folder / "made_from").read_text() == made_from:
        return folder
    use_soundfile()
    temporary = folder.with_name(f".{folder.name}.tmp")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        skipped = _write_features(temporary, folder, cuts, options)
        (temporary / "skipped.json").write_text(json.dumps(skipped), encoding="utf-8")
        (temporary / "made_from").write_text(made_from)
        _sync(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _write_features(folder: Path, final_folder: Path, cuts: list[MonoCut], options: FbankOptions) -> dict[str, str]:
    """Write features and `cuts.jsonl` to `folder`, which will become `final_folder`; return what was skipped."""
    extractor = make_extractor(options)
    skipped: dict[str, str] = {}
    loaded, waveforms = [], []
    for cut in cuts:
        try:
            samples = audio_of(cut, options)
        except ImportError:
            raise  # not the file's fault
        except Exception as error:  # whatever a decoder raises on a damaged file
            sources = ", ".join(str(source.source)[:300] for source in cut.recording.sources)
            reason = f"cannot read {sources}: {' '.join(str(error).split())[:300]}"
            if options.strict:
                raise ManifestError(f"{cut.id}: {reason} (--strict is given)") from error
            skipped[cut.id] = reason
            continue
        loaded.append(cut)
        waveforms.append(samples)
    with make_writer(folder, options) as writer, manifest_writer(folder / "cuts.jsonl") as write_cut:
        for cut, feats in zip(loaded, extract(extractor, waveforms) if waveforms else []):
            key = writer.write(cut.id, feats)
            storage = {
                "storage_type": writer.name,
                "storage_path": str(writer.storage_path).replace(str(folder), str(final_folder), 1),
                "storage_key": key,
            }
            write_cut(with_features(cut, feats, extractor.name, extractor.frame_shift, storage))
    return skipped


def _fingerprint(cuts: list[MonoCut], options: FbankOptions) -> str:
    """Of all that determines a shard's content."""
    # strict decides whether a shard comes to be, not what is in it
    content = [options.extractor, options.num_mel_bins, is_module_available("lilcom")]
    content += [cut.to_dict() for cut in cuts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Wait until the files of a folder are on disk: a shard in place is complete, power cuts included."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _remove_leftovers(storage_dir: Path, num_shards: int) -> None:
    """Remove the shards of an earlier, longer corpus and what a killed job left."""
    for path in storage_dir.iterdir():
        abandoned = path.name.startswith(".") and time.time() - path.stat().st_mtime > 60
        if abandoned or (path.name.isdigit() and int(path.name) >= num_shards):
            shutil.rmtree(path, ignore_errors=True)
