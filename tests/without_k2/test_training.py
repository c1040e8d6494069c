"""The training loop on generated data: it learns, is reproducible, and reports what it drops."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from lhotse import CutSet

from splitformer.checkpoint import (
    CheckpointError,
    averaged,
    epoch_checkpoints,
    load_checkpoint,
    load_contents,
    load_model,
)
from splitformer.config import LossConfig
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.data.manifests import ManifestError
from splitformer.data.tokenizer import Tokenizer
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.report.records import read_training_log
from splitformer.training.evaluate import evaluate
from splitformer.training.loop import Trainer
from splitformer.training.optim import RunningAverage
from splitformer.training.run_log import duration
from tests.training_runs import ALONE, ENV, command, options, same, small_config, train, training_data, weights


def test_it_learns_to_spell(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    Trainer(small_config(num_epochs=10), options(corpus, tmp_path), ALONE).train()
    epochs = read_training_log(tmp_path / "training.jsonl")
    assert [e.epoch for e in epochs] == list(range(1, 11))
    assert epochs[-1].train_loss < 0.3 * epochs[0].train_loss
    assert set(epochs[-1].dev_wer_per_exit) == {1, 2}
    assert epochs[-1].dev_wer_per_exit[2] < 40.0
    assert "training data: 80 utterances" in caplog.text
    peak = re.search(r"dry run on the largest batches \(.*\): peak memory ([\d.]+) of ([\d.]+) GiB", caplog.text)
    assert peak and 0.05 < float(peak[1]) < float(peak[2])
    assert all(0.0 <= e.data_wait_share <= 1.0 for e in epochs)


def test_the_seed_decides_the_weights(corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        Trainer(small_config(num_epochs=1), options(corpus, tmp_path / name, seed=seed), ALONE).train()
    a, b, c = (weights(tmp_path / name / "epoch-1.pt") for name in "abc")
    assert same(a, b) and not same(a, c)


def test_the_command_resumes_only_if_asked_and_ends_when_all_is_done(corpus, tmp_path):
    flags = ["--set", "training.num_epochs=1"]
    first = train(corpus, tmp_path, tmp_path / "exp", *flags)
    assert first.returncode == 0 and "epoch 1/1" in first.stderr, first.stderr
    assert ", batch " not in first.stderr, "the log has a line a minute"
    refused = train(corpus, tmp_path, tmp_path / "exp", *flags)
    assert refused.returncode == 1 and "add --resume" in refused.stderr
    again = train(corpus, tmp_path, tmp_path / "exp", *flags, "--resume")
    assert again.returncode == 0 and "nothing to train" in again.stderr


def test_without_a_terminal_the_log_says_how_far_training_is(corpus, tmp_path):
    steps = len(training_data(corpus, tmp_path / "index").plan(1))
    run = train(corpus, tmp_path, tmp_path / "exp", "--log-minutes", "0", "--set", "training.num_epochs=2")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if ", batch " in line]
    assert len(lines) >= 2 * steps - 2, "each step"
    assert re.search(
        rf"epoch 1/2, batch 3/{steps}  step 3  loss \d+\.\d+  by exit 1:\d+\.\d+ 2:\d+\.\d+  lr \d\.\de-\d\d  \d+ s of "
        r"audio per second  waited for data \d+%  peak memory 0\.\d GiB  0:0\d h left",
        lines[2],
    ), lines[2]


def test_on_a_terminal_there_is_a_progress_bar_instead(corpus, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    run = subprocess.Popen(
        command(corpus, tmp_path, tmp_path / "exp", "--log-minutes", "0", "--set", "training.num_epochs=1"),
        stderr=theirs,
        env=ENV,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the terminal is closed
        while block := os.read(ours, 4096):
            shown += block
    assert run.wait() == 0, shown
    assert b"step/s" in shown and b"s of audio per second" not in shown


def test_durations_are_readable():
    assert [duration(s) for s in (-1, 59, 3600 * 5 + 61)] == ["0:00 h", "0:01 h", "5:01 h"]
    assert duration(86400 * 3 + 60) == "3 d 0:01 h"


def test_more_epochs_can_be_trained_than_were_planned(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE).train()
    longer = Trainer(small_config(num_epochs=3), options(corpus, tmp_path), ALONE)
    assert longer.progress.epoch == 1 and "training now ends after epoch 3" in caplog.text
    longer.train()
    epochs = read_training_log(tmp_path / "training.jsonl")
    steps = load_checkpoint(tmp_path / "epoch-3.pt")["progress"]["step"]
    # the rate is that of the longer schedule, which has not yet fallen where the shorter one had ended
    assert [e.epoch for e in epochs] == [1, 2, 3]
    assert epochs[0].learning_rate == pytest.approx(0.0, abs=1e-6) and epochs[1].learning_rate > 1e-3
    assert epochs[2].learning_rate < 1e-4 and longer.total_steps == pytest.approx(steps, abs=3)
    assert Trainer(small_config(num_epochs=2), options(corpus, tmp_path), ALONE).train() is None, "all are done"


def test_only_the_newest_epochs_can_be_resumed_from(corpus, tmp_path, caplog):
    config = small_config(num_epochs=4, average_epochs=3)
    Trainer(config, options(corpus, tmp_path), ALONE).train()
    found = {number: load_contents(path) for number, path in epoch_checkpoints(tmp_path).items()}
    assert {number: "optimizer" in contents for number, contents in found.items()} == {
        1: False, 2: False, 3: True, 4: True
    }  # fmt: skip
    sizes = {number: path.stat().st_size for number, path in epoch_checkpoints(tmp_path).items()}
    assert sizes[1] < 0.7 * sizes[4]
    assert all({"model", "average", "progress"} <= contents.keys() for contents in found.values())
    assert averaged(tmp_path)["avg"] == 3 and load_model(tmp_path / "epoch-2.pt")
    for number in (4, 3):
        (tmp_path / f"epoch-{number}.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"can be read and resumed from: .* --init-from"):
        Trainer(config, options(corpus, tmp_path), ALONE)
    assert "epoch-2.pt has no optimizer state" in caplog.text
    other = replace(options(corpus, tmp_path / "other"), init_from=tmp_path / "epoch-2.pt")
    assert same(dict(Trainer(config, other, ALONE).loss.model.state_dict()), found[2]["model"])


class Recording(RunningAverage):
    """A running average that keeps the weights after every step."""

    def __init__(self, average):
        self.__dict__ = average.__dict__
        self.seen = []

    def update(self, state, step):
        super().update(state, step)
        self.seen.append((step, state[NAME].double().clone()))


NAME = "ctc_heads.2.weight"


def test_the_average_is_the_mean_of_the_weights_over_the_steps(corpus, tmp_path):
    config = small_config(num_epochs=3, average_epochs=2, average_period=1)
    trainer = Trainer(config, options(corpus, tmp_path), ALONE)
    trainer.average = Recording(trainer.average)
    trainer.train()
    after = load_checkpoint(tmp_path / "epoch-1.pt")["progress"]["step"]
    expected = torch.stack([w for step, w in trainer.average.seen if step > after]).mean(dim=0)
    model, loaded, checkpoint = load_model(averaged(tmp_path))
    assert (checkpoint["epoch"], checkpoint["avg"]) == (3, 2)
    assert loaded.training == config.training
    torch.testing.assert_close(model.state_dict()[NAME].double(), expected, atol=1e-5, rtol=0)
    expected = torch.stack([w for _, w in trainer.average.seen]).mean(dim=0)
    model, _, checkpoint = load_model(averaged(tmp_path, epoch=3, avg=3))
    assert checkpoint["avg"] == 3
    torch.testing.assert_close(model.state_dict()[NAME].double(), expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match=r"has no epoch-9\.pt; choose among epochs 1, 2, 3"):
        averaged(tmp_path, epoch=9)
    for avg in (0, 7):
        with pytest.raises(CheckpointError, match=f"--avg {avg} with --epoch 3: 1 to 3 epochs can be averaged"):
            averaged(tmp_path, avg=avg)
    average = [sys.executable, "-m", "splitformer.bin.average", "--exp-dir", tmp_path, "--epoch", "2", "--avg", "1"]
    run = subprocess.run([*average, "--output", tmp_path / "one.pt"], capture_output=True, text=True, env=ENV)
    assert run.returncode == 0 and "one.pt: epochs 2 to 2" in run.stdout, run.stderr
    assert load_checkpoint(tmp_path / "one.pt")["epoch"] == 2 and not (tmp_path / "averaged.pt").exists()


def test_averaging_nothing_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="train first"):
        averaged(tmp_path)


def test_cuts_that_cannot_be_trained_on_are_dropped_counted_and_listed(corpus, tmp_path):
    _, train_cuts, _, _ = corpus
    bad = list(CutSet.from_file(train_cuts).subset(first=8))
    for i, cut in enumerate(bad):
        cut.id = f"bad-{i}"
    bad[0].supervisions[0].text = "  "
    bad[1].supervisions[0].text = "AB ÆØ"
    bad[2].supervisions[0].text = "ABCDEFGH" * 20
    bad[3] = bad[3].truncate(duration=0.1)
    bad[4].supervisions.append(bad[4].supervisions[0])
    bad[5].supervisions[0].text = None
    bad[7] = bad[7].pad(duration=180.0)  # an outlier of three minutes
    CutSet.from_cuts(bad).to_file(tmp_path / "bad.jsonl.gz")
    data = training_data(corpus, tmp_path / "index", [train_cuts, tmp_path / "bad.jsonl.gz", train_cuts])
    assert data.report.kept == 81
    assert dict(data.report.dropped) == {
        "empty transcript": 2,
        "transcript has characters that the tokens lack: Æ Ø": 1,
        "more labels than output frames": 1,
        "shorter than data.min_utterance_seconds = 0.2": 1,
        "2 supervisions instead of one": 1,
        "longer than data.max_utterance_seconds = 25.0": 1,
        "an earlier cut has the same id": 80,
    }
    assert data.report.examples["empty transcript"] == "bad-0"
    plan = data.plan(1)
    ids = [cut_id for batch in data.batches(plan, 1, 0, 1, range(1)) for cut_id in batch.cut_ids]
    assert len(ids) == len(set(ids)) == 81
    CutSet.from_cuts(bad[:2]).to_file(tmp_path / "none-good.jsonl.gz")
    with pytest.raises(ValueError, match="0 utterances are left"):
        training_data(corpus, tmp_path / "other", [tmp_path / "none-good.jsonl.gz"])
    with pytest.raises(ManifestError, match=r"run prepare\.sh"):
        load_cuts([tmp_path / "none.jsonl.gz"])


def test_micro_batches_are_disjoint_and_their_union_is_the_batch(corpus, tmp_path):
    data = training_data(corpus, tmp_path)
    plan = data.plan(3)
    whole = [batch.cut_ids for batch in data.batches(plan, 3, 0, 1, range(1))]
    for count in (2, 3):
        ranks = [
            [batch.cut_ids for batch in data.batches(plan, 3, 0, count, range(i, i + 1))] for i in range(count)
        ]
        for number, batch in enumerate(whole):
            taken = [cut_id for micro_batches in ranks for cut_id in micro_batches[number]]
            if len(batch) >= count:
                assert sorted(taken) == sorted(batch)
            else:
                assert set(taken) == set(batch) and len(taken) == count


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_resumes_at_any_batch_with_the_same_augmentation(corpus, tmp_path, num_workers):
    data = training_data(corpus, tmp_path, num_workers=num_workers)
    plan = data.plan(2)
    whole = list(data.batches(plan, 2, 0, 2, range(2)))
    assert len(whole) == 2 * len(plan)
    for first in (1, len(plan) - 1):
        rest = list(data.batches(plan, 2, first, 2, range(2)))
        assert len(rest) == len(whole) - 2 * first
        for ours, theirs in zip(rest, whole[2 * first :], strict=True):
            assert ours.cut_ids == theirs.cut_ids and torch.equal(ours.x, theirs.x)
    others = list(data.batches(plan, 3, 0, 2, range(2)))
    assert any(not torch.equal(a.x, b.x) for a, b in zip(whole, others, strict=True))


def test_the_index_is_reused_and_rebuilt_when_the_manifest_changes(corpus, tmp_path):
    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}

    _, train_cuts, _, _ = corpus
    copy = tmp_path / "cuts.jsonl.gz"
    copy.write_bytes(train_cuts.read_bytes())
    first, written = training_data(corpus, tmp_path / "index", [copy]), files()
    again = training_data(corpus, tmp_path / "index", [copy])
    assert files() == written and again.report == first.report
    assert [again.index.cut_id(i) for i in range(3)] == [first.index.cut_id(i) for i in range(3)]
    CutSet.from_file(train_cuts).subset(first=50).to_file(copy)
    assert len(training_data(corpus, tmp_path / "index", [copy]).index) == 50
    assert len(training_data(corpus, tmp_path / "index", [copy], min_utterance_seconds=0.6).index) < 50


def test_evaluation_sees_every_cut_and_does_not_depend_on_the_batches(corpus, tmp_path):
    _, _, dev_cuts, lang_dir = corpus
    tokenizer = Tokenizer(lang_dir)
    Trainer(small_config(num_epochs=1), options(corpus, tmp_path), ALONE).train()
    loss = MultiExitLoss(load_model(tmp_path / "epoch-1.pt")[0], LossConfig())
    results = [
        evaluate(loss, evaluation_batches(load_cuts([dev_cuts]), tokenizer, seconds), tokenizer, ALONE)
        for seconds in (0.5, 100.0)
    ]
    assert results[0].wer_per_exit == results[1].wer_per_exit
    assert results[0].loss_per_exit == pytest.approx(results[1].loss_per_exit, rel=1e-4)
