"""Own data: what a survey finds and proposes, who is in which split, and the corpus that is written."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from local.manifests_from_source import run as manifests_from_source
from local.new_corpus import run as new_corpus
from local.validate_cuts import run as validate_cuts
from splitformer.cli import command
from splitformer.config import load_config
from splitformer.corpora.description import description, write_folder
from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.manifests import Skipped, write_split
from splitformer.corpora.proposal import Choices, propose, render
from splitformer.corpora.rules import SplitRule, TextRules, choose_seed, has_digits
from splitformer.corpora.sources import ReadOptions, SourceError
from splitformer.corpora.sources.base import Utterance
from splitformer.corpora.survey import Survey, SurveyedUtterance, survey
from splitformer.corpora.tokens import train_tokenizer
from splitformer.data.features import FbankOptions
from splitformer.data.manifests import read_cuts, read_supervisions
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.asr import AsrModel
from tests.corpora import GREEK
from tests.own_data import TEXTS, pairs_of, replace_line, utterances, write_audio, write_lines, write_table

# ----------------------------------------------------------------------------------------------------- survey


def test_missing_and_damaged_audio_is_left_out_by_file_and_line(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=16)
    (tmp_path / "clips/ü 2.wav").unlink()
    (tmp_path / "clips/ü 5.wav").write_bytes(b"RIFF, or so it says")
    replace_line(table, 9, "clips/ü 7.wav\t  \tspeaker 3")
    found = survey(table)
    named = {kind: [Path(where).name for where, _ in places] for kind, places in found.left_out.items()}
    assert named == {
        "missing audio": ["table.tsv:4"], "damaged audio": ["table.tsv:7"], "no transcript": ["table.tsv:9"]
    }  # fmt: skip
    assert "does not exist" in found.left_out["missing audio"][0][1]
    assert "corrupt" in found.left_out["damaged audio"][0][1] and "ffmpeg -i '" in found.left_out["damaged audio"][0][1]
    text = render(found, propose(found))
    assert "missing audio: 1" in text and "table.tsv:4" in text and "no transcript: 1" in text

    skipped = Skipped()
    assert len(pairs_of(table, skipped=skipped)) == 13
    assert sorted(Path(name).name for name in skipped.reasons) == ["table.tsv:4", "table.tsv:7", "table.tsv:9"]
    table.write_text(table.read_text().replace("clips/", "elsewhere/"))
    with pytest.raises(SourceError, match=r"(?s)16 of 16 utterances have no usable audio:.*tsv:2.*--audio-dir DIR"):
        survey(table)
    (tmp_path / "clips").rename(tmp_path / "elsewhere")
    (tmp_path / "lists").mkdir()
    table = table.rename(tmp_path / "lists/table.tsv")
    assert len(survey(table, ReadOptions(audio_dir=tmp_path)).utterances) == 13


def test_a_partial_download_is_an_option(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=40)
    for number in range(13, 40):
        (tmp_path / f"clips/ü {number}.wav").unlink()
    with pytest.raises(SourceError, match=r"(?s)27 of 40 utterances have no usable audio.*--skip-missing ignores"):
        survey(table)
    options = ReadOptions(skip_missing=True)
    found = survey(table, options)
    assert "ignored for lack of a file: 27 recordings" in render(found, propose(found)) and len(found.utterances) == 13
    assert "--skip-missing" in description("own", table, propose(found), options)["corpus.sh"]
    skipped = Skipped(strict=True)
    assert len(pairs_of(table, skipped=skipped, skip_missing=True)) == 13 and not skipped.reasons


def damage(audio: Path) -> None:
    data = bytearray(audio.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    audio.write_bytes(data)


def test_how_much_audio_is_decoded_is_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding finds zeroed bytes in the middle of a FLAC file, in the survey and in preparation."""
    for number in range(20):
        write_audio(tmp_path / f"{number:02d}.flac", 3.0).with_suffix(".txt").write_text(TEXTS[number % 4])
    damage(tmp_path / "07.flac")
    found = survey(tmp_path)
    assert found.audio_check == "20 files, 1 of them damaged; all were decoded" and found.decoded_all
    assert Path(found.left_out["damaged audio"][0][0]).name == "07.txt:1"
    assert "--check-audio all" in description("own", tmp_path, propose(found), decode=True)["corpus.sh"]
    skipped = Skipped()
    assert len(pairs_of(tmp_path, decode=True, skipped=skipped)) == 19
    assert "07.flac: it is corrupt" in next(iter(skipped.reasons.values()))

    headers = survey(tmp_path, check="headers")
    assert len(headers.utterances) == 20 and "--check-audio all" in headers.audio_check and not headers.decoded_all
    monkeypatch.setattr("splitformer.corpora.survey.DECODED_HOURS", 30 / 3600)
    sample = survey(tmp_path)
    assert sample.audio_check.startswith("20 files, ") and "; 10 were decoded, of the" in sample.audio_check
    assert not sample.decoded_all and survey(tmp_path, check="all").decoded_all
    (tmp_path / "11.flac").write_bytes(b"fLaC, or so it says")  # found by its header
    found = survey(tmp_path, check="all")
    assert found.audio_check == "20 files, 2 of them damaged; all were decoded"
    assert "damaged audio: 2" in render(found, propose(found))


def test_a_span_beyond_its_recording(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", 3.0)
    rows = ["a.wav\tone\t0\t1", "a.wav\ttwo\t1\t3.3", "a.wav\tthree\t2\t9", "a.wav\tfour\t4\t"]
    table = write_lines(tmp_path / "t.tsv", "audio\ttext\tstart\tend", *rows)
    skipped = Skipped()
    [(_, group)] = pairs_of(table, skipped=skipped)
    assert [(s.text, s.end) for s in group] == [("one", 1.0), ("two", 3.0)]
    assert {Path(where).name: reason for where, reason in skipped.reasons.items()} == {
        "t.tsv:4": "it spans 2 to 9 s, and its recording has 3.00 s",
        "t.tsv:5": "it spans 4 to 3 s, and its recording has 3.00 s",
    }


def test_the_channel_is_mentioned_where_the_source_names_none(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    write_audio(tmp_path / "clips/ü 0.wav", channels=2)
    found = survey(table)
    assert "; one of them is used (--channel)" in render(found, propose(found))
    lines = table.read_text().splitlines()
    write_lines(table, f"{lines[0]}\tchannel", *(f"{line}\t0" for line in lines[1:]))
    found = survey(table)
    assert "--channel" not in render(found, propose(found))


def test_three_utterances_are_too_few(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"3 usable utterances are too few .*; 10 are the minimum"):
        survey(write_table(tmp_path, rows=3))


# -------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,  World!", "hello world"),
        ("it’s 'quoted' rock-'n'-roll", "it's quoted rock n roll"),
        ("[noise] yes <unk> either/or", "yes either or"),
        ("ΣΟΦΟΣ άνθρωπος;", "σοφος άνθρωπος"),
        ("Cafe\u0301\u00ad \ufeffnai\u0308ve", "café naïve"),
        ("می\u200cخواهم.", "می\u200cخواهم"),
        ("नमस्ते।", "नमस्ते"),
        ("…", ""),
    ],
)
def test_text_rules(text: str, expected: str) -> None:
    assert TextRules("lower", "drop", "keep").apply(text) == expected


def test_kept_text_is_normalized_and_loses_invisible_characters() -> None:
    assert TextRules().apply(" Cafe\u0301,\tüber\u200b 12 ") == "Café, über 12"
    assert has_digits("the 2nd") and has_digits("٣") and has_digits("½") and not has_digits("two 二 IV")


@pytest.mark.parametrize("text", ["it\x92s", "5 \x80", "caf\ufffd"])
def test_text_that_was_read_in_a_wrong_encoding_is_reported(tmp_path: Path, text: str) -> None:
    """iconv -f ISO-8859-1 makes invisible control characters of the quotes, dashes and the euro sign of Windows."""
    found = survey(table_of(tmp_path, [text, *TEXTS * 3]))
    [(where, reason)] = found.left_out["encoding"]
    assert Path(where).name == "t.tsv:2" and "iconv -f CP1252 -t UTF-8" in reason
    skipped = Skipped()
    assert len(pairs_of(tmp_path / "t.tsv", skipped=skipped)) == 12 and len(skipped) == 1


def table_of(tmp_path: Path, texts: list[str], speakers: int = 5) -> Path:
    lines = ["audio\ttext\tspeaker"]
    for number, text in enumerate(texts):
        write_audio(tmp_path / f"{number}.wav", 1.5)
        lines.append(f"{number}.wav\t{text}\t{number % speakers}")
    (tmp_path / "t.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "t.tsv"


def test_the_survey_says_what_training_leaves_out(tmp_path: Path) -> None:
    table = table_of(tmp_path, TEXTS * 5)
    found = survey(table)
    assert "longer than" not in render(found, propose(found))
    for number in (3, 8, 13):  # one of every split, perhaps
        write_audio(tmp_path / f"{number}.wav", 26.0)
    text = "audio\ttext\tsplit\n" + "".join(
        f"{number}.wav\t{TEXTS[number % 4]}\t{['train', 'dev', 'test'][max(0, number - 17)]}\n" for number in range(20)
    )
    table.write_text(text)
    found = survey(table)
    text = render(found, propose(found))
    assert "  3 longer than 25 s: training leaves them out (data.max_utterance_seconds)" in text
    assert "  nothing" not in text


def test_counts_and_alphabets_read_well(tmp_path: Path) -> None:
    table = table_of(tmp_path, ["it's on", *TEXTS * 3, "open the door"], speakers=1)
    found = survey(table)
    text = render(found, propose(found, Choices(split_by="utterance")))
    assert "speakers: 1, with 14 utterances" in text and "train: " in text
    assert re.search(r"dev: 1 utterance, .* 1 speaker$", text, re.MULTILINE)
    assert "dev shares 1 speaker with train" in text
    assert re.search(r"alphabet after normalization: \d+ characters: ' a c d", text)
    assert not re.search(r"\b1 (utterances|speakers|recordings|times|transcripts)\b", text)
    assert propose(found).reasons["split"] == "only 1 speaker"


def test_splits_by_unknown_speakers_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path, header="audio\ttext\tSprecher")
    with pytest.raises(SourceError, match=r"--split-by speaker: the speakers are unknown; .*--speaker-column"):
        propose(survey(table), Choices(split_by="speaker"))
    found = survey(table, ReadOptions(speaker_column="Sprecher"))
    assert propose(found, Choices(split_by="speaker")).split_rule.split_by == "speaker"


def test_text_rules_are_proposed(tmp_path: Path) -> None:
    table = table_of(tmp_path, ["Yes, please.", "No!", "Open it", "There are 12 of them", *["all right"] * 16])
    found = survey(table)
    proposal = propose(found)
    assert proposal.text_rules == TextRules("lower", "drop", "reject")
    assert [Path(where).name for where, _ in proposal.left_out["digits"]] == ["t.tsv:5"]
    assert "numbers in digits in 1 utterance (5.0 %)" in proposal.reasons["digits"]
    assert (proposal.token_type, proposal.size) == ("char", "small")
    kept = propose(found, Choices(case="upper", punctuation="keep", digits="keep", token_type="bpe", vocab_size=40))
    assert kept.utterances[0].text == "YES, PLEASE." and not kept.left_out
    assert (kept.token_type, kept.vocab_size) == ("bpe", 40)
    shouted = table_of(tmp_path, ["YES PLEASE"] * 12)
    assert propose(survey(shouted)).text_rules == TextRules("keep", "keep", "keep")


def test_suspicious_transcripts_and_repeated_audio_are_named(tmp_path: Path) -> None:
    table = table_of(tmp_path, [*TEXTS * 4, "a", "much too much for one and a half seconds " * 3])
    soundfile.write(tmp_path / "1.wav", *soundfile.read(tmp_path / "5.wav"))
    found = survey(table)
    proposal = propose(found)
    assert [Path(where).name for where, _ in proposal.slow] == ["t.tsv:18"]
    assert [Path(where).name for where, _ in proposal.fast] == ["t.tsv:19"]
    assert [tuple(Path(where).name for where in pair) for pair in found.repeated] == [("t.tsv:3", "t.tsv:7")]
    text = render(found, proposal)
    assert "0.7 characters per second: 'a' in 1.5 s" in text and "The same utterance twice: 1" in text
    assert "The same audio with different transcripts: none" in text
    assert not propose(found, Choices(chars_per_second=(0.1, 1000.0))).slow


def test_audio_with_different_transcripts_is_named(tmp_path: Path) -> None:
    """The same file in two rows, and a copy of a file."""
    table = write_table(tmp_path, rows=12)
    lines = table.read_text().splitlines()
    shutil.copy(tmp_path / "clips/ü 4.wav", tmp_path / "clips/copy.wav")
    lines += ["clips/ü 3.wav\tsomething else\tspeaker 1", "clips/copy.wav\tand more\tspeaker 1"]
    write_lines(table, f"{lines[0]}\tid", *(f"{line}\tu{number}" for number, line in enumerate(lines[1:])))
    found = survey(table)
    named = [tuple(Path(where).name for where in pair) for pair in found.contradictory]
    assert named == [("table.tsv:5", "table.tsv:14"), ("table.tsv:6", "table.tsv:15")] and not found.repeated
    assert "The same audio with different transcripts: 2" in render(found, propose(found))


def test_one_speaker_and_words_that_look_like_tags_are_noted(tmp_path: Path) -> None:
    table = table_of(tmp_path, ["[noise] yes", *TEXTS * 4], speakers=1)
    found = survey(table)
    proposal = propose(found, Choices(punctuation="keep"))
    text = render(found, proposal)
    assert "there is one speaker" in text and "tags: [noise] 1 time;" in text
    assert proposal.split_rule.split_by == "utterance"
    assert {each.split for each in proposal.utterances} == {"train", "dev", "test"}


# ------------------------------------------------------------------------------------------------------ splits


def test_splits_are_stable_when_data_is_added() -> None:
    rule = SplitRule("utterance", 3, 0.1, 0.2)
    names = [f"utterance {i}" for i in range(3000)]
    before = {name: rule.drawn(name) for name in names[:1000]}
    after = {name: rule.drawn(name) for name in reversed(names)}
    assert all(after[name] == split for name, split in before.items())
    shares = Counter(after.values())
    assert abs(shares["dev"] / 3000 - 0.1) < 0.02 and abs(shares["test"] / 3000 - 0.2) < 0.02
    # other values would divide existing corpora again
    assert [SplitRule(dev_share=0.3, test_share=0.3).drawn(x) for x in "abcdefgh"] == EXPECTED


EXPECTED = ["train", "dev", "train", "train", "test", "dev", "test", "dev"]


def test_speakers_stay_together_and_every_split_has_some(tmp_path: Path) -> None:
    table = write_table(tmp_path, rows=16)
    proposal = propose(survey(table))
    assert proposal.split_rule.split_by == "speaker"
    rule = proposal.split_rule
    splits = {split: pairs_of(table, split, rule) for split in ("train", "dev", "test")}
    speakers = {split: {s.speaker for _, group in pairs for s in group} for split, pairs in splits.items()}
    assert sorted(map(len, speakers.values())) == [1, 1, 2] and len(set().union(*speakers.values())) == 4
    assert len(pairs_of(table, "train", rule, limit=3)) == 3


def test_the_chosen_seed_meets_the_shares() -> None:
    seconds = {f"speaker {i}": 10.0 + 60 * (i == 0) for i in range(40)}
    rule = SplitRule(split_seed=choose_seed(seconds, 0.1, 0.1))
    hours = Counter()
    for name, length in seconds.items():
        hours[rule.drawn(name)] += length
    assert all(abs(hours[split] / sum(seconds.values()) - 0.1) < 0.02 for split in ("dev", "test"))
    with pytest.raises(SourceError, match="2 groups of utterances cannot be divided into train, dev, test"):
        choose_seed({"a": 1.0, "b": 1.0}, 0.1, 0.1)


def test_splits_of_the_source_are_kept_and_missing_ones_are_drawn(tmp_path: Path) -> None:
    lines = ["audio\ttext\tsplit"]
    for number in range(20):
        write_audio(tmp_path / f"{number}.wav")
        lines.append(f"{number}.wav\t{TEXTS[number % 4]}\t{'eval' if number < 4 else 'train'}")
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    proposal = propose(survey(tmp_path / "t.tsv"))
    assert {each.utterance.id for each in proposal.utterances if each.split == "test"} == {"0", "1", "2", "3"}
    assert proposal.split_rule.test_share == 0 and 0 < Counter(each.split for each in proposal.utterances)["dev"] < 8


# ------------------------------------------------------------------------------------------------ the folder


def test_every_proposal_is_a_short_description_that_bash_reads(tmp_path: Path, repo_root: Path) -> None:
    folder = tmp_path / "it's \"here\" $(touch run) é"
    table = write_table(folder)
    options = ReadOptions(audio_dir=folder, encoding="cp1252")
    files = description("own", table, propose(survey(table)), options)
    assert sum(text.count("\n") for text in files.values()) <= 60
    script = "state_of() { echo x; }\n" + files["corpus.sh"]
    script += "printf '%s\\n' \"$corpus_from\" \"${source_options[@]: -3:1}\""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{table}\n{folder}\n", done.stderr
    assert not (tmp_path / "run").exists()


def test_paths_are_written_without_parent_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbolic links stay, except where `..` after one leads elsewhere."""
    (tmp_path / "work").mkdir()
    table = write_table(tmp_path / "data/deep/own")
    (tmp_path / "link").symlink_to("data/deep/own")
    monkeypatch.chdir(tmp_path / "work")
    proposal = propose(survey(table))

    def corpus_from(source: str) -> str:
        files = description("own", Path(source), proposal, ReadOptions(audio_dir=Path("../data")))
        assert f"--audio-dir {tmp_path}/data\n" in files["corpus.sh"]
        return files["corpus.sh"].split("corpus_from=")[1].splitlines()[0]

    assert corpus_from("../data/deep/own/table.tsv") == str(table)
    assert corpus_from("../link") == str(tmp_path / "link")
    assert corpus_from("../link/..") == str(tmp_path / "data/deep")
    with pytest.raises(SourceError, match=f"^{tmp_path}/none does not exist$"):
        survey("../none")


def test_existing_corpora_are_replaced_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, egs = write_table(tmp_path), tmp_path / "egs"

    def call(name: str, *arguments: object, source: Path = table) -> tuple[int, str]:
        status = command(new_corpus, [*map(str, (name, "--egs", egs, "--from", source, *arguments))])
        output = capsys.readouterr()
        return status, output.err.splitlines()[-1] if status else output.out

    status, output = call("own", "--look-only")
    assert status == 0 and "12 utterances in 12 recordings" in output and not egs.exists()
    status, output = call("own")
    assert status == 0 and "Next: ./run.sh --corpus own" in output
    assert sorted(p.name for p in egs.rglob("*")) == [
        "conf", "corpus.sh", "ee-baseline.toml", "own", "splitformer.toml"
    ]  # fmt: skip
    before = (egs / "own/corpus.sh").read_bytes()
    (egs / "own/notes").write_text("mine")
    status, output = call("own", "--case", "upper")
    assert status == 1 and "own exists; choose another name" in output
    assert (egs / "own/corpus.sh").read_bytes() == before
    status, _ = call("own", "--case", "upper", "--force")
    assert status == 0 and "--case upper" in (egs / "own/corpus.sh").read_text()
    assert (egs / "own/notes").read_text() == "mine"
    (egs / "own/corpus.sh").write_text("token_type=char\n")
    for force in ([], ["--force"]):
        status, output = call("own", *force)
        assert status == 1 and "was not made by new_corpus.sh" in output and "--force" not in output
    status, output = call("../x", "--force")
    assert status == 1 and "is not a name for a corpus" in output
    status, output = call("other", "--dev-share", "0.7")
    assert status == 1 and "--dev-share and --test-share are from 0 to 0.5, not 0.7" in output
    status, output = call("other", source=tmp_path / "none.tsv")
    assert status == 1 and not (egs / "other").exists()


def test_both_counts_of_a_split_say_what_they_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path, rows=12)
    (tmp_path / "clips/ü 5.wav").unlink()
    files = ["--recordings", str(tmp_path / "r.jsonl"), "--supervisions", str(tmp_path / "s.jsonl")]
    shares = ["--dev-share", "0", "--test-share", "0"]
    assert command(manifests_from_source, ["--from", str(table), "--split", "train", *shares, *files]) == 0
    assert "s.jsonl: 11 utterances written, 1 of the source left out" in capsys.readouterr().out
    assert command(validate_cuts, files) == 0
    assert re.search(r"s\.jsonl: 11 utterances, .* hours after validation, 0 removed", capsys.readouterr().out)


def test_preparation_takes_the_options_of_the_description(tmp_path: Path) -> None:
    """Every option that corpus.sh may hold, as local/corpus.sh passes them."""
    table = write_table(tmp_path, rows=20, header="Datei\tWas\tWer")
    (tmp_path / "clips/ü 5.wav").unlink()
    options = ReadOptions(tmp_path, 0, "none", "cp1252", "Datei", "Was", "Wer", skip_missing=True)
    found = survey(table, options)
    write_folder(tmp_path / "own", description("own", table, propose(found), options, found.decoded_all))
    script = 'state_of() { echo x; }; . own/corpus.sh; printf "%s\\0" --from "$corpus_from" "${source_options[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    ids = set()
    for split in ("train", "dev", "test"):
        files = ["--recordings", tmp_path / "r.jsonl", "--supervisions", tmp_path / f"{split}.jsonl"]
        arguments = [*done.stdout.split("\0")[:-1], "--split", split, "--strict", *files]
        assert command(manifests_from_source, [str(argument) for argument in arguments]) == 0
        ids |= {segment.id for segment in read_supervisions(tmp_path / f"{split}.jsonl")}
    assert ids == utterances(table, audio_column="Datei", text_column="Was").keys() - {"clips-ü_5"}


def imagined(hours: float, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> Survey:
    """Return a survey without audio: 3600 utterances of 200 speakers, with words of all letters."""
    rng = np.random.default_rng(0)
    found = Survey(Path("x"), "table", recordings=3600)
    found.sampling_rates[16000], found.channels[1] = 3600, 1
    for number in range(3600):
        text = " ".join("".join(rng.choice(list(alphabet), 4)) for _ in range(5))
        utterance = Utterance(f"x:{number}", f"u{number}", text, f"s{number % 200}")
        found.utterances.append(SurveyedUtterance(utterance, utterance.id, hours))
    return found


@pytest.mark.parametrize(
    ("hours", "size", "token_type", "share", "layers"),
    [(5, "small", "char", 0.1, 6), (50, "medium", "bpe", 0.05, 12), (500, "large", "bpe", 0.01, 12)],
)
def test_the_conf_and_the_tokens_fit_the_size(
    tmp_path: Path, repo_root: Path, hours: float, size: str, token_type: str, share: float, layers: int
) -> None:
    found = imagined(hours)
    proposal = propose(found)
    assert (proposal.size, proposal.token_type, proposal.split_rule.dev_share) == (size, token_type, share)
    assert f"conf: {size}" in render(found, proposal)
    (tmp_path / "local").symlink_to(repo_root / "local")
    write_folder(tmp_path / "egs/own", description("own", tmp_path, proposal))
    splitformer, baseline = (load_config(tmp_path / f"egs/own/conf/{n}.toml") for n in ("splitformer", "ee-baseline"))
    assert splitformer.model.num_layers == layers and splitformer.model.parallel_exits == (
        splitformer.model.exit_layers[0], layers
    )  # fmt: skip
    assert baseline.model.parallel_exits == () and AsrModel(splitformer.model)
    assert size == "large" or splitformer.training.num_epochs == proposal.epochs


def test_tokens_of_a_syllabary_are_characters() -> None:
    proposal = propose(imagined(50, "".join(chr(c) for c in range(0xAC00, 0xAC00 + 1000))))
    assert proposal.token_type == "char" and proposal.rates == (0.5, 12.0)


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no utterance is in dev; .*--dev-share"):
        propose(imagined(1), Choices(dev_share=0.0))


@pytest.mark.parametrize("model_type", ["char", "bpe"])
def test_tokens_of_another_alphabet_spell_it(tmp_path: Path, model_type: str) -> None:
    texts = [TextRules("lower", "drop").apply(text) for text in GREEK]
    (tmp_path / "train.txt").write_text("\n".join(texts), encoding="utf-8")
    train_tokenizer(tmp_path / "train.txt", tmp_path / "lang", model_type, 50)
    tokenizer = Tokenizer(tmp_path / "lang")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    assert any(len(token) > 2 for token in tokenizer.tokens[3:]) == (model_type == "bpe")


def test_features_are_those_of_the_channel_at_16_kHz(tmp_path: Path) -> None:
    """A file of 8 kHz and two channels gives what its second channel gives alone."""
    rng = np.random.default_rng(0)
    both = 0.1 * rng.standard_normal((12000, 2))
    for name, samples in (("both", both), ("alone", both[:, 1])):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", samples, 8000)
        (tmp_path / name / "a.txt").write_text("yes")
        pairs = pairs_of(tmp_path / name, channel=1 if name == "both" else 0)
        files = [tmp_path / f"{name}-{kind}.jsonl" for kind in ("r", "s", "c")]
        write_split(pairs, *files[:2])
        compute_fbank(*files, tmp_path / f"{name}-f", FbankOptions())
    one, other = (next(iter(read_cuts(tmp_path / f"{name}-c.jsonl"))).load_features() for name in ("both", "alone"))
    assert one.shape == (150, 80) and np.array_equal(one, other)
