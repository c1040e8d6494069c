"""Every corpus from its own layout to its tables, own data by the guide as written, and how short a corpus is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from splitformer.checkpoint import save_checkpoint
from splitformer.config import load_config
from splitformer.data.manifests import read_supervisions
from splitformer.data.tokenizer import Tokenizer
from splitformer.model.asr import AsrModel
from splitformer.report.results import load_published
from splitformer.report.runs import load_run
from tests.corpora import write_folder, write_librispeech, write_tedlium, write_voxpopuli

TINY = """[model]
d_model = 32
num_heads = 2
feedforward_dim = 64
num_layers = 2
exit_layers = [1, 2]
parallel_exits = [1, 2]
[data]
max_duration = 30.0
[training]
num_epochs = 1
average_epochs = 1
"""
CORPORA = {
    "tedlium": ["--vocab-size", "40"],
    "voxpopuli": ["--token-type", "char"],
    "librispeech": ["--subset", "mini", "--vocab-size", "40", "--estimate-lm", "--allow-incomplete"],
}


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPLITFORMER_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=folder, text=True, capture_output=True, env=environment)


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def prepared(repo_root: Path, tmp_path_factory) -> dict[str, tuple[Path, list[subprocess.CompletedProcess[str]], bool]]:
    """Every stage on a miniature of each corpus, twice, two corpora at a time.

    {corpus: (work folder, both runs, whether the second changed nothing)}"""
    root = tmp_path_factory.mktemp("corpora")
    write_tedlium(root, {"train": 3, "dev": 1, "test": 1})
    write_voxpopuli(root, {"train": 3, "dev": 1, "test": 1})
    write_librispeech(root, {"train-clean-5": 16, "dev-clean-2": 8})
    (root / "tiny.toml").write_text(TINY)

    def twice(corpus: str) -> tuple[Path, list[subprocess.CompletedProcess[str]], bool]:
        work = root / "work" / corpus
        command = ["./run.sh", "--corpus", corpus, *CORPORA[corpus], "--config", root / "tiny.toml", "--work-dir", work]
        command += ["--download-dir", root, "--speed-perturb", "false", "--num-jobs", 1, "--num-processes", 1]
        command += ["--hlg-scales", 0.7, "--methods", "greedy_search", "1best", "--policy", "posterior"]
        first = run(command, repo_root)
        made = snapshot(work)
        return work, [first, run(command, repo_root)], snapshot(work) == made

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CORPORA, pool.map(twice, CORPORA)))


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_stage_runs_on_the_corpus_own_layout_and_a_second_time_nothing(prepared, corpus: str) -> None:
    work, (first, second), unchanged = prepared[corpus]
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0 and unchanged, second.stdout + second.stderr
    assert all("exists already" in line or "stage" in line or "no test set besides" in line for line in
               second.stdout.splitlines()[:-1]), second.stdout  # fmt: skip
    [results] = work.rglob("RESULTS.md")
    text = results.read_text()
    assert "### 1best" in text
    if corpus == "tedlium":
        assert re.search(r"\| 12 \| – \| 14\.6 ", text) and "| 16.4 |" in text, text
    if corpus == "voxpopuli":
        assert re.search(r"\| 12 \| – \| 14\.3 ", text), text


def supervisions(work: Path, split: str) -> list:
    return list(read_supervisions(work / f"data/manifests/{split}_supervisions.jsonl.gz"))


def test_talks_are_cut_by_their_transcripts(prepared) -> None:
    train = supervisions(prepared["tedlium"][0], "train")
    assert len(train) == 24 and len({s.recording_id for s in train}) == 3
    texts = {" ".join(s.text.split()) for s in train}
    assert {"close the window please", "it's cold today"} <= texts and not any("[" in t or "<" in t for t in texts)


def test_sessions_are_cut_by_the_times_of_the_table(prepared) -> None:
    test = supervisions(prepared["voxpopuli"][0], "test")
    assert len(test) == 8 and {s.text for s in test} >= {"open the door"} and len({s.recording_id for s in test}) == 1


def test_a_corpus_without_a_test_set_reports_its_dev_set(prepared) -> None:
    work, (first, _), _ = prepared["librispeech"]
    assert "no test set besides the dev sets" in first.stdout
    assert "dev-clean-2" in next(work.rglob("RESULTS.md")).read_text()


# -------------------------------------------------------------------- own data, by the commands of docs/new_corpus.md


def recipe_in(folder: Path, repo_root: Path) -> Path:
    """The recipe in a folder of its own, so that a corpus can be added; its small conf is of the size for a test."""
    folder.mkdir()
    for name in ("run.sh", "prepare.sh"):
        shutil.copy(repo_root / name, folder)
    (folder / "splitformer").symlink_to(repo_root / "splitformer")
    shutil.copytree(repo_root / "local", folder / "local", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(repo_root / "egs/mini", folder / "egs/mini", ignore=shutil.ignore_patterns("data", "exp"))
    small = folder / "local/conf/small.toml"
    small.write_text(re.sub(r"d_model = \d+", "d_model = 32", small.read_text()))
    return folder


def blocks(guide: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def english_model(conf: Path, path: Path) -> None:
    """A checkpoint of the conf's shape with other tokens."""
    tokens = ["<blk>", "<sos/eos>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    config = load_config(conf, [f"model.vocab_size={len(tokens)}", "model.parallel_exits=[]"])
    torch.manual_seed(1)
    save_checkpoint(path, {"model": AsrModel(config.model).state_dict(), "config": config.to_dict(), "tokens": tokens})


def test_the_guide_leads_from_a_folder_of_greek_to_word_error_rates(repo_root: Path, tmp_path: Path) -> None:
    """Every command of docs/new_corpus.md as written; then that a further one does nothing, and new files are seen."""
    folder = recipe_in(tmp_path / "my recipe", repo_root)
    write_folder(folder / "recordings", speakers=4, each=6)
    english_model(folder / "local/conf/small.toml", folder / "english.pt")
    commands = blocks(repo_root / "docs/new_corpus.md")
    assert len(commands) == 5
    outputs = []
    for command in commands:
        done = run(["bash", "-euo", "pipefail", "-c", command], folder)
        assert done.returncode == 0, command + done.stdout + done.stderr
        outputs.append(done.stdout + done.stderr)
        if "--look-only" in command:
            assert not (folder / "egs/greek").exists()
    look, made, trained, table, tuned = outputs
    assert "24 utterances in 24 recordings" in look and "alphabet after normalization: 29 characters: ά έ ή" in look
    assert "Written:" in made
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:10]] == list("123456"), table
    assert "new: ctc_heads 1 2 3 4 5 6" in tuned and "frozen: the front end and encoder layers 1 to 2" in tuned
    assert "init" not in trained.split("stage 7")[1].split("stage 8")[0]

    tokens = set("".join(Tokenizer(folder / "egs/greek/data/lang_char").tokens))
    assert {"ά", "ς", "ω"} <= tokens and not tokens & set("ΆΚ;!,a")
    texts = [s.text for s in supervisions(folder / "egs/greek", "train")]
    assert "καλημέρα τι κάνεις" in texts
    results = (folder / "egs/greek/exp/RESULTS.md").read_text()
    assert results.count("### Savings") == 1 and "init-" in results

    before = snapshot(folder / "egs/greek")
    again = run(["bash", "-euc", commands[2]], folder)
    assert again.returncode == 0 and snapshot(folder / "egs/greek") == before, again.stdout + again.stderr
    # what is added is seen, and moves nobody
    first = {s.id: split for split in ("train", "dev", "test") for s in supervisions(folder / "egs/greek", split)}
    write_folder(folder / "recordings/more", speakers=1, each=3)
    more = run(["./prepare.sh", "--corpus", "greek", "--stop-stage", "manifests"], folder)
    assert more.returncode == 0, more.stdout + more.stderr
    then = {s.id: split for split in ("train", "dev", "test") for s in supervisions(folder / "egs/greek", split)}
    assert len(then) == len(first) + 3 and first.items() <= then.items()


def test_a_corpus_of_one_speaker_ends_with_tables(repo_root: Path, tmp_path: Path) -> None:
    """60 recordings of one voice in a Kaldi directory: all splits share the speaker, and tables come out."""
    folder = recipe_in(tmp_path / "recipe", repo_root)
    write_folder(folder / "audio", speakers=1, each=60)
    texts = {path: path.with_suffix(".txt").read_text().strip() for path in sorted((folder / "audio").rglob("*.wav"))}
    texts |= {path: path.with_suffix(".txt").read_text().strip() for path in sorted((folder / "audio").rglob("*.flac"))}
    kaldi = folder / "kaldi"
    kaldi.mkdir()
    names = {path: f"u{number:02d}" for number, path in enumerate(texts)}
    (kaldi / "wav.scp").write_text("".join(f"{names[path]} {path}\n" for path in texts))
    (kaldi / "text").write_text("".join(f"{names[path]} {text}\n" for path, text in texts.items()))
    (kaldi / "utt2spk").write_text("".join(f"{name} ann\n" for name in names.values()))
    made = run(["./local/new_corpus.sh", "voice", "--from", kaldi], folder)
    assert made.returncode == 0, made.stdout + made.stderr
    command = ["./run.sh", "--corpus", "voice", "--set", "training.num_epochs=2", "training.average_epochs=1"]
    done = run([*command, "--hlg-scales", "0.7", "--methods", "greedy_search", "1best"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "egs/voice/exp/RESULTS.md").read_text()
    assert "### 1best" in text and "share" in text and "speaker" in text, text  # what the calibration fell back to


def test_results_of_a_run_are_ignored_by_git_until_they_are_published(repo_root: Path, tmp_path: Path) -> None:
    folder = recipe_in(tmp_path / "recipe", repo_root)
    shutil.copy(repo_root / ".gitignore", folder)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "-qm", "start"], cwd=folder, check=True)

    def changed() -> str:
        return run(["git", "status", "--porcelain"], folder).stdout

    tiny = ["--set", "training.num_epochs=1", "training.average_epochs=1", "--methods", "greedy_search"]
    experiment = folder / "egs/mini/exp/splitformer-seed7"
    write_decoded(repo_root, experiment)
    report = ["./run.sh", "--seed", 7, "--stage", "report", *tiny]
    done = run(report, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert changed() == "" and "splitformer-gated" in (folder / "egs/mini/exp/RESULTS.md").read_text()
    done = run([*report, "--publish"], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "egs/mini/RESULTS.md" in changed() and "egs/mini/results/splitformer-seed7.json" in changed()


def write_decoded(repo_root: Path, experiment: Path) -> None:
    """An experiment as decoding leaves it: the committed records of another seed."""
    run_record = load_run(repo_root / "egs/mini/results/splitformer-gated-seed42.json")
    for number, record in enumerate(run_record.decode):
        replace(record, system="splitformer", seed=7).save(experiment / f"decode/{number}.json")
    (experiment / "decode/.done").write_text("as made\n")


def test_init_from_says_what_is_wrong_before_any_work(repo_root: Path, tmp_path: Path) -> None:
    for flags, message in (
        (["--init-from", tmp_path / "none.pt"], "--init-from: there is no"),
        (["--init-from", repo_root / "run.sh", "--checkpoint", repo_root / "run.sh"], "give one of them"),
        (["--freeze-encoder-layers", "some"], "--freeze-encoder-layers is 'some'; it takes an integer"),
    ):
        done = run(["./run.sh", "--work-dir", tmp_path / "work", *flags], repo_root)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "work").exists()


# ---------------------------------------------------------------------------------------- how short a corpus is

# What counts: corpus.sh and conf/*.toml, every line. READMEs and RESULTS.md are documents, published.toml is data.
WITH_A_RECIPE_OF_LHOTSE, WITHOUT = 60, 150
LONGER = {
    "an4": WITHOUT,
    # four subsets, nine archives with checksums, the authors' language models, and confs of their training and weights
    "librispeech": 220,
}


def test_a_corpus_is_a_short_folder_of_data(shipped: list[Path]) -> None:
    for folder in shipped:
        files = [folder / "corpus.sh", *sorted(folder.glob("conf/*.toml"))]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        limit = LONGER.get(folder.name, WITH_A_RECIPE_OF_LHOTSE)
        assert lines <= limit, f"{folder}: {lines} lines, at most {limit}"
        code = [path for path in folder.rglob("*.py") if path.parent != folder / "local"]
        assert not code, f"{folder} holds code outside its local/"


def test_published_figures_have_their_source(repo_root: Path) -> None:
    exits = {
        "tedlium": [43.8, 23.4, 18.0, 16.1, 14.9, 14.6],
        "voxpopuli": [36.7, 21.1, 17.3, 15.4, 14.7, 14.3],
    }
    for corpus, figures in exits.items():
        systems = load_published(repo_root / f"egs/{corpus}/published.toml")
        assert "2405.17376" in systems[0].source
        assert [systems[0].wer_per_exit[layer]["test"] for layer in (2, 4, 6, 8, 10, 12)] == figures
    confs = repo_root / "egs/librispeech/conf"
    card = load_published(repo_root / "egs/librispeech/published.toml")[2:]
    assert [system.name for system in card] == ["wav2vec 2.0 with exits", "WavLM with exits"]
    assert all("MaxLSB/Splitformer" in system.url for system in card)
    assert [(by_set["test-clean"], by_set["test-other"]) for by_set in card[1].wer_per_exit.values()] == [
        (28.0, 48.5), (13.9, 27.3), (8.7, 18.4), (4.8, 12.4), (4.0, 9.5), (3.6, 8.8)
    ]  # fmt: skip
    authors = load_config(confs / "published-training.toml")
    assert authors.model == load_config(confs / "splitformer.toml").model
    assert (authors.data.features, authors.augment.p, authors.training.num_epochs) == ("linear-mel", 0.0, 150)
    for corpus in ("librispeech", "voxpopuli"):
        assert load_config(repo_root / f"egs/{corpus}/conf/single-exit.toml").model.exit_layers == (12,)
    single = load_published(repo_root / "egs/tedlium/published.toml")[1]
    assert single.wer == {"test": 16.4} and "2309.09546" in single.source
