"""Exported files against PyTorch: every exit and format, lengths that were not traced, stages, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import wave

import numpy as np
import onnx
import pytest
import torch
from lhotse import Fbank

from splitformer.bin import export as command
from splitformer.checkpoint import CheckpointError, checkpoint_id, load_model, save_checkpoint
from splitformer.config import Config, ModelConfig
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.early_exit.policies import FittedPolicy, Fixed, Learned, Patience, Threshold
from splitformer.early_exit.running import exit_early
from splitformer.early_exit.statistics import Meter
from splitformer.export.check import (
    TOLERANCE,
    ctc_difference,
    difference,
    random_features,
    stage_differences,
    transducer_differences,
    transducer_greedy,
)
from splitformer.export.onnx_files import OPSETS, onnx_function, read_metadata, write_int8, write_onnx
from splitformer.export.other_formats import (
    load_safetensors,
    read_torchscript_metadata,
    write_safetensors,
    write_torchscript,
)
from splitformer.export.wrappers import ExportError, Part, head_parts, stage_parts
from splitformer.model.asr import AsrModel
from splitformer.model.subsampling import MIN_FRAMES
from tests.factories import RATE, make_cuts, make_lang_dir, make_texts, tone_speech
from tests.models import build

CTC = ModelConfig(
    num_mel_bins=20,
    vocab_size=11,
    d_model=24,
    num_heads=4,
    feedforward_dim=48,
    conv_kernel=7,
    num_layers=6,
    exit_layers=(1, 2, 4, 6),  # blocks of one layer and of two
    parallel_exits=(1, 4, 6),
    decoder_dim=16,
    joiner_dim=12,
)
BOTH = dataclasses.replace(
    CTC,
    heads=("ctc", "transducer"),
    parallel_gate=True,
    subsampling="conv2d",
    subsampling_channels=4,
    cmvn="utterance",
)
VARIANTS = {"ctc": CTC, "baseline": dataclasses.replace(CTC, parallel_exits=()), "both": BOTH}
FEATURES = random_features(20)


def sharpened(config):
    """Random weights that are as sure as trained ones, so that hypotheses are not all alike."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ctc_heads" in name or "output_linear" in name:
                parameter.mul_(8.0)
    return model


def save(path, model, config):
    tokens = ["<blk>", "<sos/eos>", "<unk>", *"▁ABCDEFG"]
    save_checkpoint(path, {"model": model.state_dict(), "config": Config(model=config).to_dict(), "tokens": tokens})
    return path


def write(folder, parts, **options):
    paths = []
    for part in parts:
        paths.append(folder / f"{part.stem}.onnx")
        write_onnx(part, paths[-1], {"vocab_size": "11"}, **options)
    return paths


@pytest.mark.parametrize("name", VARIANTS)
def test_onnx_of_every_exit_computes_what_the_whole_model_does(name, tmp_path):
    whole = sharpened(VARIANTS[name])
    checkpoint = save(tmp_path / "averaged.pt", whole, VARIANTS[name])
    sizes = []
    for layer in CTC.exit_layers:
        model = load_model(checkpoint, exit_layer=layer)[0]
        for head in model.heads:
            paths = write(tmp_path, head_parts(model, head))
            assert [path.name.partition("-exit-")[2] for path in paths] == [f"{layer:02d}.onnx"] * len(paths)
            functions = [onnx_function(path) for path in paths]
            if head == "ctc":
                assert ctc_difference(*functions, whole, layer, FEATURES) < TOLERANCE
                sizes.append(paths[0].stat().st_size)
                assert paths[0].read_bytes().count(b"ctc_heads") == 0
            else:
                assert max(transducer_differences(*functions, whole, layer, FEATURES)) < TOLERANCE
            if layer == 4:
                assert any((node.op_type == "Softmax") for node in onnx.load(paths[0]).graph.node)
    # what is above is not there: as many bytes as the layers between have, to a tenth (names and constants)
    layers = {layer: sum(p.numel() for p in load_model(checkpoint, exit_layer=layer)[0].encoder.parameters())
              for layer in CTC.exit_layers}  # fmt: skip
    for (low, high), (small, large) in zip([(1, 2), (2, 4), (4, 6)], itertools.pairwise(sizes)):
        assert large - small > 0.9 * 4 * (layers[high] - layers[low])


@pytest.mark.parametrize("opset", OPSETS)
def test_every_operator_set_that_is_offered(opset, tmp_path):
    model = sharpened(BOTH)
    paths = write(tmp_path, [*head_parts(model, "ctc"), *head_parts(model, "transducer")], opset=opset)
    for path in paths:
        loaded = onnx.load(path)
        assert loaded.ir_version <= 8 and [each.version for each in loaded.opset_import] == [opset]
        assert read_metadata(path)["opset"] == str(opset)
    assert ctc_difference(onnx_function(paths[0]), model, 6, FEATURES) < TOLERANCE
    assert max(transducer_differences(*map(onnx_function, paths[1:]), model, 6, FEATURES)) < TOLERANCE


@pytest.mark.parametrize("opset", [11, 18])
def test_another_operator_set_is_refused(opset, tmp_path):
    with pytest.raises(ExportError, match=f"opset {opset} .* 12 to 17"):
        write(tmp_path, head_parts(build(CTC), "ctc"), opset=opset)
    assert not list(tmp_path.iterdir())


def test_searches_through_the_files_find_the_same(tmp_path):
    model = sharpened(BOTH)
    ctc = onnx_function(*write(tmp_path, head_parts(model, "ctc")))
    paths = write(tmp_path, head_parts(model, "transducer"))
    assert [read_metadata(path).get("context_size") for path in paths] == [None, "2", None]
    for x, x_lens in FEATURES:
        with torch.no_grad():
            padded = torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
            exit_output, log_probs = list(model(padded, x_lens))[-1]
        expected = ctc_greedy_search(log_probs, exit_output.lengths)
        assert [(h.tokens, h.timestamps) for h in ctc_greedy_search(*ctc(x, x_lens))] == [
            (h.tokens, h.timestamps) for h in expected
        ]
        found = transducer_greedy(*map(onnx_function, paths), 2, x, x_lens)
        exit_last = exit_output.encoder_out, exit_output.lengths
        expected = transducer_greedy_search(model.decoder, model.joiner(6), *exit_last)
        assert [(h.tokens, h.timestamps) for h in found] == [(h.tokens, h.timestamps) for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-2)


def test_stages_go_on_from_each_other(tmp_path):
    model = sharpened(CTC)
    paths = write(tmp_path, stage_parts(model))
    assert [path.name for path in paths] == [f"encoder-stage-{stage:02d}.onnx" for stage in (1, 2, 3, 4)]
    assert [read_metadata(path)["exit_layer"] for path in paths] == ["1", "2", "4", "6"]
    assert max(stage_differences([onnx_function(path) for path in paths], model, FEATURES)) < TOLERANCE
    # a stage has its own layers only: two and a parallel one, and not the front end
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < sizes[2] and sum(sizes) < 1.5 * write(tmp_path, head_parts(model, "ctc"))[0].stat().st_size
    with pytest.raises(ExportError, match="CTC"):
        stage_parts(build(dataclasses.replace(CTC, heads=("transducer",))))


def test_int8_is_smaller_close_and_says_so(tmp_path):
    config = dataclasses.replace(BOTH, d_model=96, feedforward_dim=192)
    model = build(config)
    (path,) = write(tmp_path, head_parts(model, "ctc"))
    write_int8(path, tmp_path / "int8.onnx")
    assert read_metadata(tmp_path / "int8.onnx") == {**read_metadata(path), "quantized": "int8"}
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in kinds and "ConvInteger" not in kinds
    assert 0 < ctc_difference(onnx_function(tmp_path / "int8.onnx"), model, 6, FEATURES) < 1.0


class Branching(torch.nn.Module):
    def forward(self, x, x_lens):
        return (x if x_lens[0] > 20 else 2 * x), x_lens + 0


@pytest.mark.parametrize("writer", [write_onnx, write_torchscript])
def test_what_tracing_would_freeze_is_an_error(writer, tmp_path):
    part = Part("branching", Branching(), FEATURES[0], ("x", "x_lens"), ("y", "lengths"), {"x": {0: "N", 1: "T"}})
    with pytest.raises(ExportError, match="freeze"):
        writer(part, tmp_path / "branching", {})
    assert not list(tmp_path.iterdir())


def test_torchscript_runs_without_this_code(tmp_path):
    model = sharpened(BOTH)
    (part,) = head_parts(model, "ctc")
    write_torchscript(part, tmp_path / "model.torchscript", {"exit_layer": "6"})
    assert read_torchscript_metadata(tmp_path / "model.torchscript")["exit_layer"] == "6"
    x, x_lens = FEATURES[0]
    torch.save((x, x_lens), tmp_path / "in.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['splitformer'] = None\n"
        "model = torch.jit.load('model.torchscript')\n"
        "torch.save(model(*torch.load('in.pt')), 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "out.pt")
    assert ctc_difference(lambda *inputs: outputs, model, 6, FEATURES[:1]) < TOLERANCE
    run = torch.jit.load(str(tmp_path / "model.torchscript"))
    assert ctc_difference(run, model, 6, FEATURES) < TOLERANCE
    files = []
    for part in head_parts(model, "transducer"):
        files.append(tmp_path / f"{part.stem}.torchscript")
        write_torchscript(part, files[-1], {})
    assert max(transducer_differences(*(torch.jit.load(str(f)) for f in files), model, 6, FEATURES)) < TOLERANCE


def test_safetensors_bring_back_the_model(tmp_path):
    checkpoint = save(tmp_path / "averaged.pt", build(BOTH), BOTH)
    model, config, contents = load_model(checkpoint, exit_layer=2)
    path = tmp_path / "model.safetensors"
    write_safetensors(model, config, contents["tokens"], path, {"exit_layer": "2"})
    again, its_config, metadata = load_safetensors(path)
    assert its_config == config and metadata["tokens"] == contents["tokens"] and metadata["exit_layer"] == "2"
    assert not again.training and again.encoder.exit_layers == (1, 2)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for broken in (path.read_bytes()[:-100], b"", b"\x00" * 100):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(CheckpointError, match="export again"):
            load_safetensors(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="no file"):
        load_safetensors(tmp_path / "absent")


@pytest.mark.parametrize("exit_layer", [None, 2])
def test_a_checkpoint_of_another_version_is_named(exit_layer, tmp_path):
    state = build(CTC).state_dict()
    lacking = {("renamed." + name if "layers.0." in name else name): tensor for name, tensor in state.items()}
    smaller = {name: tensor[:-1] if name == "ctc_heads.2.bias" else tensor for name, tensor in state.items()}
    for wrong, what in ((lacking, "lacks encoder.layers.0"), (smaller, "other shapes of ctc_heads.2.bias")):
        path = tmp_path / "old.pt"
        save_checkpoint(path, {"model": wrong, "config": Config(model=CTC).to_dict()})
        with pytest.raises(CheckpointError, match=f"old.pt is a checkpoint of another version .*{what}"):
            load_model(path, exit_layer=exit_layer)


def test_differences_are_seen():
    x, lengths = torch.zeros(2, 5, 3), torch.tensor([5, 2])
    other = x.clone()
    other[1, 1, 0] = 0.5
    other[1, 3, 0] = 9.0  # of no frame
    assert difference(other, lengths, x, lengths) == 0.5
    other[0, 0, 0] = float("nan")
    assert difference(other, lengths, x, lengths) == float("inf")
    for found, its_lengths in ((x, lengths.int()), (x, lengths + 1), (x[:, :4], lengths)):
        with pytest.raises(ExportError):
            difference(found, its_lengths, x, lengths)


# ---- the command


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """(folder with averaged.pt, dev_cuts.jsonl.gz, speech.wav and lang_char; the model's configuration)"""
    folder = tmp_path_factory.mktemp("system")
    texts = make_texts(4)
    lang_dir = make_lang_dir(folder, make_texts(40))
    make_cuts(folder, "dev", texts)
    tokens = Tokenizer(lang_dir).tokens
    config = dataclasses.replace(BOTH, num_mel_bins=80, vocab_size=len(tokens))
    contents = {"config": Config(model=config).to_dict(), "tokens": tokens, "model": sharpened(config).state_dict()}
    save_checkpoint(folder / "averaged.pt", contents)
    samples = tone_speech("ABC DEF", np.random.default_rng(0))
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return folder, config


def run_command(monkeypatch, capsys, folder, *options):
    flags = ["--checkpoint", folder / "averaged.pt", "--lang-dir", folder / "lang_char", *options]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
    status = command.main()
    return status, *capsys.readouterr()


def test_the_command_writes_every_file_it_is_asked_for(system, tmp_path, monkeypatch, capsys):
    folder, config = system
    options = ["--exit", 1, "--exit", 4, "--int8", "--stages", "--check", folder / "dev_cuts.jsonl.gz"]
    status, out, err = run_command(monkeypatch, capsys, folder, *options, "--output-dir", tmp_path)
    assert status == 0, err
    stems = [f"{kind}-exit-{layer:02d}" for kind in ("model", "encoder", "decoder", "joiner") for layer in (1, 4)]
    stems += [f"encoder-stage-{stage:02d}" for stage in (1, 2, 3)]
    expected = {f"{stem}{kind}.onnx" for stem in stems for kind in ("", ".int8")} | {"tokens.txt"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name in sorted(expected - {"tokens.txt"}):
        line = next(line for line in out.splitlines() if line.startswith(str(tmp_path / name)))
        assert "MB" in line and "parameters" in line and "largest difference from PyTorch" in line
    assert out.count("greedy int8: WER") == out.count("greedy fp32: WER") == 4
    assert (tmp_path / "tokens.txt").read_text() == (folder / "lang_char" / "tokens.txt").read_text()
    told = read_metadata(tmp_path / "model-exit-04.int8.onnx")
    assert told["checkpoint"] == checkpoint_id(folder / "averaged.pt")
    assert (told["exit_layer"], told["num_layers"], told["exit_layers"]) == ("4", "6", "1,2,4,6")
    assert (told["vocab_size"], told["model_type"]) == (str(config.vocab_size), "zipformer2_ctc")


@pytest.mark.parametrize("kind", ["torchscript", "safetensors"])
def test_the_command_writes_other_formats(kind, system, tmp_path, monkeypatch, capsys):
    folder, _ = system
    options = ["--exit", 2, "--format", kind, "--check", folder / "speech.wav", "--output-dir", tmp_path]
    status, out, err = run_command(monkeypatch, capsys, folder, *options)
    assert status == 0, err
    assert (tmp_path / f"model-exit-02.{kind}").stat().st_size > 0 and "largest difference" in out


def test_a_file_that_computes_something_else_is_removed(system, tmp_path, monkeypatch, capsys):
    folder, _ = system

    def wrong(model, head):
        with torch.no_grad():
            model.ctc_heads["2"].bias[3] += 0.01
        return head_parts(model, head)

    monkeypatch.setattr(command, "head_parts", wrong)
    options = ["--exit", 2, "--head", "ctc", "--output-dir", tmp_path]
    status, _, err = run_command(monkeypatch, capsys, folder, *options)
    assert status == 1 and "differs from PyTorch by 0.0" in err
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit", 3], "no exit after layer 3; choose among 1, 2, 4, 6"),
        (["--exit", 2, "--opset", 11], "choose 12 to 17"),
        (["--exit", 2, "--format", "torchscript", "--int8"], "for --format onnx"),
        (["--exit", 2, "--check", "absent.wav"], "no audio file absent.wav"),
        (["--exit", 2, "--check", __file__], "cannot be read as audio"),
        (["--exit", 2, "--checkpoint", __file__], "cannot be read"),
        (["--exit", 2, "--lang-dir", "absent"], "local/train_bpe.py"),
    ],
)
def test_bad_input_is_named(options, message, system, tmp_path, monkeypatch, capsys):
    folder, _ = system
    status, _, err = run_command(monkeypatch, capsys, folder, "--output-dir", tmp_path / "out", *options)
    assert status == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_model_lacks_is_named(tmp_path, monkeypatch, capsys):
    lang_dir = make_lang_dir(tmp_path, make_texts(40))
    tokens = Tokenizer(lang_dir).tokens
    config = dataclasses.replace(CTC, vocab_size=len(tokens))
    model = AsrModel(config).state_dict()
    save_checkpoint(
        tmp_path / "averaged.pt", {"model": model, "config": Config(model=config).to_dict(), "tokens": tokens}
    )
    options = ["--exit", 2, "--head", "transducer", "--output-dir", tmp_path]
    status, _, err = run_command(monkeypatch, capsys, tmp_path, *options)
    assert status == 1 and "--head transducer: the model has ctc" in err


# ---- examples/run_stages.py


@pytest.fixture(scope="module")
def runner(repo_root):
    """The example, imported as a user's copy would be."""
    sys.path.insert(0, str(repo_root / "examples"))
    try:
        import run_stages

        return run_stages
    finally:
        sys.path.pop(0)


LAYERS = (1, 2, 4)
MEANS = {"entropy": 0.7, "disagreement": 0.5}
LEARNED = Learned({"entropy": 4.0, "disagreement": 1.0}, MEANS, {1: 1.6, 2: 1.2, 4: 0.9}, 0.5)


@pytest.mark.parametrize(
    ("policy", "leaves_at"),
    [
        (Threshold("entropy", {1: 0.85, 2: 0.8, 4: 0.9}), None),
        (Threshold("entropy_non_blank", dict.fromkeys(LAYERS, 0.8)), None),
        (Threshold("posterior", dict.fromkeys(LAYERS, 0.3)), None),
        (Patience(dict.fromkeys(LAYERS, 0.8)), None),
        (Patience(dict.fromkeys(LAYERS, 0.9), consecutive=2), None),
        (LEARNED, None),
        (Fixed(2), 2),
        (Fixed(6), 6),
    ],
    ids=lambda p: p.name if hasattr(p, "name") else "",
)
def test_stages_stop_where_the_policy_stops_torch(policy, leaves_at, system, runner, stages_folder, tmp_path):
    folder, _ = system
    model, config, _ = load_model(folder / "averaged.pt")
    fitted = FittedPolicy("p", policy, config.model.exit_layers, checkpoint_id(folder / "averaged.pt"), "greedy_search")
    fitted.save(tmp_path / "policy.json")
    stages = runner.Stages(stages_folder)
    stops = runner.load_policy(tmp_path / "policy.json", stages)
    rng, taken = np.random.default_rng(4), []
    for text in make_texts(12, seed=3):
        features = Fbank().extract(tone_speech(text, rng).astype(np.float32), RATE)
        meter = Meter(1, policy.needs, exit_layers=config.model.exit_layers)
        with torch.no_grad():
            (leaving,) = exit_early(model,
                torch.from_numpy(features)[None],
                torch.tensor([len(features)]),
                lambda rows, exit_output, log_probs, meter=meter: policy.stops(
                    exit_output.layer, meter.measure(rows, exit_output, log_probs)
                ),
            )
        (expected,) = ctc_greedy_search(leaving.log_probs, leaving.exit_output.lengths)
        found = stages.recognise(features, stops)
        assert found == (leaving.exit_output.layer, expected.tokens, expected.timestamps)
        assert len(stages._sessions) <= len(stages.files)
        taken.append(found.layer)
    assert set(taken) == {leaves_at} if leaves_at else len(set(taken)) > 1, taken


@pytest.fixture(scope="module")
def stages_folder(system, tmp_path_factory):
    folder, _ = system
    model = load_model(folder / "averaged.pt")[0]
    out = tmp_path_factory.mktemp("stages")
    for part in stage_parts(model):
        told = {"checkpoint": checkpoint_id(folder / "averaged.pt"), "num_mel_bins": "80"}
        write_onnx(part, out / f"{part.stem}.onnx", told)
    (out / "tokens.txt").write_text((folder / "lang_char" / "tokens.txt").read_text())
    return out


def test_the_runner_wants_nothing_but_numpy_and_onnxruntime(system, stages_folder, repo_root):
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'lhotse', 'splitformer', 'onnx', 'k2', 'scipy', 'soundfile']))\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    ).replace("runpy.run_path(sys.argv[1]", "sys.argv.pop(0); runpy.run_path(sys.argv[0]")
    flags = [repo_root / "examples" / "run_stages.py", "--stages", stages_folder, system[0] / "speech.wav"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\tlayer 6\t" in done.stdout


def test_the_runners_features_are_lhotses(runner):
    rng = np.random.default_rng(2)
    for samples in (tone_speech("ABE HG", rng), rng.uniform(-1, 1, 12345), np.zeros(4000)):
        samples = samples.astype(np.float32)
        expected = Fbank().extract(samples, RATE)
        found = runner.fbank(samples)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=5e-3)


def test_a_policy_of_another_kind_or_checkpoint_is_refused(runner, stages_folder, tmp_path):
    with pytest.raises(SystemExit, match="deadline"):
        runner.make_policy({"kind": "deadline"})
    with pytest.raises(SystemExit, match="nbest_posterior"):
        runner.make_policy({"kind": "threshold", "statistic": "nbest_posterior", "thresholds": {}})
    (tmp_path / "policy.json").write_text(json.dumps({"checkpoint": "0" * 16, "policy": {"kind": "fixed", "layer": 1}}))
    with pytest.raises(SystemExit, match="fitted for checkpoint 0000"):
        runner.load_policy(tmp_path / "policy.json", runner.Stages(stages_folder))
    with pytest.raises(SystemExit, match="bin/export --stages"):
        runner.Stages(tmp_path)
