"""The synthesised corpus: determined by specification and seed, with test voices and sentences not in training."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from egs.mini.local.synthesise import CorpusSpec, Engine, SpecError, load_spec, plan, resample, synthesise
from splitformer.corpora.manifests import Skipped
from splitformer.corpora.recipes import recipe_pairs

ROOT = Path(__file__).resolve().parents[2]
SPEC_OF_MINI = ROOT / "egs" / "mini" / "corpus.toml"

SPEC = """
sentence = "greeting"
accents = ["en-us", "en-gb-x-rp"]
words_per_minute = [150, 180]
rate_variation = 0.05
pitch = [40, 60]
pitch_range = [40, 60]
level_db = [-30, -20]
snr_db = [20, 40]
[splits.train]
utterances = 12
speakers_per_variant = 2
variants = ["f1", "m1"]
[splits.test]
utterances = 4
variants = ["f3", "m3"]
[rules]
greeting = ["good {time} {name}", "Hello {name}", "hello {name} and {name}"]
time = ["morning", "evening"]
name = ["anna", "peter", "susan"]
"""


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.toml"
    path.write_text(SPEC)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_corpus_depends_on_the_seed_and_not_on_the_number_of_jobs(tmp_path: Path, spec_file: Path) -> None:
    spec = load_spec(spec_file)
    corpora = []
    for name, seed, jobs in (("one", 1, 1), ("three", 1, 3), ("other", 2, 3)):
        synthesise(spec, tmp_path / name, seed=seed, num_jobs=jobs)
        corpora.append(contents(tmp_path / name))
    assert corpora[0] == corpora[1] != corpora[2]
    assert not list(tmp_path.glob(".*")), "no temporary folder is left"


def test_lhotse_reads_it_as_librispeech(tmp_path: Path, spec_file: Path) -> None:
    said = synthesise(load_spec(spec_file), tmp_path / "corpus", seed=1, num_jobs=2)
    for split, count, speakers in (("train", 12, 4), ("test", 4, 2)):
        pairs = list(recipe_pairs("librispeech", tmp_path / "corpus", split, Skipped()))
        assert len(pairs) == count and len({group[0].speaker for _, group in pairs}) == speakers
        texts = {group[0].id: group[0].text for _, group in pairs}
        assert texts == {u.id: u.text.upper() for u in said if u.split == split}
        for recording, group in pairs:
            audio = recording.load_audio()[0]
            assert recording.sampling_rate == 16000
            # people say one to six words a second, and pause a little
            words = len(group[0].text.split())
            assert words / 6 < recording.duration < words + 1
            assert 10 ** (-35 / 20) < np.sqrt(np.mean(audio**2)) < 10 ** (-15 / 20)


def test_an_engine_speaks_after_a_later_one_was_deleted(spec_file: Path) -> None:
    utterance = plan(load_spec(spec_file), 1)[0]
    earlier, later = Engine(), Engine()
    said = later.speak(utterance)
    del later
    gc.collect()
    # not equal: an engine's state depends on what it said before
    assert len(earlier.speak(utterance)) == pytest.approx(len(said), rel=0.2)


def test_a_limit_applies_to_every_split(tmp_path: Path, spec_file: Path) -> None:
    said = synthesise(load_spec(spec_file), tmp_path / "corpus", seed=1, limit=3)
    assert Counter(u.split for u in said) == {"train": 3, "test": 3}


def test_a_voice_that_does_not_exist_is_named_and_nothing_is_left(
    tmp_path: Path, spec_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec_file.write_text(SPEC.replace('"en-us", "en-gb-x-rp"', '"xx-none"'))
    with pytest.raises(SpecError, match=r"utterance .*-1-0000 .* could not be made"):
        synthesise(load_spec(spec_file), tmp_path / "corpus", seed=1, num_jobs=2)
    assert "espeak-ng has no voice 'xx-none+f1'" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.toml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('sentence = "greeting"', 'sentence = "farewell"', "'farewell' is no rule; rules are greeting, time, name"),
        ("{time}", "{day}", r"rules.greeting uses \{day\}, which is"),
        ('["f3", "m3"]', '["f1"]', "'f1' is in the splits train and test"),
        ("rate_variation", "rate_variety", r"unknown keys \['rate_variety'\], missing keys \['rate_variation'\]"),
        ('"good {time} {name}", "Hello {name}", "hello {name} and {name}"', '"hi {name}"', "do not give 4 different"),
        ("utterances = 4", "utterances =", "is not valid TOML"),
    ],
)
def test_bad_specifications(spec_file: Path, old: str, new: str, message: str) -> None:
    spec_file.write_text(SPEC.replace(old, new))
    with pytest.raises(SpecError, match=message):
        plan(load_spec(spec_file), seed=1)


def test_resampling_keeps_a_tone() -> None:
    source, target = 22050, 16000
    tone = np.sin(2 * np.pi * 440 * np.arange(source) / source)
    expected = np.sin(2 * np.pi * 440 * np.arange(target) / target)
    assert np.abs(resample(tone, source, target) - expected)[200:-200].max() < 1e-2
    above = np.sin(2 * np.pi * 9000 * np.arange(source) / source)
    assert np.abs(resample(above, source, target))[200:-200].max() < 1e-2, "what 16 kHz cannot hold is removed"


def test_the_specification_of_mini_separates_test_from_training() -> None:
    spec: CorpusSpec = load_spec(SPEC_OF_MINI)
    said = plan(spec, seed=42)
    texts = {split: [u.text for u in said if u.split == split] for split in spec.splits}
    voices = {split: {u.speaker.voice.split("+")[1] for u in said if u.split == split} for split in spec.splits}
    words = Counter(word for text in texts["train"] for word in text.split())
    for split in ("dev", "test"):
        assert not set(texts[split]) & set(texts["train"])
        assert not voices[split] & voices["train"]
        assert len(set(texts[split])) == len(texts[split])
        assert {word for text in texts[split] for word in text.split()} <= words.keys()
    assert not set(texts["dev"]) & set(texts["test"]) and not voices["dev"] & voices["test"]
    assert 150 <= len(words) <= 300, "a closed vocabulary"
    assert len({u.id for u in said}) == len(said)


def test_flac_is_written_in_16_bits(tmp_path: Path, spec_file: Path) -> None:
    synthesise(load_spec(spec_file), tmp_path / "corpus", seed=1, limit=1)
    info = soundfile.info(next((tmp_path / "corpus").rglob("*.flac")))
    assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
