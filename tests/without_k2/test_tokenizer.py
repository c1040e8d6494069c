"""sentencepiece models: ids, files, round trip, and the errors that a wrong text or size gives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from splitformer.corpora.tokens import train_tokenizer
from splitformer.data.tokenizer import Tokenizer
from splitformer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXT = """ERASE THE LAST LINE
ENTER NINE ONE FOUR
THE LINE IS NOT THE LAST ONE
IT'S A RATHER SHORT LIST OF LINES
"""


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "train.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize(("model_type", "vocab_size"), [("bpe", 40), ("char", 256), ("char", None)])
def test_ids_and_files(text, tmp_path, model_type, vocab_size):
    train_tokenizer(text, tmp_path / "lang", model_type, vocab_size)
    tokenizer = Tokenizer(tmp_path / "lang")
    characters = set(TEXT) - set(" \n")
    assert tokenizer.vocab_size == (40 if model_type == "bpe" else len(characters) + 4)
    assert tokenizer.blank_id == 0
    assert tokenizer.tokens[:3] == ["<blk>", "<sos/eos>", "<unk>"]
    table = (tmp_path / "lang" / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert table == [f"{piece} {i}" for i, piece in enumerate(tokenizer.tokens)]

    for line in TEXT.splitlines():
        ids = tokenizer.encode(line)
        assert min(ids) > 2
        assert tokenizer.decode(ids) == line
        assert tokenizer.unknown_characters(line) == set()
    # blanks and <sos/eos> are silent
    assert tokenizer.decode([0, *tokenizer.encode("THE LINE"), 1]) == "THE LINE"


def test_training_is_deterministic(text, tmp_path):
    for name in ("first", "second"):
        train_tokenizer(text, tmp_path / name, "bpe", 40)
    for name in ("bpe.model", "tokens.txt"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_unknown_characters_are_named(text, tmp_path):
    train_tokenizer(text, tmp_path / "lang", "bpe", 40)
    tokenizer = Tokenizer(tmp_path / "lang")
    assert tokenizer.unknown_characters("ERASE ÄÖ NINE Z7") == {"Ä", "Ö", "Z", "7"}
    assert tokenizer.unknown_id in tokenizer.encode("NINE 7")
    # the names of special tokens are plain text in a transcript
    assert tokenizer.unknown_characters("<blk>") == {"<", ">", "b", "l", "k"}
    assert tokenizer.blank_id not in tokenizer.encode("ERASE <blk> LINE")


def test_the_largest_possible_size_is_named_and_works(text, tmp_path):
    with pytest.raises(ValueError, match="at most") as caught:
        train_tokenizer(text, tmp_path / "lang", "bpe", 5000)
    assert not (tmp_path / "lang").exists()
    largest = int(re.search(r"at most (\d+)", str(caught.value))[1])
    train_tokenizer(text, tmp_path / "lang", "bpe", largest)
    assert Tokenizer(tmp_path / "lang").vocab_size == largest


@pytest.mark.parametrize("model_type", ["bpe", "char"])
def test_the_smallest_possible_size_is_named_and_works(text, tmp_path, model_type):
    with pytest.raises(ValueError, match="at least") as caught:
        train_tokenizer(text, tmp_path / "lang", model_type, 5)
    smallest = int(re.search(r"at least (\d+)", str(caught.value))[1])
    train_tokenizer(text, tmp_path / "lang", model_type, smallest)
    assert Tokenizer(tmp_path / "lang").vocab_size == smallest


def test_other_whitespace_is_a_space(tmp_path):
    (tmp_path / "t.txt").write_text("AB\tBA\u00a0AB\r\n\n", encoding="utf-8")
    train_tokenizer(tmp_path / "t.txt", tmp_path / "lang", "char")
    tokenizer = Tokenizer(tmp_path / "lang")
    assert sorted(tokenizer.tokens[3:]) == ["A", "B", "▁"]
    assert tokenizer.decode(tokenizer.encode(" AB\u00a0 BA\t")) == "AB BA"


def test_an_empty_text_and_a_missing_model_are_errors(text, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no words"):
        train_tokenizer(tmp_path / "empty.txt", tmp_path, "bpe", 40)
    with pytest.raises(UserError, match="train_bpe"):
        Tokenizer(tmp_path)


def test_the_command_prints_the_number_of_tokens(text, tmp_path):
    script = ROOT / "local" / "train_bpe.py"
    command = [sys.executable, script, "--text", text, "--lang-dir", tmp_path / "lang"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    good = subprocess.run([*command, "--vocab-size", "40"], env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert "40 tokens (bpe)" in good.stdout
    bad = subprocess.run([*command, "--vocab-size", "4000"], env=environment, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "at most" in bad.stderr and "Traceback" not in bad.stderr
