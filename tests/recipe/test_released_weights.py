"""run.sh --checkpoint with weights such as the authors released, at a small size: nothing is trained."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.golden import load_golden
from tests.tokens import RELEASED, foreign_tokens

TINY = "[model]\nd_model = 32\nnum_heads = 4\nfeedforward_dim = 64\nconv_kernel = 7\n"
CONF = TINY + 'num_layers = 6\nexit_layers = [2, 4, 6]\nparallel_exits = [2, 6]\n[data]\nfeatures = "linear-mel"\n'
WORDS = ["the", "they", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "vow", "zebra"]


@pytest.fixture(scope="module")
def imported(shared: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint imported from files such as the authors would release; tiny.toml beside its folder is its conf."""
    folder = tmp_path_factory.mktemp("imported")
    state, _ = load_golden(shared, "splitformer")
    # 60 units instead of 24: real transcripts have more letters
    for name in [name for name in state if name.startswith("linears.")]:
        state[name] = state[name].repeat(3, *[1] * (state[name].dim() - 1))[:60]
    torch.save(state, folder / "model")
    sentences = ["the quick brown fox jumps over the lazy dog's " * 3, " ".join(WORDS)]
    foreign_tokens(folder / "theirs.model", RELEASED, sentences, 60)
    (folder / "tiny.toml").write_text(CONF)
    command = ["splitformer", "import-released", "--state", folder / "model", "--case", "upper"]
    command += ["--bpe-model", folder / "theirs.model", "--output", folder / "released/averaged.pt"]
    command += ["--config", folder / "tiny.toml"]
    subprocess.run([sys.executable, "-m", *map(str, command)], cwd=repo_root, check=True)
    return folder / "released/averaged.pt"


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def decoded(shared: Path, repo_root: Path, imported: Path) -> tuple[Path, Run]:
    """The work folder of a finished `run.sh --checkpoint`, and a function that runs it again with more options."""
    work, conf = imported.parents[1] / "work", imported.parents[1] / "tiny.toml"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        options = ["--corpus", "librispeech", "--work-dir", work, "--download-dir", shared / "data", "--estimate-lm"]
        options += ["--allow-incomplete"]
        options += ["--train-splits", "test-clean", "--dev-splits", "dev-clean", "--test-splits", "dev-clean"]
        options += ["--config", conf, "--checkpoint", imported, "--num-jobs", 1]
        options += ["--hlg-scales", "0.7", "--blank-penalties", "0"]
        environment = {**os.environ, "SPLITFORMER_PYTHON": sys.executable}
        command = ["./run.sh", *map(str, [*options, *arguments])]
        return subprocess.run(command, cwd=repo_root, text=True, capture_output=True, env=environment)

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "nothing to train" in first.stdout
    return work, run


def test_every_exit_is_decoded_with_and_without_the_word_list(decoded: tuple[Path, Run]) -> None:
    work, _ = decoded
    experiment = work / "exp/incomplete_test-clean/tiny"
    records = [json.loads(path.read_text()) for path in (experiment / "decode").glob("*.json")]
    methods = {"greedy_search", "greedy_search+lexicon", "ctc-decoding", "1best"}
    assert {(r["exit_layer"], r["method"]) for r in records} == {(n, m) for n in (2, 4, 6) for m in methods}
    assert {r["system"] for r in records} == {"tiny"}
    assert "greedy_search+lexicon" in (work / "exp/incomplete_test-clean/RESULTS.md").read_text()
    # only the text of the training set is used, and the features are those of the released code
    assert not (work / "data/fbank").exists()
    assert [p.name for p in (work / "data/fbank_linear-mel").glob("[!.]*_cuts*")] == ["dev-clean_cuts.jsonl.gz"]
    # every corrected word is in the list
    words = {line.split()[0] for line in next((work / "data").rglob("words.txt")).read_text().splitlines()}
    for path in (experiment / "decode").glob("recogs-*lexicon.txt"):
        hypotheses = [line.split("hyp=")[1] for line in path.read_text().splitlines() if "hyp=" in line]
        assert hypotheses and {word for each in hypotheses for word in ast.literal_eval(each)} <= words


def test_a_second_run_changes_nothing(decoded: tuple[Path, Run]) -> None:
    work, run = decoded
    before = {path: path.stat().st_mtime_ns for path in sorted(work.rglob("*"))}
    again = run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in sorted(work.rglob("*"))} == before


def test_what_does_not_fit_the_checkpoint_is_refused(
    decoded: tuple[Path, Run], imported: Path, repo_root: Path, tmp_path: Path
) -> None:
    work, run = decoded
    listed = tmp_path / "words"
    listed.write_text("\n".join(WORDS) + "\n")
    refused = run("--word-list", listed, "--stage", "decode", "--stop-stage", "decode")
    assert refused.returncode and "has no word of" in refused.stderr

    other_conf = tmp_path / "other.toml"
    other_conf.write_text(CONF.replace("conv_kernel = 7", "conv_kernel = 9"))
    refused = run("--config", other_conf, "--stage", "average")
    assert refused.returncode and "model.conv_kernel = 9 in the conf, 7 in the checkpoint" in refused.stderr
    refused = run("--fbank", "lhotse", "--stage", "average")
    assert refused.returncode and "--fbank lhotse does not compute the features" in refused.stderr
    refused = run("--checkpoint", tmp_path / "absent.pt")
    assert refused.returncode and "absent.pt" in refused.stderr

    cuts = work / "data/fbank_linear-mel/dev-clean_cuts.jsonl.gz"
    other = tmp_path / "other_cuts.jsonl.gz"
    other.write_bytes(gzip.compress(gzip.decompress(cuts.read_bytes()).replace(b'"linear-mel"', b'"kaldi-fbank"')))
    command = ["splitformer", "decode", "--checkpoint", imported, "--lang-dir", imported.parent, "--corpus", "x"]
    command += ["--cuts", f"x={other}", "--output-dir", tmp_path / "decode", "--methods", "greedy_search"]
    refused = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=repo_root, text=True, capture_output=True)
    assert refused.returncode == 1 and f"{other} has" in refused.stderr, refused.stderr


def test_no_training_data_are_needed_where_the_corpus_brings_words(
    shared: Path, repo_root: Path, tmp_path: Path, imported: Path
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "LibriSpeech").symlink_to(shared / "data/LibriSpeech")
    text = "\n".join(line for path in sorted((shared / "data/LibriSpeech").rglob("*.trans.txt"))
                     for line in [each.split(" ", 1)[1] for each in path.read_text().splitlines()])  # fmt: skip
    (tmp_path / "text").write_text(text + "\n")
    (downloads / "librispeech-vocab.txt").write_text("\n".join(sorted(set(text.split()))) + "\nZEBRA\n")
    estimate = ["local/estimate_lm.py", "--text", tmp_path / "text", "--order", 3, "--arpa", tmp_path / "arpa"]
    environment = {**os.environ, "SPLITFORMER_PYTHON": sys.executable, "PYTHONPATH": str(repo_root)}
    subprocess.run([sys.executable, *map(str, estimate)], cwd=repo_root, check=True, env=environment)
    with gzip.open(downloads / "3-gram.pruned.1e-7.arpa.gz", "wb") as file:
        file.write((tmp_path / "arpa").read_bytes())

    work = tmp_path / "work"
    command = ["./prepare.sh", "--corpus", "librispeech", "--work-dir", work, "--download-dir", downloads]
    command += ["--allow-incomplete", "--dev-splits", "dev-clean", "--test-splits", "test-clean", "--decode-only"]
    command += ["--num-jobs", 1, "--bpe-model", imported.parent / "bpe.model", "--fbank", "linear-mel"]
    done = subprocess.run(list(map(str, command)), cwd=repo_root, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    [words] = (work / "data").glob("lang_given_*_decode/words.txt")
    assert "ZEBRA" in words.read_text() and (words.parent / "HLG.pt").is_file()
    assert not list((work / "data/manifests").glob("train*"))
