"""Exported files in the released sherpa-onnx package: the same tokens at the same times as our greedy searches.

A small model that has learned to spell tones is exported at every exit. Each side computes its own features.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from rapidfuzz.distance import Levenshtein

from splitformer.checkpoint import load_model, save_checkpoint
from splitformer.config import Config, LossConfig, ModelConfig
from splitformer.data.features import FbankOptions, extract, make_extractor
from splitformer.data.tokenizer import Tokenizer
from splitformer.decoding.greedy import ctc_greedy_search, transducer_greedy_search
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.model.asr import AsrModel
from tests.factories import make_lang_dir, make_texts, tone_speech

pytestmark = pytest.mark.slow

LAYERS = (1, 2)
STEPS, BATCH = 140, 12
# The program of a user, run in its own process, because sherpa-onnx ends it if metadata are missing.
CLIENT = """
import json, sys
import numpy as np
import sherpa_onnx

folder, layers, batch_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
waves = np.load(folder + "/waves.npz")
waves = [waves[name] for name in waves.files]
outputs = {}
for layer in layers:
    def file(part):
        return f"{folder}/{part}-exit-{layer:02d}.onnx"
    tokens = folder + "/tokens.txt"
    recognizers = {
        "ctc": sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model=file("model"), tokens=tokens),
        "transducer": sherpa_onnx.OfflineRecognizer.from_transducer(
            encoder=file("encoder"), decoder=file("decoder"), joiner=file("joiner"), tokens=tokens
        ),
    }
    for head, recognizer in recognizers.items():
        results = []
        for i in range(0, len(waves), batch_size):
            streams = []
            for wave in waves[i : i + batch_size]:
                streams.append(recognizer.create_stream())
                streams[-1].accept_waveform(16000, wave)
            recognizer.decode_streams(streams)
            results += [(s.result.text, list(s.result.tokens), list(s.result.timestamps)) for s in streams]
        outputs[f"{head} {layer}"] = results
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder with exports and waves.npz, {"head layer": our hypotheses}, the tokenizer, the transcripts)"""
    folder = tmp_path_factory.mktemp("sherpa")
    texts = make_texts(96)
    tokenizer = Tokenizer(make_lang_dir(folder, texts))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        cmvn="utterance",
        d_model=32,
        num_heads=4,
        feedforward_dim=64,
        conv_kernel=7,
        num_layers=2,
        exit_layers=LAYERS,
        parallel_exits=(1, 2),
        dropout=0.0,
        heads=("ctc", "transducer"),
        decoder_dim=32,
        joiner_dim=32,
    )
    torch.manual_seed(5)
    model = AsrModel(config)
    rng = np.random.default_rng(5)
    learn(model, *features_of([tone_speech(text, rng).astype(np.float32) for text in texts]), tokenizer, texts)
    contents = {"model": model.state_dict(), "config": Config(model=config).to_dict(), "tokens": tokenizer.tokens}
    save_checkpoint(folder / "averaged.pt", contents)
    command = [sys.executable, "-m", "splitformer.bin.export", "--checkpoint", folder / "averaged.pt", "--all-exits"]
    command += ["--lang-dir", folder / "lang_char", "--output-dir", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    texts = make_texts(14, seed=9)
    waves = [tone_speech(text, rng).astype(np.float32) for text in texts]
    waves[5], texts[5] = np.tile(waves[5], 3), " ".join(3 * [texts[5]])  # much longer than the others of its batch
    return folder, greedy_hypotheses(folder, folder, waves), tokenizer, texts


def features_of(waves):
    found = [torch.from_numpy(each) for each in extract(make_extractor(FbankOptions()), waves)]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), torch.tensor([len(each) for each in found])


def greedy_hypotheses(folder: Path, output: Path, waves: list[np.ndarray]) -> dict[str, list]:
    """Return {"head layer": greedy hypotheses} of the checkpoint in `folder`, and write the waves to `output`."""
    np.savez(output / "waves.npz", *waves)
    hypotheses = {}
    model = load_model(folder / "averaged.pt")[0]
    with torch.no_grad():
        for exit_output in model.encoder(*features_of(waves)):
            layer, lengths = exit_output.layer, exit_output.lengths
            hypotheses[f"ctc {layer}"] = ctc_greedy_search(model.ctc_log_probs(exit_output), lengths)
            hypotheses[f"transducer {layer}"] = transducer_greedy_search(
                model.decoder, model.joiner(layer), exit_output.encoder_out, lengths
            )
    return hypotheses


def learn(model, x, x_lens, tokenizer, texts):
    """Train for some seconds: the heads need not be good, but they must emit tokens."""
    labels = [torch.tensor(tokenizer.encode(text)) for text in texts]
    y = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True)
    y_lens = torch.tensor([len(each) for each in labels])
    x[:] = x.clamp(min=-16.0)
    config = LossConfig(warm_steps=20, prune_range=4)
    loss = MultiExitLoss(model, config, transducer_from=STEPS // 2)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=4e-3)
    loss.train()
    for step in range(STEPS):
        rows = torch.arange(BATCH) + BATCH * (step % (len(texts) // BATCH))
        optimizer.zero_grad()
        total = loss(x[rows, : x_lens[rows].max()], x_lens[rows], y[rows], y_lens[rows], step).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 2.0)
        optimizer.step()
    model.eval()


def run_client(folder: Path, layers, batch_size: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CLIENT, str(folder), json.dumps(layers), str(batch_size)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_sherpa_gives_the_same_tokens_at_the_same_times(exported, batch_size):
    folder, ours, tokenizer, texts = exported
    check_client(folder, ours, tokenizer, batch_size)
    for name in ("ctc 2", "transducer 2"):  # both recognise the speech
        wrong = sum(Levenshtein.distance(h.tokens, tokenizer.encode(text)) for h, text in zip(ours[name], texts))
        assert wrong < 0.4 * sum(len(tokenizer.encode(text)) for text in texts), name


def check_client(folder: Path, ours: dict[str, list], tokenizer: Tokenizer, batch_size: int) -> None:
    done = run_client(folder, LAYERS, batch_size)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(ours)
    for name, results in found.items():
        for (text, tokens, timestamps), hypothesis in zip(results, ours[name], strict=True):
            # sherpa-onnx writes the beginning of a word as a space
            assert tokens == [tokenizer.tokens[each].replace("▁", " ") for each in hypothesis.tokens], name
            assert text.split() == tokenizer.decode(hypothesis.tokens).split()
            assert timestamps == pytest.approx([0.04 * each for each in hypothesis.timestamps], abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_sherpa_gives_the_same_tokens_on_real_speech(exported, shared, tmp_path, batch_size):
    """Five utterances of LibriSpeech: a model of tones recognises nonsense, but the same nonsense."""
    folder, _, tokenizer, _ = exported
    waves = [soundfile.read(path, dtype="float32")[0] for path in sorted(shared.rglob("LibriSpeech/**/*.flac"))]
    assert len(waves) == 5
    for path in [*folder.glob("*.onnx"), folder / "tokens.txt"]:
        (tmp_path / path.name).symlink_to(path)
    ours = greedy_hypotheses(folder, tmp_path, waves)
    assert all(sum(len(hypothesis.tokens) for hypothesis in each) > 50 for each in ours.values())
    check_client(tmp_path, ours, tokenizer, batch_size)


def test_sherpa_ends_the_process_if_metadata_are_missing(exported, tmp_path):
    """This is why the files have them: no exception is raised that could be caught."""
    folder = exported[0]
    for path in [*folder.glob("*.onnx"), folder / "tokens.txt", folder / "waves.npz"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    decoder = onnx.load(tmp_path / "decoder-exit-02.onnx")
    del decoder.metadata_props[:]
    onnx.save(decoder, tmp_path / "decoder-exit-02.onnx")
    done = run_client(tmp_path, [2], 1)
    assert done.returncode != 0 and "does not exist in the metadata" in done.stderr
