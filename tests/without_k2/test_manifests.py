"""Manifests: streams, the ways to make them, and the checks that name and drop what cannot be used."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import Recording, SupervisionSegment

from egs.an4.local.manifests import Options, sphinx_pairs
from egs.an4.local.words import sphinx_words
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.recipes import files_below, recipe_pairs
from splitformer.corpora.validation import validate_split
from splitformer.data.manifests import ManifestError, Pair, count_items, cuts_from_manifests, read_cuts, read_pairs
from tests.corpora import write_tedlium

RATE = 16000


def write_audio(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(seconds * RATE)), RATE)
    return path


def make_pair(name: str, audio: Path, text: str = "YES") -> Pair:
    recording = Recording.from_file(audio, recording_id=name)
    return recording, [SupervisionSegment(name, name, 0.0, recording.duration, 0, text)]


def split_files(folder: Path) -> tuple[Path, Path]:
    return folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"


@pytest.fixture
def librispeech_layout(tmp_path: Path) -> Path:
    """A corpus with one split, `train`, of four utterances in LibriSpeech's layout."""
    chapter = tmp_path / "corpus" / "train" / "12" / "3"
    for number in range(4):
        write_audio(chapter / f"12-3-{number:04d}.flac")
    (chapter / "12-3.trans.txt").write_text("".join(f"12-3-{n:04d} WORD NUMBER\n" for n in range(4)))
    return tmp_path / "corpus"


@pytest.fixture
def sphinx_layout(tmp_path: Path) -> Path:
    """Three speakers with two utterances each, as CMU sphinx trainers keep them."""
    root = tmp_path / "sphinx"
    ids = [f"{speaker}/{speaker}-{number}" for speaker in ("ann", "bob", "cid") for number in range(2)]
    for path in ids:
        write_audio(root / "wav" / f"{path}.wav")
    (root / "fileids").write_text("\n".join(ids) + "\n")
    (root / "transcription").write_text("".join(f"<s> GO  {i.upper()[0]} </s> ({Path(i).name})\n" for i in ids))
    return root


def sphinx(root: Path, skipped: Skipped | None = None, **options: Any) -> list[Pair]:
    files = [root / name for name in ("fileids", "transcription", "wav", "recordings.jsonl", "supervisions.jsonl")]
    chosen = Options(*files, suffix=".wav", **options)
    return list(sphinx_pairs(chosen, Skipped() if skipped is None else skipped))


def test_sphinx_layout_gives_text_without_marks_and_speakers(sphinx_layout: Path) -> None:
    segments = [group[0] for _, group in sphinx(sphinx_layout)]
    assert [s.id for s in segments] == ["ann-0", "ann-1", "bob-0", "bob-1", "cid-0", "cid-1"]
    assert segments[2].text == "GO B" and segments[2].speaker == "bob"


def test_speakers_divide_a_sphinx_corpus(sphinx_layout: Path) -> None:
    dev = {r.id for r, _ in sphinx(sphinx_layout, speakers=("bob",))}
    train = {r.id for r, _ in sphinx(sphinx_layout, exclude_speakers=("bob",))}
    assert dev == {"bob-0", "bob-1"} and not dev & train and len(train) == 4
    with pytest.raises(ManifestError, match=r"no speakers \['dan'\]; it has ann, bob, cid"):
        sphinx(sphinx_layout, speakers=("dan",))


def test_sphinx_limit_is_spread_over_the_corpus(sphinx_layout: Path) -> None:
    assert [r.id for r, _ in sphinx(sphinx_layout, limit_utterances=3)] == ["ann-0", "bob-0", "cid-0"]


@pytest.mark.parametrize("content", [b"", b"NIST_1A\n   1024\nrubbish"])
def test_sphinx_names_unusable_audio(sphinx_layout: Path, content: bytes) -> None:
    (sphinx_layout / "wav/bob/bob-1.wav").write_bytes(content)
    skipped = Skipped()
    assert len(sphinx(sphinx_layout, skipped)) == 5
    assert len(skipped) == 1 and next(iter(skipped.reasons)).endswith("bob-1.wav")
    with pytest.raises(ManifestError, match=r"bob-1\.wav.*--strict"):
        sphinx(sphinx_layout, Skipped(strict=True))


def test_sphinx_refuses_transcripts_that_contradict(sphinx_layout: Path) -> None:
    with open(sphinx_layout / "transcription", "a") as file:
        file.write("<s> AGAIN </s> (ann-0)\n")
    with pytest.raises(ManifestError, match="transcription:7: utterance 'ann-0' is there twice"):
        sphinx(sphinx_layout)
    (sphinx_layout / "transcription").write_text("<s> GO </s>\n")
    with pytest.raises(ManifestError, match="transcription:1"):
        sphinx(sphinx_layout)


def test_sphinx_skips_an_empty_transcript(sphinx_layout: Path) -> None:
    text = (sphinx_layout / "transcription").read_text().replace("<s> GO  C </s> (cid-0)", "<s> </s> (cid-0)")
    (sphinx_layout / "transcription").write_text(text)
    skipped = Skipped()
    assert len(sphinx(sphinx_layout, skipped)) == 5
    assert "no transcript" in skipped.reasons["cid-0"]


def test_lhotse_recipe_reads_the_layout(librispeech_layout: Path) -> None:
    pairs = list(recipe_pairs("librispeech", librispeech_layout, "train", Skipped()))
    assert [r.id for r, _ in pairs] == [f"12-3-{n:04d}" for n in range(4)]
    assert pairs[0][1][0].text == "WORD NUMBER" and pairs[0][1][0].speaker == "12"


def test_lhotse_recipe_skips_damaged_files(librispeech_layout: Path) -> None:
    chapter = librispeech_layout / "train/12/3"
    (chapter / "12-3-0001.flac").write_bytes(b"")
    (chapter / "12-3-0002.flac").write_bytes(b"fLaC, not really")
    skipped = Skipped()
    pairs = list(recipe_pairs("librispeech", librispeech_layout, "train", skipped))
    assert [r.id for r, _ in pairs] == ["12-3-0000", "12-3-0003"]
    assert pairs[0][0].sources[0].source == str(chapter / "12-3-0000.flac")
    assert {Path(p).name: r.split(" (")[0] for p, r in skipped.reasons.items()} == {
        "12-3-0001.flac": "the audio file is empty",
        "12-3-0002.flac": "the audio file is corrupt",
    }
    with pytest.raises(ManifestError, match=r"12-3-0001\.flac"):
        list(recipe_pairs("librispeech", librispeech_layout, "train", Skipped(strict=True)))


def test_lhotse_recipe_errors_name_the_choices(librispeech_layout: Path) -> None:
    with pytest.raises(ManifestError, match="has: train"):
        list(recipe_pairs("librispeech", librispeech_layout, "dev", Skipped()))
    with pytest.raises(ManifestError, match="no recipe 'nonesuch'"):
        list(recipe_pairs("nonesuch", librispeech_layout, "train", Skipped()))
    (librispeech_layout / "train/12/3/12-3.trans.txt").write_text("12-3-0000\n")
    with pytest.raises(ManifestError, match="transcript without words"):
        list(recipe_pairs("librispeech", librispeech_layout, "train", Skipped()))


def test_recordings_of_several_utterances(tmp_path: Path) -> None:
    """Folder and options go to the recipe; a limit counts utterances; a damaged talk is skipped with its text."""
    write_tedlium(tmp_path, {"train": 2})
    root = tmp_path / "TEDLIUM_release-3"

    def talks(**more: object) -> list[Pair]:
        return list(recipe_pairs("tedlium", root, "train", Skipped(), folder="legacy/train", **more))

    assert [len(group) for _, group in talks()] == [8, 8]
    assert "close the window [NOISE] please <unk>" in {s.text for _, group in talks() for s in group}
    kaldi = talks(options={"normalize_text": "kaldi"})
    assert "it's cold today" in {s.text for _, group in kaldi for s in group}
    assert [len(group) for _, group in talks(limit=5)] == [3, 2]
    with pytest.raises(ManifestError, match=r"'tedlium' has no option speed; it has tedlium_root, .*normalize_text"):
        talks(options={"speed": "2"})
    (root / "data/sph/Speaker1_2010.sph").write_bytes(b"NIST_1A\n   1024\nrubbish")
    skipped = Skipped()
    pairs = list(recipe_pairs("tedlium", root, "train", skipped, folder="legacy/train"))
    assert [r.id for r, _ in pairs] == ["Speaker2_2010"] and len(skipped) == 1
    assert pairs[0][0].sources[0].source == str(root / "legacy/train/sph/Speaker2_2010.sph")


def test_a_link_to_a_parent_folder_is_followed_once(tmp_path: Path) -> None:
    write_audio(tmp_path / "a/b.wav")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert len([path for path in files_below(tmp_path) if path.name == "b.wav"]) == 1


def test_equal_items_give_equal_manifests(tmp_path: Path) -> None:
    pairs = [make_pair("a", write_audio(tmp_path / "a.wav"))]
    for folder in ("one", "two"):
        write_split(pairs, *split_files(tmp_path / folder))
    for one, two in zip(split_files(tmp_path / "one"), split_files(tmp_path / "two")):
        assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ManifestError, match=r"\.jsonl"):
        write_split(pairs, tmp_path / "r.json", tmp_path / "s.json")


def test_cuts_are_supervisions_with_their_own_start(tmp_path: Path) -> None:
    recording, _ = make_pair("a", write_audio(tmp_path / "a.wav", 2.0))
    group = [SupervisionSegment(f"a-{i}", "a", start, 0.5, 0, "YES") for i, start in enumerate((0.0, 1.25))]
    write_split([(recording, group)], *split_files(tmp_path))
    cuts = list(cuts_from_manifests(*split_files(tmp_path)))
    assert [(c.id, c.start, c.duration, c.supervisions[0].start) for c in cuts] == [
        ("a-0", 0.0, 0.5, 0.0),
        ("a-1", 1.25, 0.5, 0.0),
    ]


def test_supervisions_in_another_order_are_refused(tmp_path: Path) -> None:
    pairs = [make_pair(name, write_audio(tmp_path / f"{name}.wav")) for name in "ab"]
    shuffled = [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])]
    write_split(shuffled, *split_files(tmp_path))
    with pytest.raises(ManifestError, match="supervision 'a' belongs to recording 'a'"):
        list(read_pairs(*split_files(tmp_path)))


def test_validation_drops_and_names_what_is_unusable(tmp_path: Path) -> None:
    names = ["good", "gone", "empty", "corrupt", "shorter", "silent", "twice", "twice", "late", "last"]
    pairs = [
        make_pair(name, write_audio(tmp_path / f"{name}.wav"), "" if name == "silent" else "YES") for name in names
    ]
    pairs[8][1][0].duration = 9.0
    write_split(pairs, *split_files(tmp_path))
    (tmp_path / "gone.wav").unlink()
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF, or so it says")
    write_audio(tmp_path / "shorter.wav", 0.2)
    before = split_files(tmp_path)[0].read_bytes()

    with pytest.raises(ManifestError, match=r"gone.*--strict"):
        validate_split(*split_files(tmp_path), strict=True)
    assert split_files(tmp_path)[0].read_bytes() == before

    count, seconds, skipped = validate_split(*split_files(tmp_path))
    assert count == 3 and seconds == pytest.approx(1.5)
    assert [r.id for r, _ in read_pairs(*split_files(tmp_path))] == ["good", "twice", "last"]
    expected = {
        "gone": "does not exist",
        "empty": "is empty",
        "corrupt": "is corrupt",
        "shorter": "3200 samples at 16000 Hz, the manifest says 8000",
        "silent": "transcript is empty",
        "twice": "same id",
        "late": "0.0 to 9.0 s",
    }
    assert skipped.reasons.keys() == expected.keys()
    assert all(part in skipped.reasons[name] for name, part in expected.items()), skipped.reasons

    count, _, skipped = validate_split(*split_files(tmp_path))
    assert count == 3 and not skipped


def test_validation_refuses_a_split_without_usable_utterance(tmp_path: Path) -> None:
    write_split([make_pair("a", write_audio(tmp_path / "a.wav"), "")], *split_files(tmp_path))
    with pytest.raises(ManifestError, match="no usable utterance among 1"):
        validate_split(*split_files(tmp_path))


def test_a_missing_manifest_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="whose manifests stage writes it"):
        validate_split(*split_files(tmp_path))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    audio = write_audio(tmp_path / "a.wav")

    def peak(count: int) -> int:
        files = split_files(tmp_path / str(count))
        write_split((make_pair(f"u{number}", audio) for number in range(count)), *files)
        assert count_items(files[0]) == count
        list(zip(range(5), cuts_from_manifests(*files)))  # imports on first use
        tracemalloc.start()
        for _ in cuts_from_manifests(*files):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)
    assert peak(3000) < peak(300) + 100_000


def test_words_of_a_dictionary_are_listed_once(tmp_path: Path) -> None:
    dictionary = tmp_path / "words.dic"
    dictionary.write_text("B B IY\nA AH\nA(2) EY\n\nO'CLOCK AX K L AA K\n")
    assert sphinx_words(dictionary) == ["A", "B", "O'CLOCK"]
    dictionary.write_text("A AH\nB\n")
    with pytest.raises(ValueError, match=r"words\.dic:2: 'B' has no pronunciation"):
        sphinx_words(dictionary)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cuts.jsonl", b"recordings of Monday\n"),
        ("cuts.jsonl", b'{"utterance": 1}\n'),
        ("cuts.jsonl", b"[1, 2]\n"),
        ("cuts.jsonl", "größer".encode("latin-1")),
        ("cuts.jsonl.gz", b'{"id": "a"}\n'),
        ("cuts.jsonl.gz", gzip.compress(b'{"id": "a"}\n' * 1000)[:-20]),
    ],
    ids=["text", "other keys", "list", "latin-1", "not packed", "truncated"],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"{name} is damaged, or no manifest"):
        list(read_cuts(tmp_path / name))
