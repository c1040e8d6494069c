"""bin/transcribe: words do not depend on how audio is stored, and what cannot be read is named."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import Fbank, FbankConfig

from splitformer.bin import transcribe
from splitformer.cli import command
from tests.speech import RATE, bursts, greedy_tokens, words_of, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("exp") / "averaged.pt")


@pytest.fixture
def run(checkpoint, capfd):
    """(exit status, standard output, standard error) of the command."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = command(transcribe.run, ["--checkpoint", str(checkpoint), *map(str, arguments)], "transcribe")
        out, err = capfd.readouterr()
        return status, out, err

    return call


def transcripts(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def expected_text(checkpoint: Path, samples: np.ndarray, exit: int = 3) -> str:
    """The greedy words of features that are computed as in training."""
    features = Fbank(FbankConfig(num_filters=80)).extract(samples.astype(np.float32) / 32768, RATE)
    return words_of(greedy_tokens(checkpoint, features, exit)[0])


def test_words_are_those_of_greedy_search_whatever_the_container(checkpoint, run, tmp_path):
    samples = bursts(3.0)
    text = expected_text(checkpoint, samples)
    assert text
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "b.flac", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "c.wav", samples.astype(np.int32) << 16, RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "d.wav", np.stack([samples, samples], axis=1), RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "e.wav", samples.astype(np.float32) / 32768, RATE, subtype="FLOAT")
    status, out, err = run("--format", "jsonl", tmp_path)
    assert status == 0, err
    assert [Path(each["audio"]).name for each in transcripts(out)] == ["a.wav", "b.flac", "c.wav", "d.wav", "e.wav"]
    assert {(each["text"], each["duration"]) for each in transcripts(out)} == {(text, 3.0)}
    for exit in (1, 2):
        status, out, _ = run("--format", "jsonl", "--exit", exit, tmp_path / "a.wav")
        [segment] = transcripts(out)[0]["segments"]
        assert status == 0 and segment["exit"] == exit
        assert segment["text"] == expected_text(checkpoint, samples, exit)
        assert 0.0 <= segment["confidence"] <= 1.0 and segment["milliseconds"] > 0
    assert run(tmp_path / "a.wav")[:2] == (0, f"{text}\n")
    assert run(tmp_path / "a.wav", tmp_path / "b.flac")[1].splitlines()[1] == f"{tmp_path / 'b.flac'}\t{text}"


def test_other_rates_are_resampled(run, tmp_path):
    for rate in (8000, 22050, 44100, 48000):
        soundfile.write(tmp_path / f"{rate}.wav", bursts(2.0, rate=rate), rate)
    status, out, err = run("--format", "jsonl", tmp_path)
    assert status == 0, err
    assert len(transcripts(out)) == 4
    assert all(abs(each["duration"] - 2.0) < 1e-3 and each["segments"] for each in transcripts(out))


def test_standard_input_and_lists(run, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", bursts(2.0), RATE)
    soundfile.write(tmp_path / "b.wav", bursts(2.0, seed=1), RATE)
    _, out, _ = run("--format", "jsonl", tmp_path / "a.wav", tmp_path / "b.wav")
    texts = [each["text"] for each in transcripts(out)]
    assert texts[0] != texts[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.wav").read_bytes())))
    status, out, err = run("--format", "jsonl", "-")
    assert status == 0 and transcripts(out)[0]["text"] == texts[0], err
    lines = [{"audio": "b.wav"}, {"audio_filepath": str(tmp_path / "a.wav")}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = run("--format", "jsonl", tmp_path / "list.jsonl")
    assert status == 0 and [each["text"] for each in transcripts(out)] == [texts[1], texts[0]], err


def test_what_cannot_be_read_is_named_and_the_rest_is_transcribed(run, tmp_path):
    samples = bursts(2.0)
    soundfile.write(tmp_path / "good.wav", samples, RATE)
    soundfile.write(tmp_path / "short.wav", samples[:800], RATE)  # 0.05 s: no output frame
    (tmp_path / "empty.wav").write_bytes(b"")
    for name in ("cut.flac", "cut.wav"):
        soundfile.write(tmp_path / name, samples, RATE)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("this is no audio")
    broken = samples.astype(np.float32) / 32768
    broken[1000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    bad = ["empty.wav", "cut.flac", "cut.wav", "text.wav", "nan.wav", "nowhere.wav"]
    status, out, err = run("--format", "jsonl", *(tmp_path / name for name in ["good.wav", *bad, "short.wav"]))
    assert status == 1
    assert [Path(each["audio"]).name for each in transcripts(out)] == ["good.wav", "short.wav"]
    assert transcripts(out)[0]["text"] and transcripts(out)[1]["text"] == ""
    for name in [*bad, "short.wav"]:
        assert re.search(rf"{re.escape(name)}: .+", err), f"{name} is not named in {err}"
    assert "6 of 8" in err


def test_names_are_data(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["with space.wav", "quo'te\".wav", "$(touch gone).wav", "ünïcode ☃.wav", "-dash.wav", "new\nline.wav"]
    for name in names:
        soundfile.write(tmp_path / name, bursts(1.0), RATE)
    status, out, err = run("--format", "jsonl", "--", *names)
    assert status == 0, err
    assert [each["audio"] for each in transcripts(out)] == names
    assert not (tmp_path / "gone").exists()
    status, out, _ = run("--", *names)
    assert status == 0 and len(out.splitlines()) == len(names)  # a line each, also where the name has a line break
    _, out, _ = run("--format", "ctm", "--", *names)
    assert all(len(line.split()) == 6 for line in out.splitlines())


def test_long_recordings_are_cut_at_silences(run, tmp_path):
    samples = np.concatenate([bursts(9.0, seed) for seed in range(6)])
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    status, out, err = run("--format", "jsonl", "--max-segment", 10, tmp_path / "long.wav")
    assert status == 0, err
    segments = transcripts(out)[0]["segments"]
    assert len(segments) >= 5 and all(each["end"] - each["start"] <= 10.0 + 1e-6 for each in segments)
    for before, after in itertools.pairwise(segments):
        assert before["end"] == pytest.approx(after["start"])  # no overlap where there are pauses
        cut = round(before["end"] * RATE)
        assert np.abs(samples[cut - 400 : cut + 400]).max() < 100  # quiet
    assert segments[0]["start"] == 0.0 and segments[-1]["end"] == pytest.approx(54.0)


def test_srt_and_ctm_can_be_read_back(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(6.0), RATE)
    _, out, _ = run("--format", "jsonl", tmp_path / "a.wav")
    words = transcripts(out)[0]["text"].split()
    _, ctm, _ = run("--format", "ctm", tmp_path / "a.wav")
    rows = [line.split() for line in ctm.splitlines()]
    assert [row[4] for row in rows] == words and all(len(row) == 6 for row in rows)
    starts = [float(row[2]) for row in rows]
    assert starts == sorted(starts) and starts[-1] + float(rows[-1][3]) <= 6.0 + 1e-6
    _, srt, _ = run("--format", "srt", tmp_path / "a.wav")
    cues = srt.strip().split("\n\n")
    assert [int(cue.splitlines()[0]) for cue in cues] == list(range(1, len(cues) + 1))
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}", cue.splitlines()[1]) for cue in cues)
    assert " ".join(line for cue in cues for line in cue.splitlines()[2:]).split() == words


def test_an_output_file_is_complete(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(1.0), RATE)
    status, out, _ = run("--output", tmp_path / "out.txt", tmp_path / "a.wav")
    assert status == 0 and out == "" and (tmp_path / "out.txt").read_text().strip()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--exit", 5], ["no exit after layer 5", "1, 2, 3"]),
        (["--exit", 1, "--exit-policy", "policy.json"], ["either an exit or an exit policy"]),
        (["--method", "1best"], ["1best", "lang_dir"]),
        (["--method", "transducer-greedy_search"], ["transducer-greedy_search", "choose among", "prefix_beam_search"]),
        (["--method", "greedy_search", "--blank-penalty", 1.0], ["blank_penalty", "no weights"]),
        (["--lang-dir", "nowhere"], ["nowhere/tokens.txt does not exist"]),
        (["--fbank", "mfcc"], ["'mfcc'", "linear-mel"]),
        (["--max-segment", 0.1], ["1 s or more"]),
        (["--overlap", 100], ["half of the longest segment"]),
        (["--channel", -1], ["counted from 0"]),
        (["--format", "srt", "b.wav"], ["one recording", "2 are given"]),
        (["-", "-"], ["given twice"]),
    ],
)
def test_bad_options_are_named(run, tmp_path, arguments, messages):
    soundfile.write(tmp_path / "a.wav", bursts(1.0), RATE)
    status, out, err = run(*arguments, tmp_path / "a.wav")
    assert status == 1 and out == "" and len(err.splitlines()) == 1
    assert all(message in err for message in messages), err


@pytest.mark.slow
def test_the_commands_of_the_documentation_run(checkpoint, repo_root, tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(2.0), RATE)
    soundfile.write(tmp_path / "b.flac", bursts(2.0), RATE)
    (tmp_path / "folder").mkdir()
    soundfile.write(tmp_path / "folder/c.ogg", bursts(2.0), RATE)
    (tmp_path / "list.jsonl").write_text('{"audio": "a.wav", "start": 0.5, "duration": 1.0}\n')
    (tmp_path / "EXP").mkdir()
    (tmp_path / "EXP/averaged.pt").write_bytes(checkpoint.read_bytes())
    [commands] = re.findall(r"```bash\n(.+?)```", (repo_root / "docs/transcribe.md").read_text(), re.DOTALL)
    commands = commands.replace("splitformer transcribe", f"{sys.executable} -m splitformer transcribe")
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    script = ["bash", "-e", "-o", "pipefail", "-c", commands]
    done = subprocess.run(script, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.split("\t")[0] for line in done.stdout.splitlines()[:4]]
    assert names == ["a.wav", "b.flac", "folder/c.ogg", "a.wav"]
    assert "00:00:00," in done.stdout and (tmp_path / "out.jsonl").read_text().startswith('{"audio": "a.wav"')


def test_a_command_without_recordings_says_what_it_takes(run):
    status, _, err = run()
    assert status == 1 and "files, folders, .jsonl lists" in err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(checkpoint, tmp_path):
    """Peak memory for 1 minute and for 30 minutes: only levels and words are kept, less than a megabyte."""
    code = (
        "import resource, sys; from splitformer.__main__ import main; status = main(['transcribe', *sys.argv[1:]]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    peaks = []
    minute = bursts(60.0, rate=8000)
    for minutes in (1, 30):
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", 8000, 1, subtype="PCM_16") as sound:
            for _ in range(minutes):
                sound.write(minute)
        options = ["--checkpoint", str(checkpoint), "--exit", "1", "--max-duration", "30"]
        command = [sys.executable, "-c", code, *options, str(tmp_path / f"{minutes}.wav")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 30, f"{peaks} MB; the samples alone are 115 MB"
