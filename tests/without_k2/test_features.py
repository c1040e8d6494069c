"""Features on disk: what is stored, by how many jobs, and after which failures."""

from __future__ import annotations

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
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


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
