"""Training with CTC and a transducer at every exit: it learns, a killed run goes on alike, and two ranks agree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from splitformer.checkpoint import load_checkpoint
from splitformer.config import tomllib
from splitformer.report.records import read_training_log
from tests.factories import make_cuts, make_lang_dir, make_texts
from tests.training_runs import SYSTEM

HEADS = """
heads = ["ctc", "transducer"]
decoder_dim = 32
joiner_dim = 32
[loss]
ctc_only_epochs = 1
warm_steps = 5
prune_range = 4
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(conf, train cuts, dev cuts, lang_dir)"""
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(80)
    conf = folder / "system.toml"
    conf.write_text(SYSTEM.replace("[optim]", HEADS + "[optim]"))
    return (
        conf,
        make_cuts(folder, "train", texts),
        make_cuts(folder, "dev", make_texts(20, seed=1), seed=1),
        make_lang_dir(folder, texts),
    )


def train(corpus, exp_dir, *more, ranks=1):
    conf, train_cuts, dev_cuts, lang_dir = corpus
    start = ["-m", "splitformer.bin.train"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(ranks)]
        start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "splitformer.bin.train"]
    flags = ["--config", conf, "--exp-dir", exp_dir, "--train-cuts", train_cuts, "--dev-cuts", dev_cuts]
    flags += ["--lang-dir", lang_dir, "--num-workers", "0", "--seed", "7", *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *start, *map(str, flags)], capture_output=True, text=True, env=env)


def test_both_heads_learn_at_every_exit(corpus, tmp_path):
    run = train(corpus, tmp_path, "--set", "training.num_epochs=40", "--set", "loss.ctc_only_epochs=6")
    assert run.returncode == 0, run.stderr
    epochs = read_training_log(tmp_path / "training.jsonl")
    assert epochs[5].dev_transducer_wer_per_exit == {}  # its turn had not come
    assert set(epochs[6].dev_transducer_wer_per_exit) == set(epochs[6].dev_wer_per_exit) == {1, 2}
    assert epochs[-1].dev_wer_per_exit[2] < 50.0
    assert epochs[-1].train_loss < 0.3 * epochs[6].train_loss
    assert epochs[-1].dev_transducer_wer_per_exit[2] < 75.0 < epochs[6].dev_transducer_wer_per_exit[2]
    assert "dev WER% by exit (transducer)" in run.stderr


def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path):
    assert train(corpus, tmp_path).returncode == 0
    first = load_checkpoint(tmp_path / "epoch-2.pt")
    (tmp_path / "epoch-2.pt").unlink()
    run = train(corpus, tmp_path, "--resume")
    assert run.returncode == 0 and "going on after epoch 1" in run.stderr, run.stderr
    second = load_checkpoint(tmp_path / "epoch-2.pt")
    for part in ("model", "training_only"):
        assert first[part] and all(torch.equal(first[part][name], second[part][name]) for name in first[part])


def test_two_ranks_train_both_phases(corpus, tmp_path):
    run = train(corpus, tmp_path, ranks=2)
    assert run.returncode == 0, run.stderr
    checkpoint = load_checkpoint(tmp_path / "epoch-2.pt")
    assert checkpoint["world_size"] == 2
    assert {name.split(".")[0] for name in checkpoint["training_only"]} == {"transducer"}


def test_a_transducer_alone_needs_no_ctc(corpus, tmp_path):
    more = ("--set", 'model.heads=["transducer"]', "--set", "loss.ctc_only_epochs=0", "--set", "training.num_epochs=1")
    run = train(corpus, tmp_path, *more)
    assert run.returncode == 0, run.stderr
    [epoch] = read_training_log(tmp_path / "training.jsonl")
    assert epoch.dev_wer_per_exit == {} and set(epoch.dev_transducer_wer_per_exit) == {1, 2}
    names = load_checkpoint(tmp_path / "epoch-1.pt")["model"]
    assert not any(name.startswith("ctc_heads") for name in names)
    assert tomllib.loads(corpus[0].read_text())["model"]["heads"] == ["ctc", "transducer"]


def test_without_k2_the_error_says_what_to_do(corpus, tmp_path):
    code = "import sys; sys.modules['k2'] = None; from splitformer.bin.train import main; sys.exit(main())"
    conf, train_cuts, dev_cuts, lang_dir = map(str, corpus)
    flags = ["--config", conf, "--exp-dir", str(tmp_path), "--train-cuts", train_cuts, "--dev-cuts", dev_cuts]
    command = [sys.executable, "-c", code, *flags, "--lang-dir", lang_dir]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "needs k2" in run.stderr and "Traceback" not in run.stderr
