"""A small system, trained on generated data by the command, in this process or in a forked one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from splitformer.checkpoint import load_checkpoint
from splitformer.config import Config, tomllib
from splitformer.data.tokenizer import Tokenizer
from splitformer.data.training import DataOptions, TrainingData
from splitformer.training.distributed import Ranks
from splitformer.training.loop import Trainer
from splitformer.training.options import RunOptions
from splitformer.training.saving import locked

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
SYSTEM = """
[model]
cmvn = "utterance"
subsampling = "conv2d"
subsampling_channels = 8
d_model = 32
num_heads = 2
feedforward_dim = 64
conv_kernel = 7
num_layers = 2
exit_layers = [1, 2]
parallel_exits = [1, 2]
parallel_gate = true
[optim]
schedule = "cosine"
base_lr = 5e-3
[data]
max_duration = 15.0
[augment]
time_warp_factor = 0
num_frame_masks = 1
frames_mask_size = 5
features_mask_size = 5
[training]
num_epochs = 2
average_epochs = 1
average_period = 2
"""


def command(corpus, tmp_path, exp_dir, *more):
    _, train, dev, lang_dir = corpus
    conf = tmp_path / "system.toml"
    conf.write_text(SYSTEM)
    flags = ["--config", conf, "--exp-dir", exp_dir, "--train-cuts", train, "--dev-cuts", dev]
    flags += ["--lang-dir", lang_dir, "--num-workers", "0", "--seed", "7", *more]
    return [sys.executable, "-m", "splitformer.bin.train", *map(str, flags)]


def train(corpus, tmp_path, exp_dir, *more):
    return subprocess.run(command(corpus, tmp_path, exp_dir, *more), capture_output=True, text=True, env=ENV)


def slow_disk(folder, seconds):
    """Return environment variables in which a process takes `seconds` to write a file safely to disk."""
    site = folder / "site"
    site.mkdir()
    slow = f"import os, time\nfsync = os.fsync\nos.fsync = lambda file: (time.sleep({seconds}), fsync(file))[1]\n"
    (site / "sitecustomize.py").write_text(slow)
    return {"PYTHONPATH": f"{site}:{ENV['PYTHONPATH']}"}


def in_fork(config, options):
    """Start a process that trains; it imports nothing again, so that it can be killed within a second."""
    process = multiprocessing.get_context("fork").Process(target=_train_alone, args=(config, options))
    process.start()
    return process


def _train_alone(config, options):
    torch.set_num_threads(1)  # threads of the parent do not exist here
    with locked(options.exp_dir):
        Trainer(config, options, ALONE).train()


def wait_for(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.005)


def weights(path):
    return load_checkpoint(path)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def options(corpus, exp_dir, **others):
    _, train_cuts, dev_cuts, lang_dir = corpus
    defaults = {"seed": 7, "num_workers": 0, "resume": True} | others
    return RunOptions(exp_dir, (train_cuts,), (dev_cuts,), lang_dir, **defaults)


ALONE = Ranks(0, 1, torch.device("cpu"))


def small_config(**training):
    """The configuration of SYSTEM with these values in the section training."""
    tables = tomllib.loads(SYSTEM)
    tables["training"] |= training
    return Config.from_dict(tables)


def training_data(corpus, folder, cuts=None, num_workers=0, augment=None, on_the_fly=False, noise_cuts=(), **data):
    _, train_cuts, _, lang_dir = corpus
    config = small_config()
    config = replace(config, data=replace(config.data, **data), augment=replace(config.augment, **augment or {}))
    options = DataOptions(cuts or [train_cuts], noise_cuts, on_the_fly, num_workers, folder)
    return TrainingData(options, config, Tokenizer(lang_dir), seed=1)
