"""The Python API: files and arrays, batches, exits and errors, in a Python that has torch and soundfile alone."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import Fbank, FbankConfig, Recording
from lhotse.augmentation import get_or_create_resampler

import splitformer
from splitformer.checkpoint import checkpoint_id
from splitformer.early_exit.policies import FittedPolicy, Threshold
from tests.factories import tone_speech
from tests.speech import RATE, bursts, greedy_tokens, words_of, write_checkpoint

BLOCKED = ("lhotse", "k2", "sentencepiece", "torchaudio", "kaldialign", "kaldilm", "kaldifeat", "tyro")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("exp") / "averaged.pt")


@pytest.fixture(scope="module")
def recognizer(checkpoint) -> splitformer.Recognizer:
    return splitformer.load(checkpoint)


def write_policy(path: Path, checkpoint: Path, thresholds: dict[int, float]) -> Path:
    policy = Threshold("entropy", thresholds)
    FittedPolicy("entropy", policy, (1, 2, 3), checkpoint_id(checkpoint), "greedy_search").save(path)
    return path


def result_of(transcript: splitformer.Transcript) -> list[tuple]:
    """All that does not depend on the clock."""
    return [(s.start, s.end, s.words, s.tokens, s.timestamps, s.exit, round(s.confidence, 5)) for s in transcript]


def test_importing_the_package_does_not_import_torch(repo_root: Path) -> None:
    code = (
        "import sys, splitformer, splitformer.config\n"
        "assert not {'torch', 'numpy', 'soundfile', 'lhotse'} & sys.modules.keys()\n"
        "assert all(name in dir(splitformer) for name in splitformer.__all__)\n"
        "from splitformer import *\n"
        "assert load and Recognizer and issubclass(AudioError, UserError)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        splitformer.laod  # noqa: B018
    version = re.search(r'^version = "(.+)"$', (repo_root / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is None or splitformer.__version__ == version[1]


def test_files_streams_arrays_and_tensors_give_the_same_transcript(recognizer, tmp_path) -> None:
    samples = bursts(3.0)
    soundfile.write(tmp_path / "a.wav", samples, RATE)
    floats = samples.astype(np.float32) / 32768
    from_file = recognizer.transcribe(tmp_path / "a.wav")
    assert from_file.text and from_file.seconds == 3.0 and from_file.name == str(tmp_path / "a.wav")
    for audio in (samples, floats, floats.astype(np.float64), torch.from_numpy(floats), np.stack([samples, samples])):
        assert result_of(recognizer.transcribe(audio, RATE)) == result_of(from_file)
    assert result_of(recognizer.transcribe(str(tmp_path / "a.wav"))) == result_of(from_file)
    assert result_of(recognizer.transcribe(io.BytesIO((tmp_path / "a.wav").read_bytes()))) == result_of(from_file)
    other = np.stack([bursts(3.0, seed=1), samples])
    assert result_of(recognizer.transcribe(other, RATE, channel=1)) == result_of(from_file)


def test_arrays_are_resampled_as_files(recognizer, tmp_path) -> None:
    for rate in (8000, 44100):
        samples = bursts(3.0, rate=rate)
        soundfile.write(tmp_path / "a.wav", samples, rate)
        transcript = recognizer.transcribe(samples, rate)
        assert transcript.text and result_of(transcript) == result_of(recognizer.transcribe(tmp_path / "a.wav"))


def test_a_segment_is_consistent(recognizer) -> None:
    transcript = recognizer.transcribe(bursts(20.0), RATE, max_segment=6.0)
    assert len(transcript) == len(transcript.segments) >= 4
    assert transcript.text == " ".join(segment.text for segment in transcript)
    for segment in transcript:
        assert segment.exit == 3 and 0.0 <= segment.confidence <= 1.0 and segment.milliseconds > 0
        assert segment.text == " ".join(word.text for word in segment.words) == words_of(segment.tokens)
        times = [segment.start, *segment.timestamps, segment.end]
        assert times == sorted(times) and len(segment.timestamps) == len(segment.tokens)
        assert all(segment.start <= word.start < word.end <= segment.end + 0.04 for word in segment.words)


def test_batches_keep_the_order_and_return_errors_in_place(checkpoint, tmp_path) -> None:
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "a.wav", bursts(9.0), RATE)
    broken = np.zeros(RATE, np.float32)
    broken[5] = np.nan
    audio = [bursts(4.0, 1), tmp_path / "empty.wav", bursts(11.0, 2), tmp_path / "a.wav", broken]
    audio += [np.zeros(800), bursts(2.0)]
    recognizer = splitformer.load(checkpoint, max_duration=12.0)
    results = recognizer.transcribe_batch(audio, RATE, max_segment=5.0)
    reasons = {1: "empty.wav: it is empty", 4: r"audio\[4\]: sample 5 .* is nan"}
    for place, (each, result) in enumerate(zip(audio, results, strict=True)):
        if place in reasons:
            assert isinstance(result, splitformer.AudioError) and re.search(reasons[place], str(result))
            with pytest.raises(splitformer.AudioError, match=reasons[place].replace("4", "0", 1)):
                recognizer.transcribe(each, RATE)
        else:
            alone = recognizer.transcribe(each, RATE, max_segment=5.0)
            assert [s.tokens for s in result] == [s.tokens for s in alone] and result.seconds == alone.seconds
    assert results[5].segments == [] and results[5].text == ""
    assert recognizer.transcribe_batch([]) == []


@pytest.mark.parametrize("heads", [("ctc",), ("transducer",), ("ctc", "transducer")])
def test_nothing_above_the_exit_is_loaded(heads, tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path / "averaged.pt", heads=heads)
    samples = bursts(3.0)
    sizes = []
    for exit in (1, 2, 3, None):
        recognizer = splitformer.load(checkpoint, exit=exit)
        [segment] = recognizer.transcribe(samples, RATE)
        assert segment.exit == (exit or 3) and segment.tokens
        sizes.append(sum(parameter.numel() for parameter in recognizer.model.parameters()))
        if "ctc" in heads:
            features = Fbank(FbankConfig(num_filters=80)).extract(samples.astype(np.float32) / 32768, RATE)
            tokens, starts = greedy_tokens(checkpoint, features, exit or 3)
            assert segment.tokens == tokens and segment.timestamps == pytest.approx(starts)
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3]


def test_an_exit_policy_chooses_exits_and_the_search(checkpoint, tmp_path) -> None:
    samples = bursts(3.0)
    for layer in (1, 2):
        policy = write_policy(tmp_path / "policy.json", checkpoint, {layer: 1e9})
        [segment] = splitformer.load(checkpoint, exit_policy=policy).transcribe(samples, RATE)
        [expected] = splitformer.load(checkpoint, exit=layer).transcribe(samples, RATE)
        assert segment.exit == layer and segment.tokens == expected.tokens
    for options, reason in (({"method": "prefix_beam_search"}, "greedy_search"), ({"exit": 1}, "either")):
        with pytest.raises(splitformer.UserError, match=reason):
            splitformer.load(checkpoint, exit_policy=policy, **options)
    other = write_checkpoint(tmp_path / "other.pt", d_model=16)
    with pytest.raises(splitformer.UserError, match="was fitted for checkpoint"):
        splitformer.load(other, exit_policy=policy)


def test_methods_and_weights(checkpoint, tmp_path) -> None:
    both = write_checkpoint(tmp_path / "both.pt", heads=("ctc", "transducer"))
    for path, method in ((checkpoint, "prefix_beam_search"), (both, "modified_beam_search")):
        assert splitformer.load(path, method=method, blank_penalty=0.5).transcribe(bursts(2.0), RATE).text
    for options, reason in (
        ({"method": "modified_beam_search"}, "choose among greedy_search"),
        ({"method": "nbest-oracle"}, "choose among"),
        ({"blank_penalty": 1.0}, "blank_penalty: greedy_search has no weights"),
        ({"exit": 4}, "1, 2, 3"),
        ({"fbank": "mfcc"}, "linear-mel"),
    ):
        with pytest.raises(splitformer.UserError, match=reason):
            splitformer.load(checkpoint, **options)
    for device in ("tpu", "cuda:99"):
        with pytest.raises(splitformer.UserError, match=f"device '{device}' cannot be used here"):
            splitformer.load(checkpoint, device=device)
    with pytest.raises(splitformer.UserError, match="more than 0 seconds"):
        splitformer.load(checkpoint, max_duration=0)
    with pytest.raises(splitformer.UserError, match="nowhere"):
        splitformer.load("nowhere.pt")


def test_what_is_no_recording_is_a_programming_error(recognizer) -> None:
    with pytest.raises(ValueError, match="sampling_rate is missing"):
        recognizer.transcribe(bursts(1.0))
    with pytest.raises(TypeError, match="a list of recordings"):
        recognizer.transcribe_batch("a.wav")
    with pytest.raises(splitformer.UserError, match="half of the longest segment"):
        recognizer.transcribe(bursts(1.0), RATE, overlap=20.0)


def transcribed_without_packages(checkpoint: Path, audio: list[Path], repo_root: Path) -> list[list[tuple]]:
    """Tokens and their times of each segment, from a process in which BLOCKED cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n"
        "import json, splitformer\n"
        "checkpoint, *audio = sys.argv[1:]\n"
        "results = splitformer.load(checkpoint).transcribe_batch(audio)\n"
        "print(json.dumps([[(s.tokens, s.timestamps) for s in transcript] for transcript in results]))\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint), *map(str, audio)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_against_lhotse(checkpoint: Path, audio: list[Path], repo_root: Path) -> None:
    """Every recording is one segment with the tokens of Lhotse's audio and features."""
    results = transcribed_without_packages(checkpoint, audio, repo_root)
    for path, segments in zip(audio, results, strict=True):
        recording = Recording.from_file(path)
        samples = torch.from_numpy(recording.load_audio())
        if recording.sampling_rate != RATE:  # Recording.resample uses scipy where there is no torchaudio
            samples = get_or_create_resampler(recording.sampling_rate, RATE)(samples)
        tokens, starts = greedy_tokens(checkpoint, Fbank(FbankConfig(num_filters=80)).extract(samples, RATE).numpy())
        [(segment_tokens, timestamps)] = segments
        assert segment_tokens == tokens and timestamps == pytest.approx(starts), path
        assert tokens


def test_transcribing_needs_torch_and_soundfile_alone(checkpoint, tmp_path, repo_root) -> None:
    audio = []
    for number, rate in enumerate((16000, 8000, 44100)):
        audio.append(tmp_path / f"{rate}.wav")
        soundfile.write(audio[-1], tone_speech("ABC DEF GH", np.random.default_rng(number)), rate)
    check_against_lhotse(checkpoint, audio, repo_root)


def test_real_speech_is_transcribed_as_through_lhotse(checkpoint, shared, repo_root) -> None:
    check_against_lhotse(checkpoint, sorted((shared / "data/LibriSpeech").rglob("*.flac")), repo_root)


def test_linear_mel_models_use_their_front_end(tmp_path) -> None:
    checkpoint = write_checkpoint(tmp_path / "averaged.pt", features="linear-mel", cmvn="none")
    by_itself, given = (splitformer.load(checkpoint, fbank=name) for name in (None, "linear-mel"))
    samples = bursts(3.0)
    assert result_of(by_itself.transcribe(samples, RATE)) == result_of(given.transcribe(samples, RATE))
    other = splitformer.load(checkpoint, fbank="lhotse")
    assert result_of(by_itself.transcribe(samples, RATE)) != result_of(other.transcribe(samples, RATE))


def test_the_examples_of_the_documentation_run(checkpoint, tmp_path, repo_root, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("averaged.pt").write_bytes(checkpoint.read_bytes())
    write_policy(Path("policy.json"), checkpoint, {1: 1e9})
    soundfile.write("meeting.wav", np.stack([bursts(3.0), bursts(3.0)], axis=1), RATE)
    soundfile.write("call.flac", bursts(12.0, rate=8000), 8000)
    Path("damaged.wav").write_bytes(Path("meeting.wav").read_bytes()[:9999])
    text = (repo_root / "docs/python_api.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)
    out = capsys.readouterr().out
    assert len(examples) == 5 and "not transcribed: damaged.wav: it is cut off" in out and "call.flac" in out
