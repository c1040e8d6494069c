"""bin/transcribe: what is said does not depend on how it is stored, and what is broken is named."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from splitformer.bin import transcribe
from splitformer.checkpoint import save_checkpoint
from splitformer.config import Config, ModelConfig
from splitformer.data.features import FbankOptions, extract, make_extractor
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.model.asr import AsrModel

RATE = 16000
TOKENS = ["<blk>", "<sos/eos>", "<unk>", "▁", "A", "B", "C", "D", "E"]


@pytest.fixture(scope="module")
def model() -> AsrModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=len(TOKENS), d_model=32, num_heads=2, feedforward_dim=64, conv_kernel=7, num_layers=3,
        exit_layers=(1, 2, 3), parallel_exits=(), cmvn="utterance",
    )  # fmt: skip
    model = AsrModel(config).eval()
    for head in model.ctc_heads.values():
        head.bias.data[1:3] = -100.0  # what is no letter is never said
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    shape = {
        "vocab_size": len(TOKENS), "d_model": 32, "num_heads": 2, "feedforward_dim": 64, "conv_kernel": 7,
        "num_layers": 3, "exit_layers": (1, 2, 3), "parallel_exits": (), "cmvn": "utterance",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("exp") / "averaged.pt"
    contents = {"model": model.state_dict(), "config": Config(model=ModelConfig(**shape)).to_dict(), "tokens": TOKENS}
    contents |= {"progress": {"epoch": 1, "step": 1, "seconds": 1.0}, "seed": 1, "world_size": 1, "device": "none"}
    save_checkpoint(path, contents)
    return path


def bursts(seconds: float, seed: int = 0, rate: int = RATE, pause: float = 0.3) -> np.ndarray:
    """Tones of changing pitch, half a second each, with pauses; (n,) of 16 bits."""
    random = np.random.default_rng(seed)
    time = np.arange(round(0.5 * rate)) / rate
    parts, length = [], 0
    while length < seconds * rate:
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(150, 3000) * time) * np.hanning(len(time))
        parts += [tone, np.zeros(round(pause * rate))]
        length += len(parts[-1]) + len(tone)
    samples = np.concatenate(parts)[: round(seconds * rate)] + random.normal(0, 1e-4, round(seconds * rate))
    return np.round(samples * 32767).astype(np.int16)


@pytest.fixture
def run(checkpoint, monkeypatch, capfd):
    """(exit code, standard output, standard error) of the command."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["transcribe", "--checkpoint", str(checkpoint), *map(str, arguments)])
        status = transcribe.main()
        out, err = capfd.readouterr()
        return status, out, err

    return call


def heard(found: str) -> list[dict]:
    return [json.loads(line) for line in found.splitlines()]


def expected(model: AsrModel, samples: np.ndarray, layer: int = 3) -> tuple[str, list[int]]:
    """The greedy words of features that are computed as those of the training, and the frames of their tokens."""
    waveform = samples.astype(np.float32) / 32768
    features = torch.from_numpy(extract(make_extractor(FbankOptions()), [waveform])[0])
    with torch.no_grad():
        for exit_output, log_probs in model(features.unsqueeze(0), torch.tensor([len(features)])):
            if exit_output.layer == layer:
                [found] = ctc_greedy_search(log_probs, exit_output.lengths)
    pieces = [TOKENS[token] for token in found.tokens if token > 2]
    return "".join(pieces).replace("▁", " ").strip(), found.timestamps


def test_words_are_those_of_greedy_search_whatever_the_container(model, run, tmp_path):
    """At every depth of bits, number of channels, and in each format, the same samples give the same words."""
    samples = bursts(3.0)
    words, _ = expected(model, samples)
    assert words
    stereo = np.stack([samples, samples], axis=1)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "b.flac", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "c.wav", samples.astype(np.int32) << 16, RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "d.wav", stereo, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "e.wav", samples.astype(np.float32) / 32768, RATE, subtype="FLOAT")
    status, out, err = run("--format", "jsonl", tmp_path)
    found = heard(out)
    assert status == 0, err
    assert [Path(each["audio"]).name for each in found] == ["a.wav", "b.flac", "c.wav", "d.wav", "e.wav"]
    assert {each["text"] for each in found} == {" ".join(words.split())}
    assert {each["duration"] for each in found} == {3.0}
    for layer in (1, 2):
        status, out, _ = run("--format", "jsonl", "--exit", layer, tmp_path / "a.wav")
        [segment] = heard(out)[0]["segments"]
        assert status == 0 and segment["exit_layer"] == layer
        assert segment["text"] == " ".join(expected(model, samples, layer)[0].split())
        assert 0.0 <= segment["confidence"] <= 1.0 and segment["milliseconds"] > 0
    status, out, _ = run(tmp_path / "a.wav")
    assert status == 0 and out.strip().endswith(" ".join(words.split()))


def test_other_rates_are_resampled(run, tmp_path):
    for rate in (8000, 22050, 44100, 48000):
        soundfile.write(tmp_path / f"{rate}.wav", bursts(2.0, rate=rate), rate)
    status, out, err = run("--format", "jsonl", tmp_path)
    found = heard(out)
    assert status == 0, err
    assert len(found) == 4 and all(abs(each["duration"] - 2.0) < 1e-3 and each["segments"] for each in found)


def test_standard_input_and_lists(run, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", bursts(2.0), RATE)
    soundfile.write(tmp_path / "b.wav", bursts(2.0, seed=1), RATE)
    _, out, _ = run("--format", "jsonl", tmp_path / "a.wav", tmp_path / "b.wav")
    texts = [each["text"] for each in heard(out)]
    assert texts[0] != texts[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.wav").read_bytes())))
    status, out, err = run("--format", "jsonl", "-")
    assert status == 0 and heard(out)[0]["text"] == texts[0], err
    lines = [{"audio": "b.wav"}, {"audio_filepath": str(tmp_path / "a.wav")}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = run("--format", "jsonl", tmp_path / "list.jsonl")
    assert status == 0 and [each["text"] for each in heard(out)] == [texts[1], texts[0]], err


def test_what_is_broken_is_named_and_the_rest_is_done(run, tmp_path):
    samples = bursts(2.0)
    soundfile.write(tmp_path / "good.wav", samples, RATE)
    soundfile.write(tmp_path / "short.wav", samples[:800], RATE)  # 0.05 s: no output frame
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "cut.flac", samples, RATE)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("this is no audio")
    broken = samples.astype(np.float32) / 32768
    broken[1000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    names = ["good.wav", "empty.wav", "cut.flac", "text.wav", "nan.wav", "nowhere.wav", "short.wav"]
    status, out, err = run("--format", "jsonl", *(tmp_path / name for name in names))
    assert status == 1
    assert [Path(each["audio"]).name for each in heard(out)] == ["good.wav", "short.wav"]
    assert heard(out)[0]["text"] and heard(out)[1]["text"] == ""
    for name in names[1:-1]:
        assert re.search(rf"{re.escape(name)}: .+", err), f"{name} is not named in {err}"
    assert "5 of 7" in err


def test_names_are_data(run, tmp_path):
    names = ["with space.wav", "quo'te\".wav", "$(touch gone).wav", "ünïcode ☃.wav", "-dash.wav", "new\nline.wav"]
    for name in names:
        soundfile.write(tmp_path / name, bursts(1.0), RATE)
    status, out, err = run("--format", "jsonl", "--", *(tmp_path / name for name in names))
    assert status == 0, err
    assert [Path(each["audio"]).name for each in heard(out)] == names
    assert not Path("gone").exists() and not (tmp_path / "gone").exists()
    status, out, _ = run(*(tmp_path / name for name in names))
    assert status == 0 and len(out.splitlines()) == len(names)  # a line each, the name with a line break too


def test_long_recordings_are_cut_at_silences(run, tmp_path):
    samples = np.concatenate([bursts(9.0, seed) for seed in range(6)])
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    status, out, err = run("--format", "jsonl", "--max-segment", 10, tmp_path / "long.wav")
    assert status == 0, err
    segments = heard(out)[0]["segments"]
    assert len(segments) >= 5 and all(each["end"] - each["start"] <= 10.0 + 1e-6 for each in segments)
    for before, after in itertools.pairwise(segments):
        assert before["end"] == pytest.approx(after["start"])  # no overlap where there are pauses
        cut = round(before["end"] * RATE)
        assert np.abs(samples[cut - 400 : cut + 400]).max() < 100  # quiet
    assert segments[0]["start"] == 0.0 and segments[-1]["end"] == pytest.approx(54.0)


def test_srt_and_ctm_can_be_read_back(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(6.0), RATE)
    _, out, _ = run("--format", "jsonl", tmp_path / "a.wav")
    words = heard(out)[0]["text"].split()
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


def test_output_is_whole_or_not_there(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", bursts(1.0), RATE)
    status, out, _ = run("--output", tmp_path / "out.txt", tmp_path / "a.wav")
    assert status == 0 and out == "" and (tmp_path / "out.txt").read_text().strip()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--exit", 5], ["no exit after layer 5", "choose among 1, 2, 3"]),
        (["--method", "1best"], ["1best", "--lang-dir"]),
        (["--method", "transducer-greedy_search"], ["transducer-greedy_search"]),
        (["--max-segment", 0.1], ["1 s or more"]),
        (["--overlap", 100], ["half of the longest segment"]),
    ],
)
def test_bad_options_are_named(run, tmp_path, arguments, messages):
    soundfile.write(tmp_path / "a.wav", bursts(1.0), RATE)
    status, out, err = run(*arguments, tmp_path / "a.wav")
    assert status != 0 and out == "" and all(message in err for message in messages), err


def test_memory_does_not_grow_with_the_recording(checkpoint, tmp_path):
    """Peak memory of 2 minutes and of 2 hours: what is kept is levels and words, some megabytes."""
    code = (
        "import resource, sys; from splitformer.bin import transcribe; status = transcribe.main();"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    peaks = []
    piece = bursts(60.0, rate=8000)
    for minutes in (2, 120):
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", 8000, 1, subtype="PCM_16") as sound:
            for _ in range(minutes):
                sound.write(piece)
        command = [sys.executable, "-c", code, "--checkpoint", str(checkpoint), "--exit", "1"]
        done = subprocess.run([*command, str(tmp_path / f"{minutes}.wav")], capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40, f"{peaks} MB; the samples alone are 460 MB"
