"""Compute and store features in parallel, resumably; or write cuts without features.

The features of SHARD_CUTS consecutive cuts and their manifest are a shard, a folder that appears when it is complete.
So a run that was killed, or met a full disk, resumes where it stopped, and the result does not depend on the number of
jobs. Cuts without features are for training that computes them on the fly, with the same functions.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lhotse import LilcomChunkyWriter
from lhotse.cut import MonoCut
from lhotse.features.io import FeaturesWriter, NumpyFilesWriter
from lhotse.utils import is_module_available
from tqdm import tqdm

from splitformer.corpora.manifests import manifest_writer
from splitformer.data.cut_features import with_features
from splitformer.data.features import FbankOptions, extract, load_samples, make_extractor
from splitformer.data.manifests import ManifestError, cuts_from_manifests, read_cuts, read_pairs, use_soundfile
from splitformer.errors import UserError
from splitformer.files import atomic_folder, remove_abandoned
from splitformer.model.subsampling import SAMPLING_RATE

SPEED_FACTORS = (0.9, 1.1)
"""The three-fold speed perturbation of Ko et al., "Audio augmentation for speech recognition" (2015)."""
SHARD_CUTS = 100


class DiskFullError(UserError):
    """The disk or a quota is full; complete shards are kept."""


@dataclass
class FbankSummary:
    """num_cuts, seconds: of the written cuts, including speed-perturbed copies; skipped: {cut id: reason}."""

    num_cuts: int = 0
    seconds: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


def all_cuts(recordings: str | Path, supervisions: str | Path, speed_perturb: bool) -> Iterator[MonoCut]:
    """Yield the cuts at SAMPLING_RATE; with `speed_perturb`, then all of them at 0.9 and at 1.1 times the speed."""
    for factor in (1.0, *SPEED_FACTORS) if speed_perturb else (1.0,):
        for cut in cuts_from_manifests(recordings, supervisions):
            cut = cut.resample(SAMPLING_RATE)
            yield cut if factor == 1.0 else cut.perturb_speed(factor)


def write_audio_cuts(
    recordings: str | Path, supervisions: str | Path, output_cuts: str | Path, *, speed_perturb: bool = False
) -> FbankSummary:
    """Write the cuts of a split without features: those that `compute_fbank` would compute features of.

    Raises:
      ManifestError: there is no cut.
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
    strict: bool = False,
    executor: str = "local",
) -> FbankSummary:
    """Compute and store the features of a split, and write its cuts.

    Shards in `storage_dir` that an earlier call completed from the same cuts with the same options are kept.

    Args:
      output_cuts: cuts manifest to write, `.jsonl` or `.jsonl.gz`; it refers to the features by `storage_dir` as given.
      num_jobs: processes; no more are started than there are shards, and one if they compute on a GPU.
      executor: what runs them: "local", or "dask:ADDRESS" for the workers of a Dask scheduler, whatever their number.
      strict: raise for unreadable audio instead of skipping it.
    Raises:
      ManifestError: there is no cut, none has readable audio, or, if `strict`, one has not.
      DiskFullError: calling again resumes.
    """
    storage_dir = Path(storage_dir)
    storage_dir.mkdir(parents=True, exist_ok=True)
    copies = 1 + len(SPEED_FACTORS) if speed_perturb else 1
    num_cuts = copies * sum(len(group) for _, group in read_pairs(recordings, supervisions))
    if not num_cuts:
        raise ManifestError(f"{supervisions} is empty: there are no features to compute")
    num_shards = -(-num_cuts // SHARD_CUTS)
    summary = FbankSummary()
    try:
        with (
            manifest_writer(output_cuts) as write_cut,
            tqdm(total=num_cuts, desc=f"fbank {Path(output_cuts).name}", unit=" cuts") as bar,
        ):
            cuts = all_cuts(recordings, supervisions, speed_perturb)
            for shard in _make_shards(cuts, storage_dir, options, strict, min(num_jobs, num_shards), executor):
                summary.skipped.update(json.loads((shard / "skipped.json").read_text(encoding="utf-8")))
                # an empty manifest, of a shard without readable audio, is no file that Lhotse reads
                for cut in read_cuts(shard / "cuts.jsonl") if (shard / "cuts.jsonl").stat().st_size else ():
                    write_cut(cut)
                    summary.num_cuts += 1
                    summary.seconds += cut.duration
                bar.update(summary.num_cuts + len(summary.skipped) - bar.n)
            if not summary.num_cuts:
                cut_id, reason = next(iter(summary.skipped.items()))
                raise ManifestError(f"{recordings}: none of {num_cuts} cuts has readable audio; {cut_id}: {reason}")
    except OSError as error:
        if not _is_disk_full(error):
            raise
        complete = sum(1 for path in storage_dir.iterdir() if not path.name.startswith("."))
        raise DiskFullError(
            f"{error.strerror or error} while writing to {storage_dir}; {complete} of {num_shards} shards are complete "
            "and kept. Free some space and run the same command again: it resumes there"
        ) from error
    _remove_leftovers(storage_dir, num_shards)
    return summary


def _is_disk_full(error: OSError) -> bool:
    # numpy.save raises an error without number, "32000 requested and 6112 written"
    short_write = error.errno is None and "requested and" in str(error)
    return short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_share(
    recordings: str | Path,
    supervisions: str | Path,
    storage_dir: str | Path,
    options: FbankOptions,
    share: tuple[int, int],
    *,
    num_jobs: int = 1,
    speed_perturb: bool = False,
    strict: bool = False,
) -> int:
    """Make the I-th of N shares of a split's shards, `share` = (I, N), and return their number; no cuts are written.

    N processes, such as those of a Slurm array, make all shards. `compute_fbank` then finds them and writes the cuts.
    """
    storage_dir = Path(storage_dir)
    storage_dir.mkdir(parents=True, exist_ok=True)
    cuts = all_cuts(recordings, supervisions, speed_perturb)
    return sum(1 for _ in _make_shards(cuts, storage_dir, options, strict, num_jobs, share=share))


def _make_shards(
    cuts: Iterator[MonoCut],
    storage_dir: Path,
    options: FbankOptions,
    strict: bool,
    num_jobs: int,
    executor: str = "local",
    share: tuple[int, int] = (1, 1),
) -> Iterator[Path]:
    """Yield the folders of all shards of a share in order; only a few shards' cuts are in memory at a time."""
    groups = iter(lambda: list(itertools.islice(cuts, SHARD_CUTS)), [])
    numbered = itertools.islice(enumerate(groups), share[0] - 1, None, share[1])
    tasks = ((storage_dir / f"{number:05d}", group, options, strict) for number, group in numbered)
    num_jobs = 1 if executor == "local" and on_gpu(options) else num_jobs
    if executor == "local" and num_jobs <= 1:
        yield from itertools.starmap(make_shard, tasks)
        return
    pool, in_flight = (_local_pool(num_jobs), 3 * num_jobs) if executor == "local" else _dask_pool(executor)
    waiting: deque[Future[Path]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_make_shard_from, os.getcwd(), *task))
            if len(waiting) >= in_flight:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown()


def on_gpu(options: FbankOptions) -> bool:
    """Whether the features are computed on a GPU, where one process is enough and each further one costs memory."""
    return options.extractor == "kaldifeat" and torch.cuda.is_available()


def _local_pool(num_jobs: int) -> Executor:
    return ProcessPoolExecutor(
        num_jobs,
        mp_context=multiprocessing.get_context("fork"),  # the parent computes nothing that a fork could break
        initializer=torch.set_num_threads,
        initargs=(1,),
    )


def _dask_pool(executor: str) -> tuple[Executor, int]:
    """Return an executor on the workers of the scheduler "dask:ADDRESS", and how many tasks to give it at a time.

    Raises:
      UserError: the name is another, Dask is not installed, or there is no scheduler, or none with a worker.
    """
    kind, _, address = executor.partition(":")
    if kind != "dask" or not address:
        raise UserError(f"--executor {executor}: choose local, or dask:ADDRESS with the address of a Dask scheduler")
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(f"--executor {executor} needs Dask: pip install 'splitformer[dask]'") from error
    try:
        client = Client(address, timeout=30)
        client.wait_for_workers(1, timeout=60)
    except (OSError, ValueError) as error:  # TimeoutError is an OSError
        raise UserError(f"--executor {executor}: no scheduler with a worker answers there ({error})") from error
    # a shard whose worker is lost goes to another one
    return client.get_executor(pure=False, retries=3), 3 * sum(client.nthreads().values())


def _make_shard_from(working_dir: str, folder: Path, cuts: list[MonoCut], options: FbankOptions, strict: bool) -> Path:
    """`make_shard` in a process that may have been started elsewhere: paths of manifests may be relative."""
    os.chdir(working_dir)
    torch.set_num_threads(1)
    return make_shard(folder, cuts, options, strict)


def make_shard(folder: Path, cuts: list[MonoCut], options: FbankOptions, strict: bool = False) -> Path:
    """Make the folder of one shard, unless it is there, made from the same cuts with the same options.

    It holds `cuts.jsonl` (cuts with features), `skipped.json` ({cut id: reason}), `fingerprint`, and the features.
    """
    content = [options.extractor, options.num_mel_bins, is_module_available("lilcom"), *(c.to_dict() for c in cuts)]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    if _is_complete(folder, fingerprint):
        return folder
    use_soundfile()
    with atomic_folder(folder) as temporary:
        loaded, waveforms, skipped = _load_audio(cuts, options, strict)
        extractor = make_extractor(options)
        with make_writer(temporary, options) as writer, manifest_writer(temporary / "cuts.jsonl") as write_cut:
            for number, (cut, feats) in enumerate(zip(loaded, extract(extractor, waveforms) if waveforms else [])):
                key = writer.write(f"{number:05d}", feats)  # not the id, which may be a path out of this folder
                place = str(writer.storage_path).replace(str(temporary), str(folder), 1)
                storage = {"storage_type": writer.name, "storage_path": place, "storage_key": key}
                write_cut(with_features(cut, feats, extractor.name, extractor.frame_shift, storage))
        (temporary / "skipped.json").write_text(json.dumps(skipped), encoding="utf-8")
        (temporary / "fingerprint").write_text(fingerprint)
        for path in temporary.rglob("*"):  # a shard in place is complete, even after a power cut
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
    return folder


def _is_complete(folder: Path, fingerprint: str) -> bool:
    """Whether the folder was made with this fingerprint, and no file of features is gone."""
    try:
        if (folder / "fingerprint").read_text() != fingerprint:
            return False
        with open(folder / "cuts.jsonl", encoding="utf-8") as lines:
            features = [json.loads(line)["features"] for line in lines]
    except FileNotFoundError:
        return False
    packed = LilcomChunkyWriter.name
    names = {Path(f["storage_path"]).name if f["storage_type"] == packed else f["storage_key"] for f in features}
    return all((folder / name).is_file() for name in names)


def make_writer(folder: Path, options: FbankOptions) -> FeaturesWriter:
    """Return the writer of a shard: Lhotse's lilcom archive (lossy, a third of the size), or plain numpy files.

    numpy is for environments without lilcom, and for energies without a logarithm: those span nine orders of magnitude,
    and lilcom rounds to steps of 2 ** -5, which is small for a logarithm and larger than most of these energies.
    """
    if options.extractor == "linear-mel" or not is_module_available("lilcom"):
        return NumpyFilesWriter(folder)
    return LilcomChunkyWriter(folder / "feats")


def _load_audio(cuts: list[MonoCut], options: FbankOptions, strict: bool) -> tuple[list, list, dict[str, str]]:
    """Return the cuts with readable audio, their samples, and {cut id: reason} of the others."""
    loaded, waveforms, skipped = [], [], {}
    reads: list[Callable[[], np.ndarray]] = [functools.partial(load_samples, cut, options) for cut in cuts]
    if on_gpu(options):  # one process: it reads with threads, so that the GPU waits less
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            reads = [pool.submit(read).result for read in reads]
    for cut, read in zip(cuts, reads):
        try:
            waveforms.append(read())
            loaded.append(cut)
        except ImportError:
            raise
        except Exception as error:  # decoders raise anything on damaged files
            reason: BaseException = error
            while reason.__context__ is not None:  # Lhotse raises a reader's error again, with less in it
                reason = reason.__context__
            sources = ", ".join(str(source.source)[:300] for source in cut.recording.sources)
            skipped[cut.id] = f"cannot read {sources}: {' '.join(str(reason).split())[:300]}"
            if strict:
                raise ManifestError(f"{cut.id}: {skipped[cut.id]} (--strict is given)") from error
    return loaded, waveforms, skipped


def _remove_leftovers(storage_dir: Path, num_shards: int) -> None:
    """Remove the shards of an earlier, longer corpus, and temporary folders of killed jobs."""
    remove_abandoned(storage_dir)
    for path in storage_dir.iterdir():
        if path.name.isdigit() and int(path.name) >= num_shards:
            shutil.rmtree(path, ignore_errors=True)
