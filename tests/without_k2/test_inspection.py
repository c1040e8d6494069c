"""`--inspect`: statistics are those of the real outputs, gradients and posteriors, and the run is left as it was."""

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
    layers, exits = trainer.inspect()
    for handle in handles:
        handle.remove()
    assert same(before, trainer.loss.state_dict()) and all(p.grad is None for p in trainer.loss.parameters())
    assert not any(module._forward_hooks for module in trainer.loss.modules())
    found = {each.name: each for each in layers}
    assert [each.name for each in layers if re.fullmatch(r"front end|layer \d|parallel \d|ctc head \d", each.name)] == [
        "front end", "layer 1", "parallel 1", "layer 2", "parallel 2", "ctc head 1", "ctc head 2"
    ]  # fmt: skip
    del outputs["head"]
    for name in ("layer 2", "parallel 1"):
        x = outputs[name].float()
        assert found[name].rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-4)
        assert found[name].largest == pytest.approx(float(x.abs().max()))
    gradient = outputs["gradient"].float()
    assert found["ctc head 1"].gradient_rms == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-3)
    assert all(each.not_finite == 0 and each.weight_rms > 0 and each.gradient_rms > 0 for each in layers
               if "parallel" not in each.name and each.name != "layer 2")  # fmt: skip
    vocabulary = trainer.config.model.vocab_size
    for each in exits:  # an untrained head knows next to nothing
        assert 0 < each.blank < 1 and 0.5 * math.log(vocabulary) < each.entropy <= math.log(vocabulary)
    assert [each.layer for each in exits] == [1, 2]


def test_what_is_not_finite_is_counted(trainer):
    with torch.no_grad():
        trainer.loss.model.encoder.layers[0].final_norm.weight[:8] = math.inf
    layers, _ = trainer.inspect()
    broken = next(each for each in layers if each.name == "layer 1")
    assert broken.not_finite == pytest.approx(8 / 32, abs=0.01)
    assert math.isfinite(broken.rms), "of the others"


def test_the_command_prints_tables_before_and_after_training_and_writes_nothing(corpus, tmp_path):
    exp_dir = tmp_path / "exp"
    fresh = train(corpus, tmp_path, exp_dir, "--inspect")
    assert fresh.returncode == 0, fresh.stderr
    assert "epoch 1, batch 0, before step 1" in fresh.stdout and "| layer 2 convolution |" in fresh.stdout
    assert not list(exp_dir.glob("*.pt")) and not (exp_dir / "training.jsonl").exists()
    assert train(corpus, tmp_path, exp_dir, "--set", "training.num_epochs=1").returncode == 0
    files = sorted(exp_dir.rglob("*"))
    trained = train(corpus, tmp_path, exp_dir, "--set", "training.num_epochs=1", "--inspect", "--resume")
    assert trained.returncode == 0 and "epoch 2, batch 0" in trained.stdout
    assert re.search(r"^\| exit \| CTC loss \| blank posterior \| entropy \|$", trained.stdout, re.MULTILINE)
    assert sorted(exp_dir.rglob("*")) == files
