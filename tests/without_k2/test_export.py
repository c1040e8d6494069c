"""Exported files against PyTorch: every exit and format, lengths that were not traced, stages, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import wave
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from lhotse import Fbank
from safetensors.torch import save_file

from splitformer.bin.export import run
from splitformer.checkpoint import CheckpointError, checkpoint_id, load_model, save_checkpoint
from splitformer.cli import command
from splitformer.config import Config, DataConfig, ModelConfig
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.early_exit.policies import FittedPolicy, Fixed, Learned, Patience, Threshold, feature
from splitformer.early_exit.running import exit_early
from splitformer.early_exit.statistics import Meter
from splitformer.export.check import (
    Comparison,
    compare_ctc,
    compare_stages,
    compare_transducer,
    random_features,
    run_pytorch,
    transducer_greedy,
)
from splitformer.export.exporter import TOLERANCE, ExportOptions, Speech, Writer
from splitformer.export.formats import (
    Opset,
    load_safetensors,
    onnx_function,
    onnx_metadata,
    write_int8,
    write_onnx,
    write_safetensors,
    write_torchscript,
)
from splitformer.export.wrappers import ExportError, Part, head_parts, stage_parts
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
    num_layers=4,
    exit_layers=(1, 2, 4),  # blocks of one layer and of two
    parallel_exits=(1, 4),
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
SHALLOW = dataclasses.replace(BOTH, num_layers=1, exit_layers=(1,), parallel_exits=(1,))
UNET = dataclasses.replace(
    CTC, encoder="unet", num_layers=6, exit_layers=(6,), parallel_exits=(), unet_stacks=(1,) * 5
)
FEATURES = random_features(20)


def sharpened(config):
    """Random weights that are as certain as trained ones, so that hypotheses are not all alike."""
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


def largest_difference(compare, functions, model, layer, features=FEATURES):
    return max(each.difference for each in compare(functions, model, layer, run_pytorch(model, features)))


@pytest.mark.parametrize("name", VARIANTS)
def test_onnx_of_every_exit_computes_what_the_whole_model_does(name, tmp_path):
    whole = sharpened(VARIANTS[name])
    checkpoint = save(tmp_path / "averaged.pt", whole, VARIANTS[name])
    sizes, parameters = [], []
    for layer in CTC.exit_layers:
        model = load_model(checkpoint, exit_layer=layer)[0]
        parameters.append(sum(each.numel() for each in model.encoder.parameters()))
        for head in model.heads:
            paths = write(tmp_path, head_parts(model, head))
            assert [path.name.partition("-exit-")[2] for path in paths] == [f"{layer:02d}.onnx"] * len(paths)
            compare = compare_ctc if head == "ctc" else compare_transducer
            assert largest_difference(compare, [onnx_function(path) for path in paths], whole, layer) < TOLERANCE
            if head == "ctc":
                sizes.append(paths[0].stat().st_size)
                assert paths[0].read_bytes().count(b"ctc_heads") == 0
    # the layers above an exit are not in its file
    for (small, large), (few, many) in zip(itertools.pairwise(sizes), itertools.pairwise(parameters)):
        assert large - small > 0.9 * 4 * (many - few)


@pytest.mark.parametrize("opset", get_args(Opset))
def test_every_operator_set_that_is_offered(opset, tmp_path):
    model = sharpened(SHALLOW)
    paths = write(tmp_path, [*head_parts(model, "ctc"), *head_parts(model, "transducer")], opset=opset)
    for path in paths:
        loaded = onnx.load(path)
        assert loaded.ir_version <= 8 and [each.version for each in loaded.opset_import] == [opset]
        assert onnx_metadata(path)["opset"] == str(opset)
    ctc, *transducer = map(onnx_function, paths)
    assert largest_difference(compare_ctc, [ctc], model, 1) < TOLERANCE
    assert largest_difference(compare_transducer, transducer, model, 1) < TOLERANCE


def test_greedy_search_through_the_files_gives_the_same_hypotheses(tmp_path):
    model = sharpened(SHALLOW)
    [ctc] = map(onnx_function, write(tmp_path, head_parts(model, "ctc")))
    paths = write(tmp_path, head_parts(model, "transducer"))
    assert [onnx_metadata(path).get("context_size") for path in paths] == [None, "2", None]
    transducer = [onnx_function(path) for path in paths]
    for x, x_lens in FEATURES:
        with torch.no_grad():
            padded = torch.nn.functional.pad(x, (0, 0, 0, max(0, MIN_FRAMES - x.size(1))))
            [(exit_output, log_probs)] = model(padded, x_lens)
        expected = ctc_greedy_search(log_probs, exit_output.lengths)
        assert [(h.tokens, h.timestamps) for h in ctc_greedy_search(*ctc(x, x_lens))] == [
            (h.tokens, h.timestamps) for h in expected
        ]
        hypotheses = transducer_greedy(transducer, 2, x, x_lens)
        exit_last = exit_output.encoder_out, exit_output.lengths
        expected = transducer_greedy_search(model.decoder, model.joiner(1), *exit_last)
        assert [(h.tokens, h.timestamps) for h in hypotheses] == [(h.tokens, h.timestamps) for h in expected]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in expected], abs=1e-2)


def test_each_stage_continues_from_the_one_before(tmp_path):
    model = sharpened(CTC)
    paths = write(tmp_path, stage_parts(model))
    assert [path.name for path in paths] == [f"encoder-stage-{stage:02d}.onnx" for stage in (1, 2, 3)]
    assert [onnx_metadata(path)["exit_layer"] for path in paths] == ["1", "2", "4"]
    comparisons = compare_stages([onnx_function(path) for path in paths], model, run_pytorch(model, FEATURES))
    assert max(each.difference for each in comparisons) < TOLERANCE
    # a stage holds its own layers only: two and a parallel one, and not the front end
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < sizes[2] and sum(sizes) < 1.5 * write(tmp_path, head_parts(model, "ctc"))[0].stat().st_size


def test_models_that_cannot_be_exported_are_named():
    with pytest.raises(ExportError, match="--stages needs a CTC head"):
        stage_parts(build(dataclasses.replace(CTC, heads=("transducer",))))
    with pytest.raises(ExportError, match=r"U-Net .* use --format safetensors"):
        head_parts(build(UNET), "ctc")


def test_int8_is_smaller_close_and_says_so(tmp_path):
    config = dataclasses.replace(SHALLOW, d_model=96, feedforward_dim=192)
    model = build(config)
    (path,) = write(tmp_path, head_parts(model, "ctc"))
    write_int8(path, tmp_path / "int8.onnx")
    assert onnx_metadata(tmp_path / "int8.onnx") == {**onnx_metadata(path), "quantized": "int8"}
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in kinds and "ConvInteger" not in kinds
    assert 0 < largest_difference(compare_ctc, [onnx_function(tmp_path / "int8.onnx")], model, 1) < 1.0


class Branching(torch.nn.Module):
    def forward(self, x, x_lens):
        return (x if x_lens[0] > 20 else 2 * x), x_lens + 0


@pytest.mark.parametrize("writer", [write_onnx, write_torchscript])
def test_a_value_that_tracing_would_freeze_is_an_error(writer, tmp_path):
    part = Part("branching", Branching(), FEATURES[0], ("x", "x_lens"), ("y", "lengths"))
    with pytest.raises(ExportError, match="freeze"):
        writer(part, tmp_path / "branching", {})
    assert not list(tmp_path.iterdir())


def test_torchscript_runs_without_this_code(tmp_path):
    model = sharpened(SHALLOW)
    (part,) = head_parts(model, "ctc")
    write_torchscript(part, tmp_path / "model.torchscript", {"vocab_size": "11"})
    x, x_lens = FEATURES[0]
    torch.save((x, x_lens), tmp_path / "in.pt")
    code = (
        "import json, sys, torch\n"
        "sys.modules['splitformer'] = None\n"
        "extra = {'metadata.json': ''}\n"
        "model = torch.jit.load('model.torchscript', _extra_files=extra)\n"
        "assert json.loads(extra['metadata.json'])['exit_layer'] == '1'\n"
        "torch.save(model(*torch.load('in.pt')), 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    outputs = torch.load(tmp_path / "out.pt")
    assert largest_difference(compare_ctc, [lambda *inputs: outputs], model, 1, FEATURES[:1]) < TOLERANCE
    function = torch.jit.load(str(tmp_path / "model.torchscript"))
    functions = []
    for part in head_parts(model, "transducer"):
        write_torchscript(part, tmp_path / f"{part.stem}.torchscript", {})
        functions.append(torch.jit.load(str(tmp_path / f"{part.stem}.torchscript")))
    # few shapes, because torch compiles for each of the first ones
    assert largest_difference(compare_ctc, [function], model, 1, FEATURES[2:]) < TOLERANCE
    assert largest_difference(compare_transducer, functions, model, 1, FEATURES[:1]) < TOLERANCE


@pytest.mark.parametrize("config", [BOTH, UNET], ids=["conformer", "unet"])
def test_safetensors_restore_the_model(config, tmp_path):
    checkpoint = save(tmp_path / "averaged.pt", build(config), config)
    model, truncated, contents = load_model(checkpoint, exit_layer=config.exit_layers[-2:][0])
    path = tmp_path / "model.safetensors"
    write_safetensors(model, truncated, contents["tokens"], path, {"exit_layer": "2"})
    again, its_config, metadata = load_safetensors(path)
    assert its_config == truncated and metadata["tokens"] == contents["tokens"] and metadata["exit_layer"] == "2"
    assert not again.training and again.encoder.exit_layers == truncated.model.exit_layers
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    # a file from before model.feature_norm became model.cmvn
    state = {name.replace("encoder.cmvn.", "encoder.feature_norm."): x for name, x in model.state_dict().items()}
    texts = {"config": json.dumps(truncated.to_dict()).replace('"cmvn"', '"feature_norm"'), "tokens": "[]"}
    save_file(state, tmp_path / "old.safetensors", texts)
    assert load_safetensors(tmp_path / "old.safetensors")[1] == truncated
    for broken in (path.read_bytes()[:-100], b"", b"\x00" * 100):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(CheckpointError, match="export again"):
            load_safetensors(tmp_path / "broken")
    with pytest.raises(CheckpointError, match="there is no file"):
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


def test_a_comparison_counts_valid_frames_only():
    x, lengths = torch.zeros(2, 5, 3), torch.tensor([5, 2])
    other = x.clone()
    other[1, 1, 2] = 0.5
    other[1, 3, 0] = 9.0  # padding
    comparison = Comparison()
    comparison.add(other, lengths, x, lengths)
    assert (comparison.difference, comparison.frames, comparison.agreement) == (0.5, 7, 6 / 7)
    other[0, 0, 0] = float("nan")
    for wrong in ((other, lengths), (x, lengths.int()), (x, lengths + 1), (x[:, :4], lengths)):
        with pytest.raises(ExportError):
            Comparison().add(*wrong, x, lengths)


# ---- the command


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """(folder with averaged.pt, dev_cuts.jsonl.gz, speech.wav and lang_char; the model's configuration)"""
    folder = tmp_path_factory.mktemp("system")
    lang_dir = make_lang_dir(folder, make_texts(40))
    make_cuts(folder, "dev", make_texts(4))
    tokens = Tokenizer(lang_dir).tokens
    config = dataclasses.replace(BOTH, num_mel_bins=80, vocab_size=len(tokens), exit_layers=(1, 2, 3, 4))
    contents = {"config": Config(model=config).to_dict(), "tokens": tokens, "model": sharpened(config).state_dict()}
    save_checkpoint(folder / "averaged.pt", contents)
    samples = tone_speech("ABC DEF", np.random.default_rng(0))
    with wave.open(str(folder / "speech.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return folder, config


@pytest.fixture
def export(capsys):
    """Run the command in this process: (status, standard output, standard error)."""

    def export(folder, *options):
        flags = list(options)
        for name, path in (("--checkpoint", folder / "averaged.pt"), ("--lang-dir", folder / "lang_char")):
            flags += [] if name in flags else [name, path]
        try:
            status = command(run, list(map(str, flags)), prog="export")
        except SystemExit as error:  # options that cannot be parsed
            status = error.code
        return status, *capsys.readouterr()

    return export


def test_the_command_writes_every_file_it_is_asked_for(system, tmp_path, export):
    folder, config = system
    options = ["--exit", 1, 2, "--int8", "--stages", "--check", folder / "dev_cuts.jsonl.gz"]
    status, out, err = export(folder, *options, "--output-dir", tmp_path)
    assert status == 0, err
    stems = [f"{kind}-exit-{layer:02d}" for kind in ("model", "encoder", "decoder", "joiner") for layer in (1, 2)]
    stems += [f"encoder-stage-{stage:02d}" for stage in (1, 2)]
    expected = {f"{stem}{kind}.onnx" for stem in stems for kind in ("", ".int8")} | {"tokens.txt"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for name in sorted(expected - {"tokens.txt"}):
        line = next(line for line in out.splitlines() if line.startswith(str(tmp_path / name)))
        assert "MB" in line and "parameters" in line and "largest difference from PyTorch" in line
        assert ("same best symbol in" in line) == ("encoder-exit" not in line and "decoder" not in line)
    assert "on 4 utterances of --check" in out
    assert out.count("greedy int8: WER") == out.count("greedy fp32: WER") == 4
    assert (tmp_path / "tokens.txt").read_text() == (folder / "lang_char" / "tokens.txt").read_text()
    metadata = onnx_metadata(tmp_path / "model-exit-02.int8.onnx")
    assert metadata["checkpoint"] == checkpoint_id(folder / "averaged.pt")
    assert (metadata["exit_layer"], metadata["num_layers"], metadata["exit_layers"]) == ("2", "4", "1,2,3,4")
    assert (metadata["vocab_size"], metadata["model_type"]) == (str(config.vocab_size), "zipformer2_ctc")
    assert (metadata["cmvn"], metadata["feature_type"]) == ("utterance, in the graph", "fbank")


@pytest.mark.parametrize("kind", ["torchscript", "safetensors"])
def test_the_command_writes_other_formats(kind, system, tmp_path, export):
    folder, _ = system
    options = ["--exit", 1, "--head", "ctc", "--format", kind, "--check", folder / "speech.wav"]
    status, out, err = export(folder, *options, "--output-dir", tmp_path)
    assert status == 0, err
    assert f"model-exit-01.{kind}: " in out and (tmp_path / f"model-exit-01.{kind}").stat().st_size > 0


def test_a_file_that_computes_something_else_is_removed(tmp_path, capsys):
    whole, other = sharpened(SHALLOW), sharpened(SHALLOW)
    with torch.no_grad():
        other.ctc_heads["1"].bias[3] += 0.01
    writer = make_writer(tmp_path, whole)
    with pytest.raises(ExportError, match=r"differs from PyTorch by 0\.0.* \(removed: .*model-exit-01\.onnx\)"):
        writer.write_parts(head_parts(other, "ctc"), lambda *inputs, **batches: compare_ctc(*inputs, 1, **batches))
    assert not list(tmp_path.iterdir())


def test_an_8_bit_file_is_judged_by_its_best_symbols_on_speech(tmp_path, capsys):
    """A file that is wrong in most frames is removed if it was compared on speech, and only reported if on noise."""
    model = build(dataclasses.replace(SHALLOW, parallel_exits=()))
    with torch.no_grad():  # scores that differ by less than a step of 8 bits
        model.ctc_heads["1"].weight[:] = model.ctc_heads["1"].weight[0] + 1e-4 * torch.randn(11, CTC.d_model)
        model.ctc_heads["1"].bias.zero_()
    parts = head_parts(model, "ctc")

    def compare(functions, whole, batches):
        return compare_ctc(functions, whole, 1, batches)

    speech = Speech([(x[:1, :x_lens[0]], x_lens[:1]) for x, x_lens in FEATURES[:2]], [])
    [fp32] = make_writer(tmp_path, model, int8=True).write_parts(parts, compare)
    assert fp32.with_suffix(".int8.onnx").is_file() and "same best symbol in" in capsys.readouterr().out
    with pytest.raises(ExportError, match=r"best symbol in [\d.]+ % of frames, less than 90 %: export it without"):
        make_writer(tmp_path, model, speech, int8=True).write_parts(parts, compare)
    assert [path.name for path in tmp_path.iterdir()] == [fp32.name]


def make_writer(folder, whole, speech=None, **options):
    options = ExportOptions(folder / "averaged.pt", folder / "lang_char", folder, exit=(1,), **options)
    return Writer(options, whole, speech or Speech([], []), {"num_mel_bins": "20"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exit", 5], "no exit after layer 5; choose one of 1, 2, 3, 4"),
        ([], "give either --exit LAYER ... or --all-exits"),
        (["--exit", 2, "--all-exits"], "give either --exit LAYER ... or --all-exits"),
        (["--exit", 2, "--opset", 11], "12"),
        (["--exit", 2, "--format", "torchscript", "--int8"], "need --format onnx"),
        (["--exit", 2, "--check", "absent.wav"], "absent.wav"),
        (["--exit", 2, "--check", __file__], "cannot be read"),
        (["--exit", 2, "--checkpoint", __file__], "cannot be read"),
        (["--exit", 2, "--lang-dir", "absent"], "local/train_bpe.py"),
    ],
)
def test_bad_input_is_named(options, message, system, tmp_path, export):
    folder, _ = system
    status, _, err = export(folder, "--output-dir", tmp_path / "out", *options)
    assert status and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_model_lacks_is_named(tmp_path, export):
    tokens = Tokenizer(make_lang_dir(tmp_path, make_texts(40))).tokens
    config = Config(model=dataclasses.replace(CTC, vocab_size=len(tokens)), data=DataConfig(features="linear-mel"))
    contents = {"model": build(config.model).state_dict(), "config": config.to_dict(), "tokens": tokens}
    save_checkpoint(tmp_path / "averaged.pt", contents)
    status, _, err = export(tmp_path, "--exit", 2, "--head", "transducer", "--output-dir", tmp_path)
    assert status == 1 and "--head transducer: the model has ctc" in err
    # and a model of the released code's features says so
    status, _, err = export(tmp_path, "--exit", 1, "--format", "safetensors", "--output-dir", tmp_path)
    assert status == 0, err
    assert load_safetensors(tmp_path / "model-exit-01.safetensors")[2]["feature_type"] == "linear-mel"


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


STATISTICS = ("entropy", "entropy_non_blank", "posterior", "disagreement", "frames")


@pytest.fixture(scope="module")
def speech():
    """Features (T, C) of twelve utterances."""
    rng = np.random.default_rng(4)
    return [Fbank().extract(tone_speech(text, rng).astype(np.float32), RATE) for text in make_texts(12, seed=3)]


@pytest.fixture(scope="module")
def medians(system, speech):
    """{statistic: {layer: its median}}: with these as thresholds, some utterances exit and some do not."""
    model, config, _ = load_model(system[0] / "averaged.pt")
    passed = []
    for features in speech:
        meter = Meter(1, config.model.exit_layers, STATISTICS)
        with torch.no_grad():
            for exit_output, log_probs in model(torch.from_numpy(features)[None], torch.tensor([len(features)])):
                statistics = meter.measure(torch.zeros(1, dtype=torch.long), exit_output, log_probs)
        passed.append(torch.stack([statistics[name][0] for name in STATISTICS]))
    of_exits = torch.stack(passed).nanquantile(0.5, dim=0).tolist()
    return {name: dict(zip(config.model.exit_layers, values)) for name, values in zip(STATISTICS, of_exits)}


def learned(medians):
    """A policy whose probability is a half where all statistics are at their medians."""
    weights, means = {"entropy": 4.0, "disagreement": 1.0, "frames": 0.3}, {"entropy": 0.7, "frames": 3.0}
    means["disagreement"] = medians["disagreement"][2]
    intercepts = {}
    for layer in (1, 2, 3):
        values = {name: feature(name, torch.tensor(medians[name][layer])).item() for name in weights}
        values["disagreement"] = means["disagreement"] if layer == 1 else values["disagreement"]
        intercepts[layer] = -sum(weight * values[name] for name, weight in weights.items())
    return Learned(weights, means, intercepts, 0.5)


@pytest.mark.parametrize(
    ("make_policy", "exits_at"),
    [
        (lambda medians: Threshold("entropy", medians["entropy"]), None),
        (lambda medians: Threshold("entropy_non_blank", medians["entropy_non_blank"]), None),
        (lambda medians: Threshold("posterior", medians["posterior"]), None),
        (lambda medians: Patience(medians["disagreement"]), None),
        (lambda medians: Patience(medians["disagreement"], consecutive=2), None),
        (learned, None),
        (lambda medians: Fixed(2), 2),
        (lambda medians: Fixed(4), 4),
    ],
    ids=["entropy", "entropy_non_blank", "posterior", "patience-1", "patience-2", "learned", "fixed-2", "fixed-4"],
)
def test_stages_stop_where_the_policy_stops_torch(
    make_policy, exits_at, medians, speech, system, runner, stages_folder, tmp_path
):
    folder, _ = system
    model, config, _ = load_model(folder / "averaged.pt")
    policy, checkpoint = make_policy(medians), checkpoint_id(folder / "averaged.pt")
    FittedPolicy("p", policy, config.model.exit_layers, checkpoint, "greedy_search").save(tmp_path / "policy.json")
    stages = runner.Stages(stages_folder)
    stops = runner.load_policy(tmp_path / "policy.json", stages)
    layers = []
    for features in speech:
        meter = Meter(1, config.model.exit_layers, policy.needs)
        with torch.no_grad():
            (exited,) = exit_early(
                model,
                torch.from_numpy(features)[None],
                torch.tensor([len(features)]),
                lambda rows, exit_output, log_probs, meter=meter: policy.stops(
                    exit_output.layer, meter.measure(rows, exit_output, log_probs)
                ),
            )
        (expected,) = ctc_greedy_search(exited.log_probs, exited.exit_output.lengths)
        result = stages.recognise(features, stops)
        assert result == (exited.exit_output.layer, expected.tokens, expected.timestamps)
        layers.append(result.layer)
    assert set(layers) == {exits_at} if exits_at else len(set(layers)) > 1, layers


@pytest.fixture(scope="module")
def stages_folder(system, tmp_path_factory):
    folder, _ = system
    model = load_model(folder / "averaged.pt")[0]
    out = tmp_path_factory.mktemp("stages")
    metadata = {"checkpoint": checkpoint_id(folder / "averaged.pt"), "num_mel_bins": "80"}
    for part in stage_parts(model):
        write_onnx(part, out / f"{part.stem}.onnx", metadata)
    (out / "tokens.txt").write_text((folder / "lang_char" / "tokens.txt").read_text())
    return out


def test_the_runner_needs_nothing_but_numpy_and_onnxruntime(system, stages_folder, repo_root):
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'lhotse', 'splitformer', 'onnx', 'k2', 'scipy', 'soundfile']))\n"
        "sys.argv.pop(0)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = [repo_root / "examples" / "run_stages.py", "--stages", stages_folder, system[0] / "speech.wav"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\tlayer 4\t" in done.stdout


def test_the_runner_computes_the_features_of_lhotse(runner):
    rng = np.random.default_rng(2)
    for samples in (tone_speech("ABE HG", rng), rng.uniform(-1, 1, 12345), np.zeros(4000)):
        samples = samples.astype(np.float32)
        expected = Fbank().extract(samples, RATE)
        features = runner.fbank(samples)
        assert features.shape == expected.shape
        np.testing.assert_allclose(features, expected, atol=5e-3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "deadline"}, "the policy p cannot run here; stages run .*calibrate --policy learned"),
        (
            {"kind": "learned", "weights": {"entropy": 1.0, "nbest_posterior": 1.0}},
            "the policy p reads nbest_posterior; stages run .*calibrate --policy learned",
        ),
        ({"kind": "threshold", "statistic": "nbest_posterior", "thresholds": {}}, "reads nbest_posterior"),
    ],
)
def test_a_policy_that_stages_cannot_run_is_refused_with_the_remedy(policy, message, runner, stages_folder, tmp_path):
    stages = runner.Stages(stages_folder)
    contents = {"title": "p", "checkpoint": stages.metadata["checkpoint"], "policy": policy}
    (tmp_path / "policy.json").write_text(json.dumps(contents))
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        runner.load_policy(tmp_path / "policy.json", stages)


def test_files_that_do_not_fit_the_stages_are_named(runner, stages_folder, tmp_path):
    (tmp_path / "policy.json").write_text(json.dumps({"checkpoint": "0" * 16, "policy": {"kind": "fixed", "layer": 1}}))
    with pytest.raises(SystemExit, match="fitted for checkpoint 0000"):
        runner.load_policy(tmp_path / "policy.json", runner.Stages(stages_folder))
    with pytest.raises(SystemExit, match="splitformer export --stages"):
        runner.Stages(tmp_path)
    with pytest.raises(SystemExit, match=r"policy\.json cannot be read as WAV"):
        runner.read_wav(tmp_path / "policy.json")
    [part, *_] = stage_parts(build(CTC))
    write_onnx(part, tmp_path / "encoder-stage-01.onnx", {"feature_type": "linear-mel"})
    with pytest.raises(SystemExit, match="takes linear-mel features"):
        runner.Stages(tmp_path)
