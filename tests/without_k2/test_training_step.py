"""The fast layers of a training step give what the plain ones give, and its benchmark runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import train
from splitformer.config import LossConfig, OptimConfig
from splitformer.errors import UserError
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model import conformer
from splitformer.model.asr import AsrModel
from splitformer.model.conformer import MaskedBatchNorm, SelfAttention
from splitformer.training import fast_cpu
from splitformer.training.fast_cpu import ByteDropout, ConvolutionLinear, speed_up
from splitformer.training.optim import adamw
from splitformer.training.precision import Precision
from tests.models import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slow_mkl(monkeypatch):
    """MKL counts as slow for linear layers of any size."""
    monkeypatch.setattr(fast_cpu, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(fast_cpu, "MIN_WEIGHTS", 1)


def gradients(call, *inputs, parameters=None):
    """Return the output, and the gradients of inputs and parameters for a random gradient of the output."""
    module = parameters or call
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*inputs)
    torch.manual_seed(9)
    out.backward(torch.randn_like(out))
    found = [out.detach(), *(x.grad for x in inputs), *(p.grad.clone() for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return found


def assert_close(found, expected):
    """Compare with a tolerance of 1e-5 of the largest element."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 170, 48), (700, 48), (1, 1, 48), (2, 3, 5, 48)])
def test_a_linear_layer_as_a_convolution_equals_it(shape, threads):
    torch.manual_seed(1)
    fast, plain = ConvolutionLinear(48, 80).train(), nn.Linear(48, 80)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(gradients(fast, x), gradients(plain, x))
    finally:
        torch.set_num_threads(before)
    # a transposed input, as in the encoder
    if x.dim() > 2:
        assert_close([fast(x.transpose(0, 1))], [plain(x.transpose(0, 1))])


def test_layers_are_replaced_in_place_and_keep_everything_but_their_class(slow_mkl):
    model = AsrModel(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speed_up(model)
    kinds = {type(module) for module in model.modules()}
    assert {ConvolutionLinear, ByteDropout} <= kinds and not {nn.Linear, nn.Dropout} & kinds
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_small_layers_are_not_replaced(monkeypatch, slow_mkl):
    monkeypatch.setattr(fast_cpu, "MIN_WEIGHTS", 65)
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9))
    speed_up(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, ConvolutionLinear]


def test_in_evaluation_and_under_autocast_layers_compute_what_torchs_do(slow_mkl):
    torch.manual_seed(7)
    fast, x = ConvolutionLinear(64, 96), torch.randn(5, 64)
    plain = nn.Linear(64, 96)
    plain.load_state_dict(fast.state_dict())
    assert torch.equal(fast.eval()(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast.train()(x), plain(x))
    dropped = ByteDropout(0.5).eval()
    assert torch.equal(dropped(x), x)


@pytest.mark.parametrize(
    ("text", "slow"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: X\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: X\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
        (None, False),
    ],
)
def test_where_mkl_is_slow(monkeypatch, tmp_path, text, slow):
    cpuinfo = tmp_path / "cpuinfo"
    if text is not None:
        cpuinfo.write_text(text)
    monkeypatch.setattr(fast_cpu, "CPUINFO", cpuinfo)
    assert fast_cpu.mkl_is_slow() == (slow and torch.backends.mkl.is_available())


def test_a_steps_loss_and_gradients_are_those_of_plain_layers(slow_mkl):
    x, x_lens = torch.randn(3, 200, 20), torch.tensor([200, 161, 90])
    y, y_lens = torch.randint(1, 11, (3, 6)), torch.tensor([6, 4, 3])
    torch.manual_seed(2)
    loss = MultiExitLoss(AsrModel(dataclasses.replace(SMALL, dropout=0.0)), LossConfig()).train()

    def step():
        result = loss(x, x_lens, y, y_lens)
        result.total.backward()
        found = [result.total.detach(), result.per_exit, *(p.grad.clone() for p in loss.parameters())]
        loss.zero_grad(set_to_none=True)
        return found

    plain = step()
    speed_up(loss)
    for a, b in zip(step(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


def test_padding_does_not_change_the_output_in_training(slow_mkl):
    torch.manual_seed(3)
    model = AsrModel(dataclasses.replace(SMALL, dropout=0.0)).train()
    speed_up(model)
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):  # its statistics are meant to depend on the batch
            module.eval()
    utterances = [torch.randn(frames, 20) for frames in (203, 55, 131)]
    batch = torch.full((3, 240, 20), 1000.0)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    together = list(model(batch, torch.tensor([203, 55, 131])))
    for i, utterance in enumerate(utterances):
        alone = model(utterance.unsqueeze(0), torch.tensor([len(utterance)]))
        for (_, log_probs), (_, expected) in zip(together, alone, strict=True):
            torch.testing.assert_close(log_probs[i, : expected.size(1)], expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_a_product_with_the_drawn_factors(p, dtype):
    x = torch.randn(7, 33, 5).to(dtype).requires_grad_()
    grad = torch.randn(7, 33, 5).to(dtype)
    torch.manual_seed(4)
    out = ByteDropout(p).train()(x)
    out.backward(grad)
    torch.manual_seed(4)
    drawn = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    dropped = round(256 * p)
    factors = torch.tensor([0.0 if b < dropped else 256 / (256 - dropped) for b in drawn[: x.numel()].tolist()])
    factors = factors.view(x.shape).to(dtype)
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(out, x * factors)
    assert torch.equal(x.grad, grad * factors)


def test_dropout_by_bytes_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(6)
    x = torch.ones(401, 1003)
    for p, share in ((0.1, 26 / 256), (0.5, 0.5)):
        dropped = ByteDropout(p).train()(x)
        assert float((dropped == 0).float().mean()) == pytest.approx(share, abs=0.003)
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
        assert dropped.unique().numel() == 2
    assert torch.equal(ByteDropout(0.5).eval()(x), x)
    layer = ByteDropout(0.3).train()
    first, second = (torch.manual_seed(7), layer(x))[1], layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(first, layer(x))


@pytest.mark.parametrize(("capability", "name"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_the_gpus_compute_capability_decides_the_precision(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # emulation counts, from torch 2.4
    assert Precision("auto", torch.device("cuda", 0)).name == name


@pytest.mark.skipif(conformer.FUSED_ATTENTION is None, reason="torch 1 has no fused attention")
@pytest.mark.parametrize("training", [True, False])
def test_fused_attention_equals_the_plain_one_beside_padding(monkeypatch, training):
    torch.manual_seed(5)
    attention = SelfAttention(24, 4, 0.0 if training else 0.3).train(training)
    x = torch.randn(3, 41, 24)
    key_bias, mask = conformer.frame_masks(torch.tensor([41, 17, 1]), x)

    def valid(x):
        return attention(x, key_bias) * mask

    found = gradients(valid, x, parameters=attention)
    monkeypatch.setattr(conformer, "FUSED_ATTENTION", None)
    assert_close(found, gradients(valid, x, parameters=attention))


def test_traced_attention_has_no_fused_kernel():
    """Not every runtime that reads the trace knows the kernel."""
    x, bias = torch.randn(2, 9, 24), torch.zeros(2, 1, 1, 9)
    attention = SelfAttention(24, 4, 0.3).eval()
    traced = torch.jit.trace(attention, (x, bias), check_trace=False)
    assert "scaled_dot_product" not in str(traced.graph) and "softmax" in str(traced.graph)
    torch.testing.assert_close(traced(x, bias), attention(x, bias))


@pytest.mark.skipif(not hasattr(nn.Module, "compile"), reason="torch 1 has no torch.compile")
def test_a_compiled_layer_trains(slow_mkl):
    x = torch.randn(2, 31, 24)
    key_bias, mask = conformer.frame_masks(torch.tensor([31, 12]), x)
    layer = conformer.ConformerLayer(24, 4, 48, 7, dropout=0.0).train()
    speed_up(layer)
    expected = gradients(lambda x: layer(x, key_bias, mask), x, parameters=layer)
    layer.compile(backend="aot_eager")  # without generating code, which takes a minute
    found = gradients(lambda x: layer(x, key_bias, mask), x, parameters=layer)
    assert_close(found, expected)
    dropped = conformer.ConformerLayer(24, 4, 48, 7, dropout=0.5).train()
    speed_up(dropped)
    dropped.compile(backend="aot_eager")
    first, second = (gradients(lambda x: dropped(x, key_bias, mask), x, parameters=dropped)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_the_optimizer_takes_adamws_steps():
    torch.manual_seed(6)
    start = [torch.randn(3, 4), torch.randn(5)]
    config = OptimConfig(weight_decay=0.1)
    ours, reference = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    fast = adamw(ours, config)
    plain = torch.optim.AdamW(reference, betas=(config.beta1, config.beta2), weight_decay=0.1, foreach=False)
    for _ in range(3):
        for a, b in zip(ours, reference, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fast.step()
        plain.step()
    assert_close([p.detach() for p in ours], [p.detach() for p in reference])


TINY = """
[model]
d_model = 16
num_heads = 2
feedforward_dim = 32
conv_kernel = 7
num_layers = 2
exit_layers = [1, 2]
parallel_exits = [1]
"""


def benchmark(tmp_path, *flags):
    conf = tmp_path / "tiny.toml"
    conf.write_text(TINY)
    command = [sys.executable, "-m", "benchmarks.train", "--config", conf, "--batch", "2", "--seconds", "2"]
    command += ["--steps", "1", "--threads", "1", "--device", "cpu", *flags]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def rows(text):
    """{variant: its cells}"""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in cells if first not in ("variant", "---")}


def test_sections_of_the_benchmarks_file_are_replaced_in_place(tmp_path):
    path = tmp_path / "train.md"
    train.write_section(path, ["## a", "", "first"])
    train.write_section(path, ["## b", "", "second"])
    train.write_section(path, ["## a", "", "third"])
    assert path.read_text() == f"{train.TITLE}\n\n## a\n\nthird\n\n## b\n\nsecond\n"


def test_the_benchmark_measures_what_is_asked_for(tmp_path):
    output = tmp_path / "train.md"
    compare = ["--compare"] if importlib.util.find_spec("torchaudio") else []
    done = benchmark(tmp_path, "--precision", "fp32", "--num-workers", "0", *compare, "--output", output)
    assert done.returncode == 0, done.stderr
    text = output.read_text()
    found = rows(text)
    assert list(found) == ["ours, fp32", *(["torchaudio Conformer, fp32"] if compare else [])]
    for _, ms, _, _, whole_ms, frames, _ in found.values():
        assert int(ms) <= int(whole_ms)
        assert int(frames) == pytest.approx(400 / int(whole_ms) * 1000, rel=0.1), "2 x 2 s in each step"
    reference = next(row for row in found.values() if row[0] == "1")
    for row in found.values():
        if row is not reference:  # of one measured turn
            assert float(row[0].split()[0]) == pytest.approx(int(row[1]) / int(reference[1]), rel=0.1)


def test_the_benchmark_counts_operations(tmp_path):
    done = benchmark(tmp_path, "--precision", "fp32", "bf16", "--operations")
    assert done.returncode == 0, done.stderr
    counts = {name: [int(cell) for cell in cells] for name, cells in rows(done.stdout).items() if name != "precision"}
    assert list(counts) == ["fp32", "bf16"]
    for forward, backward, update, together in counts.values():
        assert min(forward, backward, update) > 0 and forward + backward + update == together
    assert counts["bf16"][3] > counts["fp32"][3], "casts"


def test_the_benchmark_measures_training_on_cuts(corpus, tmp_path):
    _, cuts, _, lang_dir = corpus
    done = benchmark(tmp_path, "--precision", "fp32", "--train-cuts", cuts, "--lang-dir", lang_dir)
    assert done.returncode == 0, done.stderr
    assert list(rows(done.stdout)) == ["ours, fp32"]
    assert f"of {cuts.name}" in done.stdout and "waiting for data" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_cuts": (Path("cuts.jsonl.gz"),)}, "--lang-dir belong together"),
        ({"steps": 0}, "must be at least 1"),
        ({"against": Path("nowhere")}, "not a checkout"),
        *[
            ({"compile": True}, "needs torch 2"),
            ({"precision": ("medium",)}, "has no effect"),
        ][: 0 if hasattr(nn.Module, "compile") else 2],
    ],
)
def test_the_benchmark_refuses_what_it_cannot_do(options, message):
    with pytest.raises(UserError, match=message):
        train.run(train.Options(**options))
