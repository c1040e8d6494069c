"""Recordings: what is read of files and arrays, and how damaged ones are named."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from splitformer.speech.audio import AudioError, Source, open_recording, source_of
from splitformer.speech.inputs import find_sources
from tests.speech import RATE, bursts

SAMPLES = bursts(25.0)
FLOATS = SAMPLES.astype(np.float32) / 32768


def read(source: Source, channel: int | None = None) -> np.ndarray:
    with open_recording(source, channel) as recording:
        blocks = list(recording.blocks())
        assert np.array_equal(np.concatenate(list(recording.blocks())), np.concatenate(blocks))  # a second time
    assert all(block.dtype == np.float32 for block in blocks)
    return np.concatenate(blocks)


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("a.wav", "WAV", "PCM_16"),
        ("a.wav", "WAV", "PCM_24"),
        ("a.wav", "WAV", "FLOAT"),
        ("a.flac", "FLAC", "PCM_16"),
        ("a.raw", "WAV", "PCM_16"),
        ("a", "FLAC", "PCM_16"),
    ],
)
def test_files_have_the_samples_that_were_written(tmp_path: Path, name: str, format: str, subtype: str) -> None:
    path = tmp_path / name
    soundfile.write(path, FLOATS, RATE, subtype=subtype, format=format)
    assert np.array_equal(read(Source("a", path)), FLOATS)
    assert np.array_equal(read(Source("a", io.BytesIO(path.read_bytes()))), FLOATS)


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_arrays_have_the_samples_of_files(dtype: str) -> None:
    samples = SAMPLES.astype(np.int32) << 16 if dtype == "int32" else SAMPLES if dtype == "int16" else FLOATS
    for array in (samples.astype(dtype), torch.from_numpy(samples.astype(dtype)), samples.astype(dtype)[None]):
        source = source_of(array, 8000)
        assert np.array_equal(read(source), FLOATS) and source.sampling_rate == 8000


def test_channels_are_averaged_or_chosen(tmp_path: Path) -> None:
    stereo = np.stack([FLOATS, -0.5 * FLOATS])
    soundfile.write(tmp_path / "a.wav", stereo.T, RATE, subtype="FLOAT")
    for source in (source_of(stereo, RATE), source_of(tmp_path / "a.wav")):
        assert np.array_equal(read(source, 1), -0.5 * FLOATS)
        np.testing.assert_allclose(read(source), 0.25 * FLOATS, atol=1e-7)
        with pytest.raises(AudioError, match="no channel 2; channels are counted from 0 to 1"):
            read(source, 2)
    assert np.array_equal(read(Source("a", tmp_path / "a.wav", channel=0), 1), FLOATS)  # its own comes first


def test_spans(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, SAMPLES, RATE)
    assert np.array_equal(read(Source("a", path, start=1.5, duration=12.0)), FLOATS[24000:216000])
    assert np.array_equal(read(Source("a", path, start=20.0)), FLOATS[320000:])
    assert len(read(Source("a", path, start=20.0, duration=5.005))) == 80000  # durations in lists are rounded
    for start, duration in ((25.0, None), (20.0, 6.0), (3.0, 0.0), (30.0, 1.0)):
        with pytest.raises(AudioError, match=r"is outside its 25 s"):
            read(Source("a", path, start=start, duration=duration))


def test_levels_are_those_of_hops_of_ten_milliseconds() -> None:
    with open_recording(source_of(FLOATS, RATE)) as recording:
        decibels, hop_seconds, seconds = recording.levels()
    assert (len(decibels), hop_seconds, seconds) == (2500, 0.01, 25.0)
    power = FLOATS.reshape(-1, 160).astype(np.float64).var(axis=1)
    np.testing.assert_allclose(decibels, 10 * np.log10(power + 1e-12), atol=1e-4)


def test_named_pipes_are_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", SAMPLES, RATE)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "a.wav").read_bytes()))
    writer.start()
    samples = read(Source("pipe", tmp_path / "pipe"))
    writer.join()
    assert np.array_equal(samples, FLOATS)


def test_a_wav_file_from_a_pipe_does_not_state_its_length(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", SAMPLES, RATE)
    contents = bytearray((tmp_path / "a.wav").read_bytes())
    place = contents.index(b"data")
    contents[4:8] = contents[place + 4 : place + 8] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(contents)
    assert np.array_equal(read(Source("a", tmp_path / "a.wav")), FLOATS)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name in ("cut.wav", "cut.flac"):
        soundfile.write(tmp_path / name, SAMPLES, RATE)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 3])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "no_samples.wav", SAMPLES[:0], RATE)
    soundfile.write(tmp_path / "rate.wav", SAMPLES, 999)
    reasons = {
        "cut.wav": "it is cut off: its header states 800044 bytes",
        "cut.flac": "cut off|corrupt",
        "empty.wav": "it is empty",
        "text.wav": "libsndfile cannot read it as audio",
        "no_samples.wav": "it has no samples",
        "rate.wav": "999 Hz; expected 1000 to 768000 Hz",
        "nowhere.wav": "No such file",
        ".": "neither a file nor a pipe",
    }
    for name, reason in reasons.items():
        with pytest.raises(AudioError, match=reason):
            read(Source(name, tmp_path / name))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_finite_are_named(value: float) -> None:
    broken = FLOATS.copy()
    broken[200_000] = value
    with pytest.raises(AudioError, match=r"sample 200000 \(at 12.5 s\) is (nan|-?inf|1e\+30)"):
        read(source_of(broken, RATE))


@pytest.mark.parametrize(
    ("audio", "rate", "error", "message"),
    [
        (FLOATS, None, ValueError, "sampling_rate is missing"),
        (np.zeros((16000, 2)), RATE, ValueError, r"shape \(16000, 2\); expected \(n,\) or \(channels, n\)"),
        (np.zeros((1, 2, 3)), RATE, ValueError, "expected"),
        (np.zeros(16000, np.uint8), RATE, TypeError, "samples are uint8"),
        (torch.zeros(16000, dtype=torch.int64), RATE, TypeError, "samples are int64"),
        ([0.0, 0.1], RATE, TypeError, "audio is a list"),
    ],
)
def test_other_arrays_are_refused(audio: object, rate: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        source_of(audio, rate)  # type: ignore[arg-type]


# ---- what a command is asked to transcribe


def sources_in(tmp_path: Path, *lines: object) -> list[Source | AudioError]:
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return list(find_sources([str(tmp_path / "list.jsonl")]))


def test_lists_of_four_kinds(tmp_path: Path) -> None:
    (tmp_path / "b.wav").touch()
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "b.wav"}], "duration": 9.0}
    cut = {"id": "c", "start": 2.0, "duration": 3.0, "channel": 0, "recording": recording}
    sources = sources_in(
        tmp_path,
        {"audio": "b.wav", "id": 7, "start": 1, "duration": 2.5, "channel": 1},
        {"audio_filepath": str(tmp_path / "b.wav"), "offset": 0.5},
        recording,
        cut,
    )
    path = tmp_path / "b.wav"
    assert sources == [
        Source("7", path, start=1, duration=2.5, channel=1),
        Source(str(path), path, start=0.5),
        Source("r", path),
        Source("c", path, start=2.0, duration=3.0, channel=0),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ([1], "this is a list"),
        ({"text": "A"}, "it has text; expected audio"),
        ({"audio": 5}, "5 is not a path"),
        ({"audio": "a.wav", "start": -1}, "start -1 is not a number of seconds"),
        ({"audio": "a.wav", "duration": "long"}, "duration 'long'"),
        ({"audio": "a.wav", "channel": -1}, "channel -1"),
        ({"id": "r", "sources": [{"type": "command", "channels": [0], "source": "rm x"}]}, "a command, which is not"),
        ({"id": "r", "sources": []}, "in 0 files"),
        ({"id": "r", "sources": [], "transforms": [{"name": "Speed"}]}, "without transforms"),
        ({"id": "c", "start": 0, "recording": {"id": "r"}}, "it lacks 'sources'"),
    ],
)
def test_bad_lines_are_named_and_the_others_kept(tmp_path: Path, line: object, reason: str) -> None:
    first, second = sources_in(tmp_path, line, {"audio": "a.wav"})
    assert isinstance(first, AudioError) and "list.jsonl:1" in str(first) and reason in str(first)
    assert isinstance(second, Source)


def test_folders_and_lists_without_audio_are_named(tmp_path: Path) -> None:
    for folder, names in (("full", ["b.FLAC", "a.wav", "notes.txt", "sub/c.ogg"]), ("none", ["notes.txt"])):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl.gz").write_text("not gzip")
    names = ["full", "none", "empty.jsonl", "bad.jsonl.gz", "nowhere.jsonl", "any name"]
    *audio, none, empty, bad, nowhere, plain = find_sources([str(tmp_path / name) for name in names])
    expected = ["full/a.wav", "full/b.FLAC", "full/sub/c.ogg"]
    assert [each.name for each in audio] == [str(tmp_path / name) for name in expected]
    reasons = ("no audio files", "is empty", "cannot be read", "No such file")
    for error, reason in zip((none, empty, bad, nowhere), reasons):
        assert isinstance(error, AudioError) and reason in str(error)
    assert plain == Source(str(tmp_path / "any name"), tmp_path / "any name")
