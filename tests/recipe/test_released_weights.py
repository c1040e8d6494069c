"""run.sh --checkpoint with weights such as the authors released, at a small size: nothing is trained."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.golden import load_golden
from tests.tokens import RELEASED, foreign_tokens

TINY = "[model]\nd_model = 32\nnum_heads = 4\nfeedforward_dim = 64\nconv_kernel = 7\n"
CONF = TINY + 'num_layers = 6\nexit_layers = [2, 4, 6]\nparallel_exits = [2, 6]\n[data]\nfeatures = "linear-mel"\n'
WORDS = ["the", "they", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "vow", "zebra"]


@pytest.fixture
def imported(shared: Path, repo_root: Path, tmp_path: Path) -> Path:
    """A checkpoint imported from files such as the authors would release."""
    state, _ = load_golden(shared, "splitformer")
    # 60 units instead of 24: real transcripts have more letters
    for name in [name for name in state if name.startswith("linears.")]:
        state[name] = state[name].repeat(3, *[1] * (state[name].dim() - 1))[:60]
    torch.save(state, tmp_path / "model")
    sentences = ["the quick brown fox jumps over the lazy dog's " * 3, " ".join(WORDS)]
    foreign_tokens(tmp_path / "theirs.model", RELEASED, sentences, 60)
    (tmp_path / "tiny.toml").write_text(CONF)
    command = ["splitformer.bin.import_reference", "--state", tmp_path / "model", "--case", "upper"]
    command += ["--bpe-model", tmp_path / "theirs.model", "--output", tmp_path / "released/averaged.pt"]
    command += ["--config", tmp_path / "tiny.toml"]
    subprocess.run([sys.executable, "-m", *map(str, command)], cwd=repo_root, check=True)
    return tmp_path / "released/averaged.pt"


def test_a_given_checkpoint_is_decoded(shared: Path, repo_root: Path, tmp_path: Path, imported: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["./run.sh", *map(str, [*common, *arguments])],
            cwd=repo_root,
            text=True,
            capture_output=True,
            env={**os.environ, "SPLITFORMER_PYTHON": sys.executable},
        )

    work = tmp_path / "work"
    common = ["--corpus", "librispeech", "--work-dir", work, "--download-dir", shared / "data", "--estimate-lm"]
    common += ["--train-splits", "test-clean", "--dev-splits", "dev-clean", "--test-splits", "dev-clean"]
    common += ["--config", tmp_path / "tiny.toml", "--checkpoint", imported, "--num-jobs", 1]
    common += ["--hlg-scales", "0.7", "--blank-penalties", "0"]
    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "nothing to train: the checkpoint is" in first.stdout
    experiment = work / "exp/test-clean/tiny"
    records = [json.loads(path.read_text()) for path in (experiment / "decode").glob("*.json")]
    methods = {"greedy_search", "greedy_search+lexicon", "ctc-decoding", "1best"}
    assert {(r["exit_layer"], r["method"]) for r in records} == {(n, m) for n in (2, 4, 6) for m in methods}
    assert {r["system"] for r in records} == {"tiny"}
    results = (work / "exp/test-clean/RESULTS.md").read_text()
    assert "greedy_search+lexicon" in results
    # the training set served as text alone, and the features are the released code's
    assert not (work / "data/fbank").exists()
    assert [p.name for p in (work / "data/fbank_linear-mel").glob("[!.]*_cuts*")] == ["dev-clean_cuts.jsonl.gz"]
    # every word of the corrected hypotheses is of the list
    words = {line.split()[0] for line in next((work / "data").rglob("words.txt")).read_text().splitlines()}
    for path in (experiment / "decode").glob("recogs-*lexicon.txt"):
        spoken = [line.split("hyp=")[1] for line in path.read_text().splitlines() if "hyp=" in line]
        assert spoken and {word for each in spoken for word in ast.literal_eval(each)} <= words

    before = {path: path.stat().st_mtime_ns for path in sorted(work.rglob("*"))}
    again = run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in sorted(work.rglob("*"))} == before

    listed = tmp_path / "words"
    listed.write_text("\n".join(WORDS) + "\n")
    refused = run("--word-list", listed, "--stage", "decode", "--stop-stage", "decode")
    assert refused.returncode == 1 and "has no word of" in refused.stderr and "another case" in refused.stderr

    (tmp_path / "tiny.toml").write_text(CONF.replace("conv_kernel = 7", "conv_kernel = 9"))
    refused = run("--stage", "average")
    assert refused.returncode == 1
    assert "model.conv_kernel = 9 in the conf, 7 in the checkpoint" in refused.stderr
    refused = run("--fbank", "lhotse", "--stage", "average")
    assert refused.returncode == 2 and "--fbank lhotse does not compute the features" in refused.stderr
    cuts = work / "data/fbank_linear-mel/dev-clean_cuts.jsonl.gz"
    other = tmp_path / "other_cuts.jsonl.gz"
    other.write_bytes(gzip.compress(gzip.decompress(cuts.read_bytes()).replace(b'"linear-mel"', b'"kaldi-fbank"')))
    command = ["splitformer.bin.decode", "--checkpoint", imported, "--lang-dir", imported.parent, "--corpus", "x"]
    command += ["--cuts", f"x={other}", "--output-dir", tmp_path / "decode", "--methods", "greedy_search"]
    refused = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=repo_root, text=True, capture_output=True)
    assert refused.returncode == 1 and "has kaldi-fbank features" in refused.stderr, refused.stderr
    refused = run("--checkpoint", tmp_path / "absent.pt")
    assert refused.returncode == 2 and "--checkpoint: there is no" in refused.stderr


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
    command += ["--dev-splits", "dev-clean", "--test-splits", "test-clean", "--decode-only", "--num-jobs", 1]
    command += ["--bpe-model", imported.parent / "bpe.model", "--fbank", "linear-mel"]
    done = subprocess.run(list(map(str, command)), cwd=repo_root, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    [words] = (work / "data").glob("lang_given_*_decode/words.txt")
    assert "ZEBRA" in words.read_text() and (words.parent / "HLG.pt").is_file()
    assert not list((work / "data/manifests").glob("train*"))
