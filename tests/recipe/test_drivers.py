"""prepare.sh and run.sh on cut-down corpora, twice: the second time, nothing is done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from splitformer.checkpoint import checkpoint_id, save_checkpoint
from splitformer.config import Config, ModelConfig
from splitformer.data.manifests import read_cuts
from splitformer.data.shar import SharCuts
from splitformer.data.tokenizer import Tokenizer
from splitformer.early_exit.names import POLICIES
from splitformer.model.asr import AsrModel
from splitformer.report.records import EarlyExitRecord, TradeoffRecord, read_training_log

# A model that trains in seconds, and learns nothing worth knowing.
SMALL = ["--set", "training.num_epochs=1", "training.average_epochs=1", "model.d_model=32", "model.num_heads=2"]
SMALL += ["model.feedforward_dim=64", "--hlg-scales", "0.7", "--blank-penalties", "0", "--num-processes", "2"]


@pytest.fixture
def driver(repo_root: Path):
    """Run a driver in the interpreter that runs the tests."""

    def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"./{script}", *map(str, arguments)],
            cwd=repo_root,
            text=True,
            capture_output=True,
            env={**os.environ, "SPLITFORMER_PYTHON": sys.executable, **environment},
        )

    return run


def snapshot(folder: Path) -> dict[str, int]:
    """Every file's time of modification; the folders' too, which tell of files that came and went."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def check_whole_recipe(driver, work: Path, *arguments: object) -> Path:
    """prepare.sh, then run.sh, then both again; returns the folder of the experiment."""
    common = [*arguments, "--work-dir", work, "--num-jobs", 2]
    first = driver("prepare.sh", *common)
    assert first.returncode == 0, first.stdout + first.stderr
    prepared = snapshot(work)
    again = driver("prepare.sh", *common)
    assert again.returncode == 0 and snapshot(work) == prepared, again.stdout + again.stderr

    first = driver("run.sh", *common, *SMALL)
    assert first.returncode == 0, first.stdout + first.stderr
    (done,) = (work / "data").rglob("HLG.pt")
    assert str(done.relative_to(work)) in prepared, "run.sh prepared the same data again"
    made = snapshot(work)
    again = driver("run.sh", *common, *SMALL)
    assert again.returncode == 0 and snapshot(work) == made, again.stdout + again.stderr
    assert all("exists already" in line or "stage" in line for line in again.stdout.splitlines()[:-1]), again.stdout

    (results,) = work.rglob("RESULTS.md")
    assert "test" in results.read_text()
    (experiment,) = (path.parent for path in work.rglob("averaged.pt"))
    return experiment


def check_records(experiment: Path, methods: set[str]) -> None:
    """Every exit, method and set has a record; all utterances of the set are in it."""
    records = [json.loads(path.read_text()) for path in (experiment / "decode").glob("*.json")]
    exits = {record["exit_layer"] for record in records}
    assert exits == {1, 2, 3, 4, 5, 6}
    assert {(r["test_set"], r["exit_layer"], r["method"]) for r in records} == {
        (name, layer, method) for name in ("dev", "test") for layer in exits for method in methods
    }
    assert len({(r["test_set"], r["num_utterances"], r["ref_words"]) for r in records}) == 2


def check_early_exit(experiment: Path, method: str | None = None) -> None:
    """A policy was fitted on dev, for the records that are there, and decoded with on test."""
    policy = json.loads((experiment / "policy.json").read_text())
    assert (policy["title"], policy["fitted_on"]["set"]) == ("learned_nbest", "dev")
    assert policy["fitted_on"]["target"] == "max_relative_wer 0.05"
    assert policy["checkpoint"] == checkpoint_id(experiment / "averaged.pt") and method in (None, policy["method"])
    found = EarlyExitRecord.load(experiment / "early_exit/test-learned_nbest.json")
    assert set(found.exits) == {1, 2, 3, 4, 5, 6} and found.method == policy["method"]
    curves = TradeoffRecord.load(experiment / "early_exit/tradeoff-test.json")
    assert {point.policy for point in curves.points} == {*POLICIES, "oracle"}
    assert sum(found.exits.values()) == found.num_utterances == curves.num_utterances


def test_synthesised_corpus(driver, tmp_path: Path) -> None:
    arguments = ["--corpus", "mini", "--limit-utterances", 12]
    experiment = check_whole_recipe(driver, tmp_path, *arguments)
    check_records(experiment, {"greedy_search", "ctc-decoding", "1best"})
    check_early_exit(experiment)
    (results,) = tmp_path.rglob("RESULTS.md")
    assert "Dynamic exits" in results.read_text() and list(results.parent.glob("early-exit-*.png"))
    arguments += ["--work-dir", tmp_path, "--exp-dir", experiment, *SMALL]

    # other methods: another decoding of the same model
    more = driver("run.sh", *arguments, "--methods", "greedy_search", "--stage", "train")
    assert more.returncode == 0, more.stdout + more.stderr
    check_records(experiment, {"greedy_search"})
    check_early_exit(experiment, "greedy_search")

    # as if it had been killed at its very end: it resumes, and does not train again
    (experiment / ".training.jsonl.done").unlink()
    epoch = (experiment / "epoch-1.pt").stat().st_mtime_ns
    again = driver("run.sh", *arguments, "--stage", "train", "--stop-stage", "train")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (experiment / ".training.jsonl.done").exists()
    assert (experiment / "epoch-1.pt").stat().st_mtime_ns == epoch

    # longer than it was planned
    longer = [str(each).replace("num_epochs=1", "num_epochs=2") for each in arguments]
    resumed = driver("run.sh", *longer, "--stage", "train", "--stop-stage", "train")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(read_training_log(experiment / "training.jsonl")) == 2
    assert (experiment / "epoch-1.pt").stat().st_mtime_ns == epoch

    other = driver("run.sh", *arguments, "--seed", 7, "--stage", "train")
    assert other.returncode == 1 and "started from other data or another configuration" in other.stderr
    assert "< seed 42\n> seed 7\n" in other.stderr


def test_real_speech(driver, tmp_path: Path, shared: Path) -> None:
    arguments = ["--corpus", "an4", "--limit-utterances", 16, "--download-dir", shared / "data"]
    experiment = check_whole_recipe(driver, tmp_path / "work", *arguments)
    check_records(experiment, {"greedy_search", "ctc-decoding", "1best"})


def test_five_utterances_in_another_layout(driver, tmp_path: Path, shared: Path) -> None:
    """Folders that are there already are used as they are, read-only too."""
    arguments = ["--corpus", "librispeech", "--download-dir", shared / "data", "--work-dir", tmp_path]
    arguments += ["--train-splits", "test-clean", "--dev-splits", "dev-clean", "--test-splits", "dev-clean"]
    arguments += ["--vocab-size", 80, "--estimate-lm", "--num-jobs", 8, "--lm-prune", "1e-3"]
    arguments += ["--allow-incomplete"]
    for _ in range(2):
        result = driver("prepare.sh", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
    lang_dir = tmp_path / "data/lang_bpe_80_incomplete_test-clean"
    made = {"bpe.model", "tokens.txt", "words.txt", "L.pt", "L_disambig.pt", "HLG.pt", "LG.pt", "G.pt"}
    assert made <= set(os.listdir(lang_dir))
    [whole], [pruned] = ((tmp_path / "data").glob(f"lm*/3gram{name}.arpa") for name in ("", "-pruned-1e-3"))
    assert pruned.stat().st_size < whole.stat().st_size
    cuts = {
        split: list(read_cuts(tmp_path / f"data/fbank/{split}_cuts.jsonl.gz")) for split in ("test-clean", "dev-clean")
    }
    assert len(cuts["test-clean"]) == 3 * 4 and len(cuts["dev-clean"]) == 1
    assert cuts["dev-clean"][0].load_features().shape == (cuts["dev-clean"][0].num_frames, 80)
    assert cuts["dev-clean"][0].supervisions[0].text.isupper()

    checkpoint = untrained_published_model(lang_dir, tmp_path / "exp/untrained-seed1/averaged.pt")
    decode = [sys.executable, "-m", "splitformer.bin.decode", "--checkpoint", checkpoint, "--lang-dir", lang_dir]
    decode += ["--cuts", f"dev-clean={tmp_path}/data/fbank/dev-clean_cuts.jsonl.gz", "--corpus", "librispeech"]
    decode += ["--output-dir", tmp_path / "decode"]
    result = subprocess.run(list(map(str, decode)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "decode").glob("*.json")]
    assert {(r["exit_layer"], r["method"]) for r in records} == {
        (layer, method) for layer in (2, 4, 6, 8, 10, 12) for method in ("greedy_search", "ctc-decoding", "1best")
    }
    assert {r["ref_words"] for r in records} == {len(cuts["dev-clean"][0].supervisions[0].text.split())}


def untrained_published_model(lang_dir: Path, path: Path) -> Path:
    """A checkpoint of the default configuration with the weights it starts from."""
    tokens = Tokenizer(lang_dir).tokens
    config = Config(model=ModelConfig(vocab_size=len(tokens)))
    torch.manual_seed(1)
    save_checkpoint(
        path,
        {
            "model": AsrModel(config.model).state_dict(),
            "config": config.to_dict(),
            "tokens": tokens,
            "progress": {"epoch": 0, "step": 0, "seconds": 0.0},
            "seed": 1,
            "world_size": 1,
            "device": "none",
        },
    )
    return path


def test_training_data_on_the_fly_and_in_shar_with_noise(driver, tmp_path: Path) -> None:
    """What is stored of each, what training reads, and that a second run does nothing."""
    noise = tmp_path / "musan/noise/hum.wav"
    noise.parent.mkdir(parents=True)
    soundfile.write(noise, 0.1 * np.random.default_rng(0).standard_normal(12 * 16000), 16000)
    arguments = ["--corpus", "mini", "--limit-utterances", 12, "--work-dir", tmp_path / "work", "--num-jobs", 2]
    arguments += ["--dev-splits", "test", "--musan-dir", tmp_path / "musan"]
    data = tmp_path / "work/data/limit-12"
    for flags in (["--on-the-fly", "--speed-perturb", "true"], ["--shar", "numpy"]):
        first = driver("prepare.sh", *arguments, *flags, "--stop-stage", "bpe")
        assert first.returncode == 0, first.stdout + first.stderr
        prepared = snapshot(data)
        again = driver("prepare.sh", *arguments, *flags, "--stop-stage", "bpe")
        assert again.returncode == 0 and snapshot(data) == prepared, again.stdout + again.stderr
        if "--on-the-fly" in flags:
            assert not list((data / "fbank").glob("train*")) and not list((data / "fbank").glob("musan*"))
            cuts = list(read_cuts(data / "audio_cuts/train_cuts.jsonl.gz"))
            assert len(cuts) == 3 * 12 and not any(cut.has_features for cut in cuts)
    assert len(list(SharCuts(data / "fbank/train_shar_numpy/shards"))) == 12
    assert [cut.duration for cut in read_cuts(data / "fbank/musan_cuts.jsonl.gz")] == [10.0]  # 2 s are too short

    # features that were removed are computed again, but not those that Shar replaces
    feats = {split: data / f"fbank/{split}_feats" for split in ("train", "test")}
    for folder in feats.values():
        shutil.rmtree(folder)
    again = driver("prepare.sh", *arguments, "--shar", "numpy", "--stop-stage", "bpe")
    assert again.returncode == 0 and "features of test are missing" in again.stdout, again.stdout + again.stderr
    assert not feats["train"].exists() and list(feats["test"].iterdir())
    again = driver("prepare.sh", *arguments, "--shar", "numpy", "--stop-stage", "bpe")
    assert "are missing" not in again.stdout

    # run.sh hands them to training
    circumstances = ["--num-workers", 2, "--accum-grad", 2, "--precision", "fp32", "--timeout-minutes", 5]
    for flags in (["--on-the-fly", "--speed-perturb", "true", *circumstances], ["--shar", "numpy"]):
        exp_dir = tmp_path / flags[0].strip("-")
        options = [*flags, *SMALL, "--set", "augment.noise_p=0.5", "--exp-dir", exp_dir]
        result = driver("run.sh", *arguments, *options, "--stage", "train", "--stop-stage", "train")
        assert result.returncode == 0, result.stdout + result.stderr
        [record] = read_training_log(exp_dir / "training.jsonl")
        assert record.unreadable_cuts == 0 and record.train_loss > 0
        assert f"training data: {36 if 'on-the-fly' in exp_dir.name else 12} utterances" in result.stderr
        assert list((data / "audio_cuts/.cut-index").glob("*/index.json")), "of speech and noise, beside them"
        assert (" x 2 micro-batch(es), fp32" in result.stderr) == ("--accum-grad" in flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "augment.noise_p=0.5"], "augment.noise_p is 0.5, but no noise is given: add --musan-dir DIR"),
        (["--musan-dir", "egs"], "augment.noise_p is 0, so no noise would be mixed in: add --set augment.noise_p=0.5"),
        (["--musan-dir", "nowhere"], "--musan-dir: there is no folder"),
        (["--shar", "zip"], "--shar is 'zip'; choose one of: numpy lilcom"),
        (["--precision", "fp8"], "--precision is 'fp8'; choose one of: auto bf16 fp16 fp32"),
        (["--timeout-minutes", "long"], "--timeout-minutes is 'long'; it takes numbers such as 0.5"),
        (["--accum-grad", "0"], "--accum-grad is '0'; it takes an integer from 1 up"),
        (["--shar", "numpy", "--on-the-fly"], "choose one of them"),
    ],
)
def test_choices_of_training_data_that_contradict(driver, tmp_path: Path, arguments: list, message: str) -> None:
    result = driver("run.sh", "--work-dir", tmp_path / "work", *arguments)
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "work").exists()


def test_a_gpu_without_kernels_stops_run_sh_before_the_first_stage(driver, tmp_path: Path) -> None:
    """An H100 under torch 1.13.1+cu117 would fail in training, after hours of preparation."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\n"
        "torch.cuda.get_device_name = lambda index: 'NVIDIA H100 80GB HBM3'\n"
        "torch.cuda.get_device_capability = lambda index: (9, 0)\n"
        "torch.cuda.get_arch_list = lambda: ['sm_37', 'sm_80', 'sm_86']\n"
    )
    arguments = ["--work-dir", tmp_path / "work", "--limit-utterances", 4]
    done = driver("run.sh", *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "stage 0" not in done.stdout and not (tmp_path / "work").exists(), done.stdout
    assert "no kernels for GPU 0 NVIDIA H100" in done.stderr and "docs/training.md" in done.stderr
    assert "--skip-checks" in done.stderr
    # preparation does not compute on it
    done = driver("prepare.sh", *arguments, "--stop-stage", "download", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "note: torch" in done.stdout, done.stderr


def test_two_preparations_of_one_folder(repo_root: Path, tmp_path: Path) -> None:
    """The second is refused, or finds everything made; the data are whole, and a further run does nothing."""
    command = ["./prepare.sh", "--corpus", "mini", "--limit-utterances", "12", "--work-dir", tmp_path, "--num-jobs", 2]
    command = list(map(str, command))
    command += ["--stop-stage", "bpe"]
    environment = {**os.environ, "SPLITFORMER_PYTHON": sys.executable}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(command, cwd=repo_root, env=environment, text=True, **pipes) for _ in range(2)]
    outputs = [run.communicate(timeout=300) for run in runs]
    statuses = [run.returncode for run in runs]
    assert 0 in statuses and set(statuses) <= {0, 1}, outputs
    for run, (_, error) in zip(runs, outputs):
        if run.returncode:
            [other] = [each for each in runs if each is not run]
            assert f"is in use by prepare.sh, process {other.pid} on host" in error, error
    assert len(list(read_cuts(tmp_path / "data/limit-12/fbank/train_cuts.jsonl.gz"))) == 12
    again = subprocess.run(command, cwd=repo_root, env=environment, text=True, capture_output=True)
    assert again.returncode == 0
    assert all("exists already" in line or "stage" in line for line in again.stdout.splitlines()), again.stdout


def test_features_that_were_removed_are_computed_again(driver, tmp_path: Path) -> None:
    """All of them, or a file; by several processes with --shard, too; not if they were packed as Shar."""
    arguments = ["--corpus", "mini", "--limit-utterances", 12, "--work-dir", tmp_path, "--num-jobs", 1]
    fbank = tmp_path / "data/limit-12/fbank"
    first = driver("prepare.sh", *arguments, "--stop-stage", "manifests")
    assert first.returncode == 0, first.stderr
    stage = ["--stage", "fbank", "--stop-stage", "fbank"]
    for number in (1, 2):
        share = driver("prepare.sh", *arguments, *stage, "--shard", f"{number}/2")
        assert share.returncode == 0 and not list(fbank.glob("*_cuts.jsonl.gz")), share.stderr
    assert driver("prepare.sh", *arguments, *stage).returncode == 0
    made = snapshot(fbank)
    again = driver("prepare.sh", *arguments, *stage)
    assert again.returncode == 0 and snapshot(fbank) == made, again.stdout
    features = [cut.load_features().tobytes() for cut in read_cuts(fbank / "train_cuts.jsonl.gz")]

    def removed_and_made(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = driver("prepare.sh", *arguments, *stage)
        assert done.returncode == 0 and "features of train are missing" in done.stdout, done.stdout + done.stderr
        cuts = read_cuts(fbank / "train_cuts.jsonl.gz")
        assert [cut.load_features().tobytes() for cut in cuts] == features

    removed_and_made(fbank / "train_feats")
    removed_and_made(fbank / "train_feats/00000/feats.lca")
    assert driver("prepare.sh", *arguments, *stage, "--shar", "numpy").returncode == 0
    shutil.rmtree(fbank / "train_feats")
    packed = driver("prepare.sh", *arguments, *stage, "--shar", "numpy")
    assert packed.returncode == 0 and not (fbank / "train_feats").exists(), packed.stdout
    wrong = driver("prepare.sh", *arguments, "--shard", "1/2")
    assert wrong.returncode == 2 and "--shard needs --stage fbank --stop-stage fbank" in wrong.stderr


def test_a_disk_without_room_stops_preparation_before_the_first_stage(driver, tmp_path: Path) -> None:
    arguments = ["--corpus", "tedlium", "--work-dir", tmp_path / "work", "--num-mel-bins", 10**7]
    done = driver("prepare.sh", *arguments)
    assert done.returncode == 1 and "stage 0" not in done.stdout and not (tmp_path / "work").exists(), done.stdout
    assert "GB will be written below" in done.stderr and "--on-the-fly" in done.stderr


@pytest.mark.parametrize("script", ["prepare.sh", "run.sh"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "nonesuch"], "unknown corpus 'nonesuch'; there are: an4 librispeech mini"),
        (["--stage", "cook"], "unknown stage 'cook' for --stage; stages are: 0 download, 1 manifests"),
        (["--colour", "red"], "unknown option '--colour'. Did you mean --"),
        (["--corpus", "librispeech", "--subset", "10"], "'10'; egs/librispeech has: resplit mini 100 960"),
        (["--corpus", "an4", "--subset", "10"], "egs/an4 has: no subsets"),
        (["--token-type", "word"], "--token-type is 'word'; choose one of: bpe char"),
        (["--num-jobs", "0"], "--num-jobs is '0'; it takes an integer from 1 up"),
        (["--fbank", "torch"], "--fbank is 'torch'; choose one of: lhotse kaldifeat linear-mel"),
    ],
)
def test_bad_arguments_name_the_choices(driver, script: str, arguments: list[str], message: str) -> None:
    result = driver(script, *arguments)
    assert result.returncode == 2 and message in result.stderr, result.stderr


def test_bad_configurations_are_reported_before_any_work(driver, tmp_path: Path) -> None:
    result = driver("run.sh", "--work-dir", tmp_path, "--config", "nonesuch")
    assert result.returncode == 2 and "unknown config 'nonesuch'; egs/mini/conf has: " in result.stderr
    result = driver("run.sh", "--work-dir", tmp_path, "--set", "model.nonesuch=1")
    assert result.returncode != 0 and "unknown key model.nonesuch" in result.stderr
    result = driver("run.sh", "--work-dir", tmp_path, "--methods", "nonesuch")
    assert result.returncode == 2 and "--methods nonesuch: the model has ctc heads; choose among" in result.stderr
    for option, value, message in (
        ("--policy", "nonesuch", f"--policy nonesuch: choose one of {', '.join(POLICIES)}"),
        ("--max-relative-wer", "x", "--max-relative-wer is 'x'; it takes numbers such as 0.5"),
        ("--max-relative-wer", "-0.1", "--max-relative-wer is '-0.1'; it takes numbers such as 0.5"),
        ("--hlg-scales", "a", "--hlg-scales is 'a'; it takes numbers such as 0.5"),
        ("--checkpoint", "README.md", "README.md is no checkpoint; give one such as EXP/averaged.pt"),
        ("--config", "absent.toml", "absent.toml"),
        ("--seed", "-1", "--seed is '-1'; it takes an integer from 0 up"),
        ("--graphs", "HLG", "--graphs is an option of prepare.sh"),
        ("--freeze-encoder-layers", "2", "freezes layers with random weights unless --init-from is given"),
    ):
        result = driver("run.sh", "--work-dir", tmp_path, option, value)
        assert result.returncode == 2 and message in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())


def test_a_model_with_one_exit_has_no_policies(driver, tmp_path: Path) -> None:
    """The recipe goes on without them; with two exits, it asks for the model."""
    stage = ["--work-dir", tmp_path, "--stage", "early_exit", "--stop-stage", "early_exit", "--set"]
    one = driver("run.sh", *stage, "model.num_layers=2", "model.exit_layers=[2]", "model.parallel_exits=[2]")
    assert one.returncode == 0 and "skipping exit policies: the model has a single exit" in one.stdout
    two = driver("run.sh", *stage, "model.num_layers=2", "model.exit_layers=[1, 2]", "model.parallel_exits=[2]")
    assert two.returncode == 1 and "averaged.pt; stage 'average' makes it" in two.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("token_tpye=char", "unknown variable 'token_tpye'. Did you mean token_type?"),
        ("prepare_manifest() { :; }", "unknown variable 'prepare_manifest'. Did you mean prepare_manifests?"),
        ("own_url=x; own_fetch() { :; }", ""),
    ],
)
def test_a_misspelt_name_in_a_description_is_an_error(repo_root: Path, tmp_path: Path, line: str, message: str) -> None:
    description = (repo_root / "egs/mini/corpus.sh").read_text()
    (tmp_path / "corpus.sh").write_text(f"{description}\n{line}\n")
    script = f"""
    set -euo pipefail
    called_from=$PWD corpus=mini
    source local/parse_options.sh
    source local/stages.sh
    source local/corpus.sh
    read_description "{tmp_path}/corpus.sh"
    """
    done = subprocess.run(["bash", "-c", script, "run.sh"], cwd=repo_root, text=True, capture_output=True)
    assert (done.returncode == 0) == (not message) and message in done.stderr, done.stderr


def test_greedy_search_needs_no_graphs(driver, tmp_path: Path) -> None:
    """Neither lexicon nor language model are made, or downloaded, if no method reads them; another method adds them."""
    arguments = ["--limit-utterances", 12, "--work-dir", tmp_path, "--num-jobs", 2, *SMALL, "--stop-stage", "decode"]
    first = driver("run.sh", *arguments, "--methods", "greedy_search")
    assert first.returncode == 0, first.stdout + first.stderr
    [lang_dir] = tmp_path.rglob("lang_char")
    assert {path.name for path in lang_dir.iterdir()} <= {"bpe.model", "tokens.txt", ".bpe.model.done"}
    assert not list(tmp_path.rglob("*.arpa"))
    more = driver("run.sh", *arguments, "--methods", "greedy_search", "1best")
    assert more.returncode == 0, more.stdout + more.stderr
    assert (lang_dir / "HLG.pt").is_file() and not (lang_dir / "LG.pt").exists() and not (lang_dir / "G.pt").exists()


def test_a_killed_run_leaves_nothing_running_and_resumes(repo_root: Path, driver, tmp_path: Path) -> None:
    """SIGTERM to run.sh alone, as a scheduler or `kill` sends it, in the midst of training in two processes."""
    arguments = ["--limit-utterances", 60, "--work-dir", tmp_path, "--num-jobs", 2, *SMALL]
    arguments += ["--methods", "greedy_search", "--stop-stage", "train"]
    arguments[arguments.index("training.num_epochs=1")] = "training.num_epochs=30"
    prepared = driver("run.sh", *arguments[:-1], "bpe")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    [exp_root] = (path.parent for path in tmp_path.rglob("data"))
    run = subprocess.Popen(
        ["./run.sh", *map(str, arguments)],
        cwd=repo_root,
        env={**os.environ, "SPLITFORMER_PYTHON": sys.executable},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not list(exp_root.rglob("epoch-1.pt")):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    run.terminate()
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 143, output + errors
    assert "the same command resumes" in output and "Traceback" not in errors, errors
    [experiment] = (path.parent for path in exp_root.rglob("epoch-1.pt"))
    found = subprocess.run(["pgrep", "-f", str(experiment)], text=True, capture_output=True)
    assert not found.stdout.strip(), "a process of the run is left"
    log = read_training_log(experiment / "training.jsonl")
    again = driver("run.sh", *arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [record.epoch for record in read_training_log(experiment / "training.jsonl")] == list(range(1, 31))
    assert read_training_log(experiment / "training.jsonl")[: len(log)] == log


def test_without_an_environment_the_remedy_is_named(driver, tmp_path: Path) -> None:
    result = driver("prepare.sh", "--work-dir", tmp_path, SPLITFORMER_PYTHON=str(tmp_path / "none/python"))
    assert result.returncode == 1 and "run ./setup.sh first" in result.stderr


def test_a_truncated_archive_is_refused(driver, tmp_path: Path) -> None:
    (tmp_path / "an4_sphere.tar.gz").write_bytes(b"\x1f\x8b truncated")
    result = driver("prepare.sh", "--corpus", "an4", "--work-dir", tmp_path / "work", "--download-dir", tmp_path)
    assert result.returncode == 1
    assert "an4_sphere.tar.gz (12 bytes) is truncated or another file: its md5 is" in result.stderr
    assert not (tmp_path / "work/data/corpus").exists()


def test_damaged_audio_is_skipped_or_fatal(driver, tmp_path: Path) -> None:
    """Empty and corrupt files of a corpus are named, counted and left out; with --strict they end the run."""
    arguments = ["--corpus", "mini", "--limit-utterances", 6, "--work-dir", tmp_path]
    arguments += ["--train-splits", "dev", "--dev-splits", "dev"]  # two splits are quicker than three
    assert driver("prepare.sh", *arguments, "--stop-stage", "download").returncode == 0
    files = sorted((tmp_path / "data/limit-6/corpus/test").rglob("*.flac"))
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:200])  # the header says more than there is

    strict = driver("prepare.sh", *arguments, "--stage", 1, "--stop-stage", "fbank", "--strict")
    assert strict.returncode == 1 and files[0].name in strict.stderr and "--strict" in strict.stderr

    result = driver("prepare.sh", *arguments, "--stage", 1, "--stop-stage", "fbank")
    assert result.returncode == 0, result.stdout + result.stderr
    told = result.stdout + result.stderr
    assert files[0].name in told and files[1].stem in told and "1 skipped" in told
    kept = {cut.id for cut in read_cuts(tmp_path / "data/limit-6/fbank/test_cuts.jsonl.gz")}
    assert kept == {path.stem for path in files[2:]}


def test_a_stage_alone_names_the_one_before(driver, tmp_path: Path) -> None:
    result = driver("prepare.sh", "--work-dir", tmp_path, "--stage", "fbank")
    assert result.returncode == 1 and "stage 'manifests' makes it" in result.stderr
