"""Training with CTC and a transducer at every exit: it learns, resumes exactly, and runs in two ranks of torchrun."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from splitformer.checkpoint import load_checkpoint
from splitformer.config import Config, ConfigError, tomllib
from splitformer.report.records import read_training_log
from splitformer.training.loop import Trainer
from tests.training_runs import ALONE, ENV, SYSTEM, TORCHRUN, command, options

HEADS = {"heads": ["ctc", "transducer"], "decoder_dim": 32, "joiner_dim": 32}


def config(num_epochs=2, ctc_only_epochs=1):
    tables = tomllib.loads(SYSTEM)
    tables["model"] |= HEADS
    tables["loss"] = {"ctc_only_epochs": ctc_only_epochs, "warm_steps": 5, "prune_range": 4}
    tables["training"]["num_epochs"] = num_epochs
    return Config.from_dict(tables)


@pytest.mark.slow
def test_both_heads_learn_at_every_exit(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    Trainer(config(num_epochs=30, ctc_only_epochs=6), options(corpus, tmp_path), ALONE).train()
    epochs = read_training_log(tmp_path / "training.jsonl")
    assert epochs[5].dev_transducer_wer_per_exit == {}, "it had not started"
    assert set(epochs[6].dev_transducer_wer_per_exit) == set(epochs[6].dev_wer_per_exit) == {1, 2}
    assert epochs[-1].dev_wer_per_exit[2] < 50.0
    assert epochs[-1].train_loss < 0.3 * epochs[6].train_loss
    assert epochs[-1].dev_transducer_wer_per_exit[2] < 75.0 < epochs[6].dev_transducer_wer_per_exit[2]
    assert "dev WER% by exit (transducer)" in caplog.text


def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path):
    Trainer(config(), options(corpus, tmp_path), ALONE).train()
    first = load_checkpoint(tmp_path / "epoch-2.pt")
    (tmp_path / "epoch-2.pt").unlink()
    resumed = Trainer(config(), options(corpus, tmp_path), ALONE)
    assert resumed.progress.epoch == 1
    resumed.train()
    second = load_checkpoint(tmp_path / "epoch-2.pt")
    for part in ("model", "training_only"):
        assert first[part] and all(torch.equal(first[part][name], second[part][name]) for name in first[part])


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_both_phases(corpus, tmp_path):
    values = ['model.heads=["ctc","transducer"]', "model.decoder_dim=32", "model.joiner_dim=32"]
    values += ["loss.ctc_only_epochs=1", "loss.warm_steps=5", "loss.prune_range=4"]
    training = command(corpus, tmp_path, tmp_path / "exp", "--set", *values)[1:]
    run = subprocess.run(
        [sys.executable, *TORCHRUN, "--nproc_per_node", "2", *training], capture_output=True, text=True, env=ENV
    )
    assert run.returncode == 0, run.stderr
    checkpoint = load_checkpoint(tmp_path / "exp" / "epoch-2.pt")
    assert checkpoint["world_size"] == 2
    assert {name.split(".")[0] for name in checkpoint["training_only"]} == {"transducer"}


def test_a_transducer_alone_needs_no_ctc(corpus, tmp_path):
    both = config(num_epochs=1, ctc_only_epochs=0)
    Trainer(replace(both, model=replace(both.model, heads=("transducer",))), options(corpus, tmp_path), ALONE).train()
    [epoch] = read_training_log(tmp_path / "training.jsonl")
    assert epoch.dev_wer_per_exit == {} and set(epoch.dev_transducer_wer_per_exit) == {1, 2}
    names = load_checkpoint(tmp_path / "epoch-1.pt")["model"]
    assert not any(name.startswith("ctc_heads") for name in names)


def test_without_k2_the_error_says_what_to_do(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "k2", None)
    monkeypatch.delitem(sys.modules, "splitformer.losses.pruned_transducer", raising=False)
    with pytest.raises(ConfigError, match=r"needs k2 .*: use the environment of \./setup\.sh"):
        Trainer(config(), options(corpus, tmp_path), ALONE)
