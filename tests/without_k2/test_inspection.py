"""`--inspect`: statistics of outputs, gradients and posteriors, which leave the run unchanged."""

from __future__ import annotations

import math
import re

import pytest
import torch

from splitformer.training.loop import Trainer
from tests.training_runs import ALONE, options, same, small_config, train


@pytest.fixture
def trainer(corpus, tmp_path):
    return Trainer(small_config(num_epochs=1), options(corpus, tmp_path / "exp"), ALONE)


def test_statistics_are_those_of_the_outputs(trainer):
    before = {name: tensor.clone() for name, tensor in trainer.loss.state_dict().items()}
    outputs = {}
    encoder, heads = trainer.loss.model.encoder, trainer.loss.model.ctc_heads

    def keep(name):
        def hook(module, inputs, output):
            outputs.setdefault(name, output.detach())
            if name == "head" and output.requires_grad:
                output.register_hook(lambda gradient: outputs.setdefault("gradient", gradient))

        return hook

    modules = {"layer 2": encoder.layers[1], "parallel 1": encoder.parallel["1"], "head": heads["1"]}
    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    found = trainer.inspect()
    layers, exits = found.layers, found.exits
    for handle in handles:
        handle.remove()
    assert same(before, trainer.loss.state_dict()) and all(p.grad is None for p in trainer.loss.parameters())
    assert not any(module._forward_hooks for module in trainer.loss.modules())
    by_name = {each.name: each for each in layers}
    assert [each.name for each in layers if re.fullmatch(r"front end|layer \d|parallel \d|ctc head \d", each.name)] == [
        "front end", "layer 1", "parallel 1", "layer 2", "parallel 2", "ctc head 1", "ctc head 2"
    ]  # fmt: skip
    del outputs["head"]
    for name in ("layer 2", "parallel 1"):
        x = outputs[name].float()
        assert by_name[name].rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
        assert by_name[name].largest == pytest.approx(float(x.abs().max()))
    gradient = outputs["gradient"].float()
    assert by_name["ctc head 1"].gradient_rms == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-3)
    assert all(each.not_finite == 0 and each.weight_rms > 0 and each.gradient_rms > 0 for each in layers
               if "parallel" not in each.name and each.name != "layer 2")  # fmt: skip
    vocabulary = trainer.config.model.vocab_size
    for each in exits:  # an untrained head knows almost nothing
        assert 0 < each.blank < 1 and 0.5 * math.log(vocabulary) < each.entropy <= math.log(vocabulary)
    assert [each.layer for each in exits] == [1, 2]


def test_values_that_are_not_finite_are_counted(trainer):
    with torch.no_grad():
        trainer.loss.model.encoder.layers[0].final_norm.weight[:8] = math.inf
    layers = trainer.inspect().layers
    broken = next(each for each in layers if each.name == "layer 1")
    assert broken.not_finite == pytest.approx(8 / 32, abs=0.01)
    assert math.isfinite(broken.rms), "the rms of the others"


def test_the_command_prints_tables_and_trains_nothing(corpus, tmp_path):
    done = train(corpus, tmp_path, tmp_path / "exp", "--inspect")
    assert done.returncode == 0, done.stderr
    assert "epoch 1, batch 0, before step 1" in done.stdout and "| layer 2 convolution |" in done.stdout
    assert re.search(r"^\| exit \| CTC loss \| blank posterior \| entropy \|$", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "exp").glob("*.pt")) and not (tmp_path / "exp" / "training.jsonl").exists()


def test_a_finished_run_is_inspected_and_its_files_stay(trainer, corpus):
    untrained = trainer.inspect()
    trainer.train()
    exp_dir = trainer.options.exp_dir
    files = {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*")}
    trained = Trainer(small_config(num_epochs=1), options(corpus, exp_dir), ALONE).inspect()
    assert trained.exits[-1].loss < untrained.exits[-1].loss
    assert {path: path.stat().st_mtime_ns for path in exp_dir.rglob("*")} == files
