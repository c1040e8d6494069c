"""Features on disk: what is stored, by how many jobs, and after which failures."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Fbank, FbankConfig, Recording, SupervisionSegment

from splitformer.corpora.fbank import SHARD_CUTS, FbankSummary, compute_fbank
from splitformer.corpora.manifests import write_split
from splitformer.corpora.validation import validate_split
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import ManifestError, read_cuts, read_pairs

RATE = 16000
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def make_split(folder: Path, seconds: list[float], rate: int = RATE) -> tuple[Path, Path]:
    """Write a split of noise with an utterance of each duration; return recordings and supervisions."""
    rng = np.random.default_rng(0)
    pairs = []
    for number, duration in enumerate(seconds):
        path = folder / "audio" / f"u{number:03d}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(int(duration * rate)), rate)
        recording = Recording.from_file(path)
        segment = SupervisionSegment(path.stem, path.stem, 0.0, recording.duration, 0, "NOISE")
        pairs.append((recording, [segment]))
    files = folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"
    write_split(pairs, *files)
    return files


def fbank(
    files: tuple[Path, Path], out: Path, num_jobs: int = 1, speed_perturb: bool = False, strict: bool = False,
    num_mel_bins: int = 80,
) -> FbankSummary:  # fmt: skip
    return compute_fbank(
        *files,
        out / "cuts.jsonl.gz",
        out / "feats",
        FbankOptions(num_mel_bins=num_mel_bins),
        num_jobs=num_jobs,
        speed_perturb=speed_perturb,
        strict=strict,
    )


def stored(out: Path) -> CutSet:
    return read_cuts(out / "cuts.jsonl.gz")


def test_stored_features_are_those_of_lhotse(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.5, 1.03])
    summary = fbank(files, tmp_path)
    assert summary.num_cuts == 2 and summary.seconds == pytest.approx(1.53) and not summary.skipped
    for cut in stored(tmp_path):
        expected = Fbank(FbankConfig(num_filters=80)).extract(cut.load_audio(), RATE)
        features = cut.load_features()
        assert features.shape == expected.shape == (cut.num_frames, 80)
        # lilcom rounds to multiples of 2 ** -5
        assert np.abs(features - expected).max() < 2**-5
        assert cut.supervisions[0].text == "NOISE"


def test_the_number_of_jobs_changes_nothing(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * (2 * SHARD_CUTS + 5))
    contents = []
    for jobs in (1, 3):
        fbank(files, tmp_path / str(jobs), num_jobs=jobs)
        cuts = stored(tmp_path / str(jobs))
        contents.append([(c.id, c.load_features().tobytes()) for c in cuts])
    assert contents[0] == contents[1] and len(contents[0]) == 2 * SHARD_CUTS + 5


def test_more_jobs_than_cuts(tmp_path: Path) -> None:
    assert fbank(make_split(tmp_path, [0.3, 0.3]), tmp_path, num_jobs=64).num_cuts == 2


def test_speed_perturbation_adds_two_copies(tmp_path: Path) -> None:
    summary = fbank(make_split(tmp_path, [0.9]), tmp_path, speed_perturb=True)
    cuts = {cut.id: cut for cut in stored(tmp_path)}
    assert summary.num_cuts == 3 and list(cuts) == ["u000", "u000_sp0.9", "u000_sp1.1"]
    assert [round(c.duration, 3) for c in cuts.values()] == [0.9, 1.0, round(0.9 / 1.1, 3)]
    assert [c.load_features().shape[0] for c in cuts.values()] == [90, 100, 82]
    assert all(c.supervisions[0].text == "NOISE" for c in cuts.values())


def test_other_sampling_rates_are_resampled(tmp_path: Path) -> None:
    fbank(make_split(tmp_path, [0.5], rate=8000), tmp_path)
    (cut,) = stored(tmp_path)
    assert cut.sampling_rate == RATE and cut.load_features().shape == (50, 80)


def test_number_of_mel_bins(tmp_path: Path) -> None:
    fbank(make_split(tmp_path, [0.5]), tmp_path, num_mel_bins=40)
    assert next(iter(stored(tmp_path))).load_features().shape == (50, 40)


def test_audio_that_ends_early_is_named_and_skipped(tmp_path: Path) -> None:
    files = make_split(tmp_path, [1.0, 1.0, 0.01])
    damaged = tmp_path / "audio/u001.flac"
    damaged.write_bytes(damaged.read_bytes()[:3000])  # the header is whole, and promises a second
    summary = fbank(files, tmp_path / "out")
    assert [cut.id for cut in stored(tmp_path / "out")] == ["u000"]
    assert summary.skipped.keys() == {"u001", "u002"}
    assert "u001.flac" in summary.skipped["u001"] and "less than one window" in summary.skipped["u002"]
    # they are reported again from a shard that exists
    assert fbank(files, tmp_path / "out").skipped == summary.skipped
    with pytest.raises(ManifestError, match=r"u001.*--strict"):
        fbank(files, tmp_path / "strict", strict=True)


def test_audio_without_samples_or_with_infinite_ones_is_named_and_skipped(tmp_path: Path) -> None:
    files = make_split(tmp_path, [1.0, 1.0, 1.0])
    pairs = list(read_pairs(*files))
    soundfile.write(tmp_path / "audio/u000.wav", np.zeros(0), RATE)  # a header, and nothing after it
    samples = np.zeros(RATE, dtype=np.float32)
    samples[[5, 77]] = np.nan, np.inf
    soundfile.write(tmp_path / "audio/u001.wav", samples, RATE, subtype="FLOAT")
    for number in (0, 1):
        pairs[number][0].sources[0].source = str(tmp_path / f"audio/u00{number}.wav")
    write_split(pairs, *files)
    summary = fbank(files, tmp_path / "out")
    assert [cut.id for cut in stored(tmp_path / "out")] == ["u002"]
    assert summary.skipped.keys() == {"u000", "u001"}
    assert "u001.wav: 2 of 16000 samples are not finite" in summary.skipped["u001"]
    # validation finds the first in its header, before anything is computed
    _, _, skipped = validate_split(*files)
    assert skipped.reasons.keys() == {"u000"} and "no samples" in skipped.reasons["u000"]


def test_an_utterance_of_three_minutes_is_stored_unchanged(tmp_path: Path) -> None:
    fbank(make_split(tmp_path, [180.0, 0.5]), tmp_path)
    assert [cut.load_features().shape for cut in stored(tmp_path)] == [(18000, 80), (50, 80)]


def test_no_readable_audio_at_all_is_an_error(tmp_path: Path) -> None:
    files = make_split(tmp_path, [1.0])
    (tmp_path / "audio/u000.flac").write_bytes(b"")
    with pytest.raises(ManifestError, match="none of 1 cuts"):
        fbank(files, tmp_path)
    assert not (tmp_path / "cuts.jsonl.gz").exists()


def test_a_shard_is_kept_while_its_cuts_and_options_are_the_same(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * (SHARD_CUTS + 3))
    fbank(files, tmp_path)
    first = [os.stat(tmp_path / "feats" / name).st_ino for name in ("00000", "00001")]
    fbank(files, tmp_path, num_jobs=2)
    assert [os.stat(tmp_path / "feats" / name).st_ino for name in ("00000", "00001")] == first
    fbank(files, tmp_path, num_mel_bins=20)
    assert {cut.load_features().shape[1] for cut in stored(tmp_path)} == {20}
    fbank(make_split(tmp_path / "shorter", [0.1]), tmp_path)
    assert sorted(p.name for p in (tmp_path / "feats").iterdir()) == ["00000"]


def test_unknown_extractor_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'torch': choose one of lhotse, kaldifeat, linear-mel"):
        FbankOptions("torch")


def test_linear_mel_without_torchaudio_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitformer.data.features.is_module_available", lambda name: name != "torchaudio")
    with pytest.raises(ValueError, match=r"linear-mel needs torchaudio, which is not installed.*setup\.sh"):
        FbankOptions("linear-mel")


def test_ids_that_are_paths_stay_in_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lilcom, features are files that are named after their cuts."""
    monkeypatch.setattr("splitformer.corpora.fbank.is_module_available", lambda name: False)
    files = make_split(tmp_path / "in", [0.3] * 4)
    pairs = list(read_pairs(*files))
    ids = ["../../evil", "chapter/1", "..", "plain"]
    for (_, [segment]), name in zip(pairs, ids):
        segment.id = name
    write_split(pairs, *files)
    fbank(files, tmp_path / "out")
    shapes = [(cut.id, cut.load_features().shape) for cut in stored(tmp_path / "out")]
    assert shapes == [(name, (30, 80)) for name in ids]
    features = list(tmp_path.rglob("*.npy"))
    assert len(features) == 4 and all((tmp_path / "out/feats/00000") in path.parents for path in features)


@pytest.mark.parametrize("packed", [True, False])
def test_features_that_are_gone_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr("splitformer.corpora.fbank.is_module_available", lambda name: packed)
    files = make_split(tmp_path, [0.1] * (SHARD_CUTS + 3))
    fbank(files, tmp_path)
    before = [cut.load_features().tobytes() for cut in stored(tmp_path)]
    kept = os.stat(tmp_path / "feats/00000").st_ino
    next(path for path in (tmp_path / "feats/00001").rglob("*") if path.suffix in (".lca", ".npy")).unlink()
    fbank(files, tmp_path)
    assert [cut.load_features().tobytes() for cut in stored(tmp_path)] == before
    assert os.stat(tmp_path / "feats/00000").st_ino == kept


def test_one_process_computes_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further process would have a CUDA context of its own; audio is read by threads."""
    monkeypatch.setattr("splitformer.corpora.fbank.on_gpu", lambda options: True)
    monkeypatch.setattr("splitformer.corpora.fbank.ProcessPoolExecutor", None)
    files = make_split(tmp_path, [0.1] * (SHARD_CUTS + 3))
    assert fbank(files, tmp_path, num_jobs=8).num_cuts == SHARD_CUTS + 3


def same_features(one: Path, other: Path) -> bool:
    """Whether two storages have the same cuts and the same bytes."""
    cuts = [[(cut.id, cut.load_features().tobytes()) for cut in stored(folder)] for folder in (one, other)]
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "feats").rglob("feats.lca")}
        for folder in (one, other)
    ]
    return cuts[0] == cuts[1] and files[0] == files[1]


@pytest.mark.slow
def test_shares_of_several_processes_are_the_shards_of_one(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * (4 * SHARD_CUTS + 5))
    fbank(files, tmp_path / "alone")
    out = tmp_path / "shares"
    commands = [[*script(files, out, num_jobs=1), "--shard", f"{number}/3"] for number in (1, 2, 3)]
    first = subprocess.run(commands[0], env=ENVIRONMENT, text=True, capture_output=True)
    assert first.returncode == 0 and "share 1/3, 2 shards" in first.stdout, first.stderr
    assert sorted(path.name for path in (out / "feats").iterdir()) == ["00000", "00003"]
    for process in [subprocess.Popen(command, env=ENVIRONMENT) for command in commands[1:]]:
        assert process.wait() == 0
    assert not (out / "cuts.jsonl.gz").exists()
    made = {path.name: os.stat(path).st_ino for path in (out / "feats").iterdir()}
    assert len(made) == 5
    fbank(files, out)
    assert {path.name: os.stat(path).st_ino for path in (out / "feats").iterdir()} == made
    assert same_features(tmp_path / "alone", out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "0/3"], "--shard 0/3: expected I/N with I from 1 to N"),
        (["--shard", "4/3"], "--shard 4/3: expected I/N"),
        (["--executor", "spark"], "--executor spark: choose local, or dask:ADDRESS"),
        (["--executor", "dask:127.0.0.1:1", "--shard", "1/2"], "give one"),
    ],
)
def test_bad_executors_and_shares(tmp_path: Path, flags: list[str], message: str) -> None:
    files = make_split(tmp_path, [0.1])
    done = subprocess.run([*script(files, tmp_path, 1), *flags], env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.slow
def test_workers_of_a_dask_scheduler_compute_the_shards_of_one_process(tmp_path: Path) -> None:
    """Two workers in processes of their own, of which one is killed at work."""
    files = make_split(tmp_path, [0.2] * (8 * SHARD_CUTS + 5))
    fbank(files, tmp_path / "alone", num_jobs=2)
    address = tmp_path / "scheduler.json"
    log = open(tmp_path / "dask.log", "w")  # noqa: SIM115
    dask = {"env": {**ENVIRONMENT, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}, "stdout": log, "stderr": log}
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    worker += ["--scheduler-file", str(address), "--local-directory", str(tmp_path)]
    processes = [subprocess.Popen([*scheduler, "--no-dashboard", "--scheduler-file", str(address)], **dask)]
    try:
        processes += [subprocess.Popen(worker, **dask) for _ in range(2)]
        wait_until(address.is_file)
        where = json.loads(address.read_text())["address"]
        out = tmp_path / "dask"
        command = [*script(files, out, num_jobs=1), "--executor", f"dask:{where}"]
        client = subprocess.Popen(command, env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
        wait_until(lambda: len(list((out / "feats").glob("0*"))) >= 2)
        processes[1].kill()
        assert client.wait(120) == 0, client.stderr.read() + (tmp_path / "dask.log").read_text()
        client.stderr.close()
        assert same_features(tmp_path / "alone", out)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        log.close()


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_script(
    files: tuple[Path, Path], out: Path, limit: Callable[[], None] | None = None, num_jobs: int = 2
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        script(files, out, num_jobs), env=ENVIRONMENT, text=True, capture_output=True, preexec_fn=limit
    )


def start_script(files: tuple[Path, Path], out: Path, num_jobs: int) -> subprocess.Popen[str]:
    """In a process group of its own."""
    (out / "feats").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        script(files, out, num_jobs),
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def script(files: tuple[Path, Path], out: Path, num_jobs: int) -> list[str]:
    command = [sys.executable, str(ROOT / "local/compute_fbank.py"), "--num-jobs", str(num_jobs)]
    command += ["--recordings", str(files[0]), "--supervisions", str(files[1])]
    return [*command, "--output-cuts", str(out / "cuts.jsonl.gz"), "--storage-dir", str(out / "feats")]


def test_a_run_killed_twice_ends_with_the_same_features(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.3] * (6 * SHARD_CUTS + 7))
    fbank(files, tmp_path / "whole")
    out, complete, kills = tmp_path / "killed", 0, 0
    for _ in range(2):
        process = start_script(files, out, num_jobs=2)
        # a moment after another shard was complete
        while process.poll() is None and len(list((out / "feats").glob("0*"))) <= complete:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        complete = len(list((out / "feats").glob("0*")))
    assert kills, "the runs ended before they could be killed"
    fbank(files, out, num_jobs=2)
    one, other = (list(stored(folder)) for folder in (tmp_path / "whole", out))
    assert len(one) == 6 * SHARD_CUTS + 7
    for a, b in zip(one, other, strict=True):
        assert a.id == b.id and a.load_features().tobytes() == b.load_features().tobytes()
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "feats").rglob("feats.lca"))}
        for folder in (tmp_path / "whole", out)
    ]
    assert contents[0] == contents[1]


@pytest.mark.slow
def test_processes_that_compute_the_same_features_do_not_destroy_each_other(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * (3 * SHARD_CUTS + 7))
    processes = [start_script(files, tmp_path / "out", num_jobs=2) for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    fbank(files, tmp_path / "alone")
    one, other = (list(stored(tmp_path / name)) for name in ("alone", "out"))
    for a, b in zip(one, other, strict=True):
        assert a.id == b.id and a.load_features().tobytes() == b.load_features().tobytes()
    assert not list((tmp_path / "out/feats").glob(".*"))


def check_leftovers(out: Path, failed: subprocess.CompletedProcess[str]) -> None:
    assert failed.returncode == 1, failed.stderr
    assert "1 of 2 shards are complete and kept" in failed.stderr and "run the same command again" in failed.stderr
    assert [p.name for p in (out / "feats").iterdir()] == ["00000"], "only the complete shard remains"
    assert not (out / "cuts.jsonl.gz").exists()


def test_a_file_size_limit_while_features_are_written(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * SHARD_CUTS + [12.0] * 6)
    limit = 1 << 18  # lilcom's or numpy's files of the second shard need more, the first's less
    failed = run_script(files, tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check_leftovers(tmp_path, failed)
    kept = os.stat(tmp_path / "feats/00000").st_ino
    again = run_script(files, tmp_path)
    assert again.returncode == 0, again.stderr
    assert os.stat(tmp_path / "feats/00000").st_ino == kept
    assert [cut.load_features().shape[0] for cut in stored(tmp_path)] == [10] * SHARD_CUTS + [1200] * 6


def test_a_full_disk_while_features_are_written(tmp_path: Path) -> None:
    files = make_split(tmp_path, [0.1] * SHARD_CUTS + [4.0] * 16)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)], text=True, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk ({mounted.stderr.strip()}); another test limits the size of files")
    try:
        failed = run_script(files, disk, num_jobs=1)  # two would fill the disk for each other
        check_leftovers(disk, failed)
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        again = run_script(files, disk)
        assert again.returncode == 0, again.stderr
        assert sum(1 for _ in stored(disk)) == SHARD_CUTS + 16
    finally:
        subprocess.run(["umount", str(disk)], check=True)
