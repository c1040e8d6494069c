"""The readers of own data: every form, and every mistake by file and line."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import Recording

from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.rules import SplitRule
from splitformer.corpora.sources import ReadOptions, SourceError, read_source
from splitformer.corpora.sources.audio import check_audio
from splitformer.corpora.sources.base import LeftOut
from splitformer.corpora.survey import survey
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import ManifestError
from tests.own_data import (
    TEXTS,
    pairs_of,
    replace_line,
    utterances,
    write_audio,
    write_kaldi,
    write_lhotse,
    write_lines,
    write_table,
)

# ------------------------------------------------------------------------------------------------------ tables


def test_a_table(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    assert read_source(table).kind == "table"
    found = utterances(table)
    assert len(found) == 12
    assert found["clips-ü_3"] == ("play some music", "speaker 3", None, None, None)
    assert [recording.duration for recording, _ in pairs_of(table)][:2] == [1.0, 1.1]


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("path,sentence,client_id", ","), ('"Path";"Sentence";"client_id"', ";"), ("audio_filepath|text|speaker", "|")],
)
def test_usual_column_names_and_delimiters(tmp_path: Path, header: str, delimiter: str) -> None:
    table = write_table(tmp_path, name="table.csv")
    rows = table.read_text().splitlines()[1:]
    rows = [delimiter.join(f'"{field}"' for field in row.split("\t")) for row in rows]
    rows[0] = rows[0].replace("open the door", "open, the\ndoor; \"\"now\"\" | ")
    table.write_text("\n".join([header, *rows]))
    found = utterances(table)
    assert found["clips-ü_0"][0] == 'open, the\ndoor; "now" |' and len(found) == 12


def test_unusual_column_names_are_options(tmp_path: Path) -> None:
    table = write_table(tmp_path, header="Datei;Text;Sprecher", name="table.csv")
    table.write_text(table.read_text().replace("\t", ";"))
    with pytest.raises(SourceError, match=r"table\.csv:1: there is no column for audio; .*'Datei'.* by --audio-column"):
        read_source(table)
    found = utterances(table, audio_column="datei", speaker_column="Sprecher")
    assert found["clips-ü_1"][:2] == ("close the window", "speaker 1")


def test_backslashes_in_paths(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    before = utterances(table)
    table.write_text(table.read_text().replace("clips/", "clips\\"))
    assert utterances(table) == before and len(pairs_of(table)) == 12


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_the_unicode_text_of_excel(tmp_path: Path, encoding: str) -> None:
    """UTF-16 with tabs, and quotes around fields with a comma or a quote."""
    table = write_table(tmp_path, name="table.txt")
    text = table.read_text().replace("\topen the door\t", '\t"open, ""the"" door"\t').replace("\n", "\r\n")
    table.write_bytes(text.encode(encoding))
    assert utterances(table)["clips-ü_0"][0] == 'open, "the" door'


@pytest.mark.parametrize(
    ("encoding", "name"), [("cp1252", "table.csv"), ("shift_jis", "table.tsv"), ("utf-16-le", "table.tsv")]
)
def test_other_encodings_are_an_option(tmp_path: Path, encoding: str, name: str) -> None:
    text = "テスト" if encoding == "shift_jis" else "it’s “fine” – 5 €"
    write_audio(tmp_path / "a.wav")
    table = tmp_path / name
    table.write_bytes(f"audio{';' if name[-3:] == 'csv' else chr(9)}text\na.wav;{text}".replace(
        ";", ";" if name[-3:] == "csv" else "\t").encode(encoding))  # fmt: skip
    with pytest.raises(SourceError, match=r"table\....:\d: byte 0x.* is not UTF-8 text.*--encoding cp1252"):
        read_source(table)
    assert utterances(table, encoding=encoding)["a"][0] == text
    with pytest.raises(SourceError, match="--encoding: unknown encoding: klingon"):
        read_source(table, ReadOptions(encoding="klingon"))


def test_a_long_recording_is_used_by_its_segments(tmp_path: Path) -> None:
    """Two hours, of which a table names a few seconds; its rows are in any order."""
    samples = np.zeros(7200 * 8000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", samples, 8000)
    write_audio(tmp_path / "short.wav", 3.0)
    lines = [f"long.wav\t{TEXTS[i % 4]}\t{7000 - 10 * i}\t{7002.5 - 10 * i}" for i in range(11)]
    lines.insert(2, "short.wav\topen the door\t\t")
    table = write_lines(tmp_path / "t.tsv", "audio\ttext\tstart\tend", *lines)
    pairs = pairs_of(table)
    assert [(r.id, len(group)) for r, group in pairs] == [("long", 11), ("short", 1)]
    assert [s.start for s in pairs[0][1]] == sorted(s.start for s in pairs[0][1])
    assert pairs[0][1][0].id == "long-0690000" and pairs[1][1][0].id == "short"
    write_split(pairs, tmp_path / "r.jsonl", tmp_path / "s.jsonl")
    summary = compute_fbank(
        tmp_path / "r.jsonl", tmp_path / "s.jsonl", tmp_path / "cuts.jsonl", tmp_path / "f", FbankOptions()
    )
    assert summary.num_cuts == 12 and not summary.skipped

    write_lines(table, "audio\ttext", "long.wav\topen the door")
    with pytest.raises(SourceError, match=r"(?s)t\.tsv:2: 7200 s are more than 60.*Give the times.*segments"):
        survey(table)


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "a\tb\tc", r"table\.tsv:1: there is no column for audio and text; the columns are 'a', 'b', 'c'"),
        (1, "audio\tb\tc", r"there is no column for text"),
        (3, "x.wav\tyes", r"table\.tsv:3: 2 columns, and the header has 3; look for a stray tab"),
        (3, "\tyes\tA", r"table\.tsv:3: the row names no audio file"),
        (4, "clips/ü 1.wav\tyes\tA", r"table\.tsv:4: utterance 'clips-ü_1' was already at .*table\.tsv:3; give"),
        (5, "ü.wav\tgr\u00fc\u00df\tA".encode("latin-1"), r"table\.tsv:5: byte 0xfc is not UTF-8 text.*CP1252"),
        (6, b"clips/0.wav\ty\0s\tA", r"table\.tsv:6: byte 0x00 is not UTF-8 text"),
    ],
)
def test_mistakes_of_a_table(tmp_path: Path, number: int, line: str | bytes, message: str) -> None:
    table = write_table(tmp_path)
    replace_line(table, number, line)
    with pytest.raises(SourceError, match=message):
        read_source(table)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("audio\ttext\tsplit", "0.wav\tyes\tholdout", r"t\.tsv:2: split is 'holdout'; it may be train, .*dev.*, test"),
        ("audio\ttext\tstart\tend", "0.wav\tyes\t-1\t2", r"t\.tsv:2: start is '-1'; it must be a number of seconds"),
        ("audio\ttext\tstart\tend", "0.wav\tyes\t3\t2", r"t\.tsv:2: it starts at 3.0 s and ends at 2.0 s"),
        ("audio\ttext\tchannel", "0.wav\tyes\tleft", r"t\.tsv:2: channel is 'left'; it must be a number"),
    ],
)
def test_mistakes_of_columns(tmp_path: Path, header: str, row: str, message: str) -> None:
    write_audio(tmp_path / "0.wav")
    with pytest.raises(SourceError, match=message):
        read_source(write_lines(tmp_path / "t.tsv", header, row))


def test_an_open_quotation_mark_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"t\.csv:2: .*quotation mark that is not closed"):
        read_source(write_lines(tmp_path / "t.csv", "audio,text", 'a.wav,"yes', "b.wav,no"))


def test_a_refused_file_names_the_forms_that_are_read(tmp_path: Path) -> None:
    for name, text in (("manifest.json", "[\n"), ("wav.scp", "a a.wav"), ("manifest.jsonl", "[1]")):
        with pytest.raises(SourceError, match=r"(?s)SOURCE is one of.*a Kaldi data directory.*NeMo"):
            read_source(write_lines(tmp_path / name, text))


# ------------------------------------------------------------------------------------------------------- Kaldi


def test_a_kaldi_data_directory(tmp_path: Path) -> None:
    data = write_kaldi(tmp_path)
    assert read_source(data).kind == "Kaldi"
    assert utterances(data)["r5"] == ("close the window", "s2", None, None, None) and len(pairs_of(data)) == 12
    data = write_kaldi(tmp_path / "more", segments=True)
    assert utterances(data)["r5-1"] == ("close the window", "s2", None, 2.0, None)
    assert [s.end for s in pairs_of(data)[0][1]] == [1.5, 4.0]


@pytest.mark.parametrize(
    "pipe",
    [
        "flac -c -d -s FILE |",
        "flac -cds 'FILE' |",
        "/opt/tools/sph2pipe_v2.5/sph2pipe -f wav -p FILE |",
        "sox FILE -t wav - |",
        "sox -t wav FILE -t wav -r 16000 -b 16 -e signed-integer - |",
        "ffmpeg -v 8 -nostdin -i FILE -f wav -acodec pcm_s16le -ar 16000 - |",
        "cat FILE |",
    ],
)
def test_the_file_of_a_known_pipe_is_read(tmp_path: Path, pipe: str) -> None:
    data = write_kaldi(tmp_path)
    before = pairs_of(data)
    for number in range(12):
        audio = tmp_path / f"audio/{number} é.wav"
        name = str(audio) if "'" in pipe else str(audio).replace(" ", "\\ ")
        replace_line(data / "wav.scp", number + 1, f"r{number} {pipe.replace('FILE', name)}")
    assert pairs_of(data) == before


@pytest.mark.parametrize(
    ("pipe", "reason"),
    [
        ("touch RUN && cat x.wav |", "only cat, flac, sph2pipe, sox, ffmpeg with one file are known"),
        ("cat x.wav; touch RUN |", "'; touch' may change the audio"),
        ("cat $(touch RUN) |", "may change the audio"),
        ("cat `touch RUN` |", "may change the audio"),
        ("flac -c -d -s --skip=5 x.flac |", "'--skip=5 x.flac' may change the audio"),
        ("flac -c -d -s x.flac | sox - -r 16000 - |", r"'\| sox' may change the audio"),
        ("sph2pipe -f wav -p -c 1 x.sph |", "'-c 1' may change the audio"),
        ("sox x.wav -t wav - remix 1 |", "'remix 1' may change the audio"),
        ("sox -r 16000 x.wav -t wav - |", "'-r 16000' may change the audio"),
        ("sox x.wav -t wav -r 8000 - |", "'-r 8000' may change the audio"),
        ("ffmpeg -ss 3 -i x.mp3 -f wav -ac 1 - |", "'-ss 3' may change the audio"),
        ("cat |", "it names no file"),
        ("cat 'x.wav |", "No closing quotation"),
        ("| touch RUN", "only cat, flac"),
    ],
)
def test_other_pipes_are_refused_and_nothing_is_run(tmp_path: Path, pipe: str, reason: str) -> None:
    data = write_kaldi(tmp_path)
    replace_line(data / "wav.scp", 4, f"r3 {pipe.replace('RUN', str(tmp_path / 'run'))}")
    with pytest.raises(SourceError, match=rf"wav\.scp:4: .*'r3' is a pipe, which is not run.*{reason}.*Write"):
        survey(data)
    assert not (tmp_path / "run").exists()


def test_archives_are_refused(tmp_path: Path) -> None:
    data = write_kaldi(tmp_path)
    replace_line(data / "wav.scp", 4, "r3 raw.ark:1234")
    with pytest.raises(SourceError, match=r"wav\.scp:4: .* is in an archive"):
        read_source(data)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("segments", "r1-0 r1 0", r"segments:3: a line of segments is `utterance recording start end`"),
        ("segments", "r1-0 r1 2.5 2.5", r"segments:3: it starts at 2.5 s and ends at 2.5 s"),
        ("segments", "r1-0 r1 x 2.5", r"segments:3: start is 'x'; it must be a number of seconds"),
        ("segments", "r1-0 none 0 2.5", r"segments:3: wav\.scp has no recording 'none'"),
        ("text", "other what", r"text:3: segments has no 'other'"),
        ("text", "r0-0 again", r"text:3: 'r0-0' was already at .*text:1"),
        ("wav.scp", "r2", r"wav\.scp:3: 'r2' stands alone"),
    ],
)
def test_mistakes_of_a_kaldi_data_directory(tmp_path: Path, name: str, line: str, message: str) -> None:
    data = write_kaldi(tmp_path, segments=True)
    replace_line(data / name, 3, line)
    with pytest.raises(SourceError, match=message):
        read_source(data)


# ----------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_audio_and_text(tmp_path: Path) -> None:
    for speaker in ("Ann", "Ζωή"):
        for number in range(3):
            audio = write_audio(tmp_path / f"{speaker}/a {number}.flac", rate=44100, channels=2)
            audio.with_suffix(".lab" if number else ".txt").write_text(f"{TEXTS[number]}\nagain\n")
        shutil.copy(audio, audio.with_name("._a 2.flac"))  # macOS adds such files
    assert read_source(tmp_path).kind == "folder"
    found = utterances(tmp_path)
    assert found["Ζωή-a_1"][:2] == ("close the window again", "Ζωή") and len(found) == 6
    assert {speaker for _, speaker, *_ in utterances(tmp_path, speakers="none").values()} == {None}
    pairs = pairs_of(tmp_path, channel=1)
    assert {s.channel for _, group in pairs for s in group} == {1} and {r.sampling_rate for r, _ in pairs} == {44100}
    with pytest.raises(ManifestError, match=r"a 0\.txt:1: Ann-a_0 has no channel 2; it has 0, 1"):
        pairs_of(tmp_path, channel=2, skipped=Skipped(strict=True))


def test_folders_may_be_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        for name in ("x", "y"):
            write_audio(tmp_path / f"{split}/{name}/1.wav").with_suffix(".txt").write_text("yes")
    found = utterances(tmp_path)
    assert Counter((split, speaker) for _, speaker, split, *_ in found.values()) == Counter(
        (split, name) for split in ("train", "dev", "test") for name in ("x", "y")
    )


def test_text_files_in_another_encoding_are_left_out_or_read(tmp_path: Path) -> None:
    for number in range(14):
        text = write_audio(tmp_path / f"{number:02d}.wav", 1.5).with_suffix(".txt")
        text.write_bytes(f"it’s {TEXTS[number % 4]}".encode("cp1252" if number < 3 else "utf-8"))
    found = survey(tmp_path)
    assert [Path(where).name for where, _ in found.left_out["encoding"]] == ["00.txt:1", "01.txt:1", "02.txt:1"]
    assert "--encoding cp1252 reads it" in found.left_out["encoding"][0][1] and len(found.utterances) == 11
    assert {text[:4] for text, *_ in utterances(tmp_path, encoding="cp1252").values()} == {"it’s"}


@pytest.mark.parametrize("release", ["wav48", "wav48_silence_trimmed"])
def test_the_layout_of_vctk(tmp_path: Path, release: str) -> None:
    for speaker in ("p225", "p226"):
        for number in range(1, 4):
            name = f"{speaker}_{number:03d}"
            if release == "wav48":
                write_audio(tmp_path / release / speaker / f"{name}.wav")
            else:
                for microphone in ("mic1", "mic2"):
                    write_audio(tmp_path / release / speaker / f"{name}_{microphone}.flac")
            if number < 3:
                write_lines(tmp_path / "txt" / speaker / f"{name}.txt", TEXTS[number])
    source = read_source(tmp_path)
    assert source.kind == "VCTK" and len(source.recordings) == 6
    assert not any("mic2" in recording.path.name for recording in source.recordings)
    assert utterances(tmp_path)["p226_002"] == ("what time is it", "p226", None, None, None)
    assert [r.id for r in source.recordings if r.error] == ["p225_003", "p226_003"]
    assert len(pairs_of(tmp_path)) == 4


def test_the_layout_of_ljspeech(tmp_path: Path) -> None:
    lines = []
    for number in range(12):
        write_audio(tmp_path / f"wavs/LJ001-{number:04d}.wav")
        lines.append(f'LJ001-{number:04d}|No. {number} "of|No. {TEXTS[number % 4]}')
    table = write_lines(tmp_path / "metadata.csv", *lines)
    found = utterances(tmp_path)
    assert found["LJ001-0003"] == ("No. play some music", None, None, None, None) and len(found) == 12
    assert utterances(table) == found and len(pairs_of(tmp_path)) == 12
    write_lines(table, *(line.rpartition("|")[0] for line in lines))
    assert utterances(tmp_path)["LJ001-0003"][0] == 'No. 3 "of'
    replace_line(table, 2, "LJ001-0001")
    with pytest.raises(SourceError, match=r"metadata\.csv:2: expected `id\|text`"):
        read_source(tmp_path)


def test_a_metadata_table_with_a_header(tmp_path: Path) -> None:
    write_audio(tmp_path / "sounds/a.wav")
    write_lines(tmp_path / "metadata.csv", "file_name,transcription", "sounds/a.wav,yes")
    assert utterances(tmp_path) == {"sounds-a": ("yes", None, None, None, None)}


def write_common_voice(folder: Path, tables: dict[str, int]) -> Path:
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment"
    for table, count in tables.items():
        lines = [header]
        for number in range(count):
            name = f"common_voice_xx_{table}{number}.mp3"
            write_audio(folder / "clips" / name)
            lines.append(f'{table}{number}\t{name}\ts{number}\t"{TEXTS[number % 4]}\t2\t0\t\t\t\txx\t')
        write_lines(folder / f"{table}.tsv", *lines)
    return folder


def test_the_layout_of_common_voice(tmp_path: Path) -> None:
    folder = write_common_voice(tmp_path / "xx", {"validated": 3, "other": 2, "train": 4, "dev": 2, "test": 2})
    assert read_source(folder).kind == "Common Voice"
    found = utterances(folder)
    assert Counter(split for _, _, split, *_ in found.values()) == {"train": 4, "dev": 2, "test": 2}
    assert found["common_voice_xx_dev1"] == ('"close the window', "dev1", "dev", None, None)
    assert [len(pairs_of(folder, split)) for split in ("train", "dev", "test")] == [4, 2, 2]
    with pytest.raises(SourceError, match=rf"13 audio files and no transcript: .*; did you mean {folder}\?$"):
        read_source(tmp_path)
    # one of its tables
    assert len(utterances(folder / "other.tsv")) == 2 and len(pairs_of(folder / "other.tsv")) == 2
    only = write_common_voice(tmp_path / "yy", {"validated": 3})
    assert {split for _, _, split, *_ in utterances(only).values()} == {None} and len(pairs_of(only)) == 3


def test_the_layout_of_trans_txt(tmp_path: Path) -> None:
    for split, speaker in (("train-clean-5", "103"), ("train-clean-5", "1040"), ("dev-clean-2", "84")):
        chapter = tmp_path / "Corpus" / split / speaker / "7"
        names = [f"{speaker}-7-{number:04d}" for number in range(3)]
        for name in names:
            write_audio(chapter / f"{name}.flac")
        write_lines(chapter / f"{speaker}-7.trans.txt", *(f"{name} OPEN THE DOOR" for name in names))
    write_audio(chapter / "84-7-0009.flac")
    source = read_source(tmp_path / "Corpus")
    assert source.kind == "trans.txt" and [r.id for r in source.recordings if r.error] == ["dev-clean-2-84-7-84-7-0009"]
    found = utterances(tmp_path / "Corpus")
    assert found["1040-7-0002"] == ("OPEN THE DOOR", "1040", "train", None, None) and len(found) == 9
    assert found["84-7-0000"][2] == "dev" and utterances(chapter)["84-7-0000"][2] is None
    assert len(pairs_of(tmp_path, "dev")) == 3


def test_an_utterance_id_with_a_slash_is_refused(tmp_path: Path) -> None:
    write_audio(tmp_path / "1-2-0000.flac")
    write_lines(tmp_path / "1-2.trans.txt", "1-2-0000 YES", "../1-2-0001 NO")
    with pytest.raises(SourceError, match=r"1-2\.trans\.txt:2: '\.\./1-2-0001'.*slash"):
        read_source(tmp_path)


def test_a_folder_without_transcripts(tmp_path: Path) -> None:
    write_audio(tmp_path / "a b.wav")
    with pytest.raises(SourceError, match=r"1 audio files and no transcript: put a b\.txt beside a b\.wav"):
        read_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="has no audio files"):
        read_source(tmp_path / "empty")
    with pytest.raises(SourceError, match=r"none does not exist$"):
        read_source(tmp_path / "none")
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    with pytest.raises(SourceError, match="no file `text`"):
        read_source(tmp_path)


def test_a_corpus_that_lhotse_knows_is_named(tmp_path: Path) -> None:
    write_audio(tmp_path / "data_aishell/wav/train/S0002/BAC009S0002W0122.wav")
    with pytest.raises(SourceError, match=r"Lhotse has a recipe for 'aishell': docs/new_corpus.md says how"):
        read_source(tmp_path)


# --------------------------------------------------------------------------------------------------- manifests


def test_lhotse_manifests(tmp_path: Path) -> None:
    folder = write_lhotse(tmp_path)
    assert read_source(folder).kind == "Lhotse"
    assert [len(pairs_of(folder, split)) for split in ("train", "dev", "test")] == [12, 2, 2]
    assert utterances(folder)["dev_1-1"] == ("close the window", "dev 1", "dev", 1.0, 1.9)


@pytest.mark.parametrize("kind", ["command", "url"])
def test_audio_of_commands_and_addresses_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_lhotse(tmp_path)
    recording = Recording.from_file(next((tmp_path / "audio").iterdir())).to_dict()
    recording["sources"][0] |= {"type": kind, "source": f"touch {tmp_path}/run"}
    write_lines(folder / "own_recordings.jsonl", recording)
    (folder / "own_supervisions.jsonl").write_text("")
    with pytest.raises(SourceError, match=rf"own_recordings\.jsonl:1: .* is a {kind}, which is not run or fetched"):
        survey(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a_supervisions\.jsonl:1: this is not JSON"),
        ('{"id": "u"}', r"a_supervisions\.jsonl:1: the line lacks 'start'"),
        (
            '{"id": "u", "recording_id": "none", "start": 0, "duration": 1}',
            r"a_supervisions\.jsonl:1: .* has no recording 'none'",
        ),
    ],
)
def test_mistakes_of_manifests(tmp_path: Path, line: str, message: str) -> None:
    write_lines(tmp_path / "a_recordings.jsonl", Recording.from_file(write_audio(tmp_path / "a.wav")).to_dict())
    write_lines(tmp_path / "a_supervisions.jsonl", line)
    with pytest.raises(SourceError, match=message):
        read_source(tmp_path)


def test_nemo_manifests(tmp_path: Path) -> None:
    for number in range(4):
        write_audio(tmp_path / f"audio/{number}.wav", 4.0)
    whole = [{"audio_filepath": f"audio/{i}.wav", "duration": 4.0, "text": TEXTS[i]} for i in range(4)]
    path = write_lines(tmp_path / "list.json", *whole)
    assert utterances(path)["audio-1"] == ("close the window", None, None, None, None) and len(pairs_of(path)) == 4
    parts = [{**line, "offset": offset, "duration": 1.5} for line in whole for offset in (0.0, 2.25)]
    path = write_lines(tmp_path / "list.jsonl", *parts)
    assert utterances(path)["audio-1-0000225"] == ("close the window", None, None, 2.25, 3.75)
    assert [len(group) for _, group in pairs_of(path)] == [2, 2, 2, 2]
    write_lines(path, {"audio_filepath": "x.wav", "duration": 1})
    with pytest.raises(SourceError, match=r"list\.jsonl:1: there is no column for text; .*'audio_filepath', 'dur"):
        read_source(path)
    for number, split in enumerate(("train", "dev", "test")):
        write_lines(tmp_path / f"{split}_manifest.json", whole[number])
    assert {name: split for name, (_, _, split, *_) in utterances(tmp_path).items()} == {
        "audio-0": "train", "audio-1": "dev", "audio-2": "test"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- audio


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "zeroed":
        data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data[: len(data) // 3] if how == "cut" else data)


@pytest.mark.parametrize(
    ("name", "how", "decode"),
    [
        ("a.flac", "cut", False),
        ("a.flac", "zeroed", True),
        ("a.wav", "cut", False),
        ("a.mp3", "cut", False),
        ("a.mp3", "cut", True),
    ],
)
def test_damaged_audio_is_found(tmp_path: Path, name: str, how: str, decode: bool) -> None:
    for each in (f"whole/{name}", f"damaged/{name}"):
        path = write_audio(tmp_path / each, 12.0)
        path.with_suffix(".txt").write_text("yes")
    whole, damaged = (read_source(tmp_path / folder).recordings for folder in ("whole", "damaged"))
    assert [type(each) for each in check_audio([*whole, *damaged], decode)] == [Recording, Recording]
    damage(path, how)
    good, error = check_audio([*whole, *damaged], decode)
    assert isinstance(good, Recording) and isinstance(error, LeftOut)
    assert error.kind == "damaged audio" and re.search(rf"{name}: it is (cut off|corrupt)", error.reason)
    if how == "zeroed":
        assert "corrupt between 0 and 10 s" in error.reason


def test_a_wav_file_of_unknown_length_is_whole(tmp_path: Path) -> None:
    """Programs that write to a pipe state a length of 0xFFFFFFFF or so."""
    path = write_audio(tmp_path / "a.wav", 2.0)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text("yes")
    [recording] = check_audio(read_source(tmp_path).recordings, decode=True)
    assert isinstance(recording, Recording) and recording.duration == pytest.approx(2.0)


def test_audio_in_another_format(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav").with_suffix(".txt").write_text("yes")
    (tmp_path / "b.m4a").write_bytes(b"ftypM4A ")
    (tmp_path / "b.txt").write_text("no")
    _, error = check_audio(read_source(tmp_path).recordings)
    assert isinstance(error, LeftOut) and "libsndfile does not read this format; ffmpeg may convert it" in error.reason


# ------------------------------------------------------------------------------- what earlier versions have made

EXPECTED = {
    "table": {"dev": ["clips-ü_6", "clips-ü_10", "clips-ü_15"], "test": ["clips-ü_0", "clips-ü_12"]},
    "spans": {
        "dev": [f"long-{i:07d}" for i in (0, 200, 1000, 2800, 3200, 3600)],
        "test": [f"long-{i:07d}" for i in (400, 800, 2000, 2200, 3000)],
    },
    "kaldi": {"dev": ["r5-1", "r9-0"], "test": ["r1-0", "r3-0", "r6-0", "r6-1", "r8-0"]},
    "folder": {
        "dev": ["Ann-a_6", "Ζωή-a_1"],
        "test": ["Ann-a_0", "Ann-a_4", "Ann-a_7", "Ζωή-a_2", "Ζωή-a_3", "Ζωή-a_4", "Ζωή-a_7"],
    },
    "lhotse": {
        "dev": [f"dev_{i}" for i in ("0-0", "0-1", "1-0", "1-1")]
        + [f"train_{i}" for i in ("0-0", "0-1", "1-0", "4-1", "5-1", "10-1")],
        "test": [f"test_{i}" for i in ("0-0", "0-1", "1-0", "1-1")]
        + [f"train_{i}" for i in ("1-1", "2-0", "5-0", "8-1", "10-0")],
    },
}


def ids_and_splits(source: Path) -> dict[str, list[str]]:
    rule = SplitRule("utterance", 3, 0.2, 0.2)
    return {split: [s.id for _, group in pairs_of(source, split, rule) for s in group] for split in ("dev", "test")}


def test_ids_and_splits_stay(tmp_path: Path) -> None:
    """A corpus that was described by an earlier version keeps its utterances and its splits."""
    write_audio(tmp_path / "long.wav", 40.0)
    spans = [f"long.wav,{TEXTS[i % 4]},{2 * i},{1.5}" for i in range(20)]
    folder = tmp_path / "folder"
    for speaker in ("Ann", "Ζωή"):
        for number in range(8):
            write_audio(folder / f"{speaker}/a {number}.flac").with_suffix(".txt").write_text("yes")
    sources = {
        "table": write_table(tmp_path / "table", rows=20),
        "spans": write_lines(tmp_path / "spans.csv", "file,text,start,duration", *spans),
        "kaldi": write_kaldi(tmp_path / "kaldi", rows=10, segments=True),
        "folder": folder,
        "lhotse": write_lhotse(tmp_path / "lhotse"),
    }
    assert {name: ids_and_splits(source) for name, source in sources.items()} == EXPECTED
