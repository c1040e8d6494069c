"""Helpers of the transcription tests: tones with pauses, and small models with random weights that output letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from splitformer.checkpoint import load_model, save_checkpoint
from splitformer.config import Config, DataConfig, ModelConfig
from splitformer.decoding.greedy import ctc_greedy_search
from splitformer.model.asr import AsrModel

RATE = 16000
TOKENS = ["<blk>", "<sos/eos>", "<unk>", "▁", "A", "B", "C", "D", "E"]


def bursts(seconds: float, seed: int = 0, rate: int = RATE, pause: float = 0.3) -> np.ndarray:
    """Tones of half a second at changing pitch, with pauses; (n,) int16."""
    random = np.random.default_rng(seed)
    time = np.arange(round(0.5 * rate)) / rate
    parts, length = [], 0
    while length < seconds * rate:
        tone = 0.3 * np.sin(2 * np.pi * random.uniform(150, 3000) * time) * np.hanning(len(time))
        parts += [tone, np.zeros(round(pause * rate))]
        length += len(parts[-1]) + len(tone)
    samples = np.concatenate(parts)[: round(seconds * rate)] + random.normal(0, 1e-4, round(seconds * rate))
    return np.round(samples * 32767).astype(np.int16)


def write_checkpoint(path: Path, features: str = "fbank", **shape: object) -> Path:
    """Write a checkpoint with exits after layers 1, 2 and 3 and random weights; it never outputs a special token."""
    torch.manual_seed(3)
    sizes = {
        "vocab_size": len(TOKENS), "d_model": 32, "num_heads": 2, "feedforward_dim": 64, "conv_kernel": 7,
        "num_layers": 3, "exit_layers": (1, 2, 3), "parallel_exits": (), "cmvn": "utterance", "decoder_dim": 16,
        "joiner_dim": 16,
    }  # fmt: skip
    config = Config(model=ModelConfig(**{**sizes, **shape}), data=DataConfig(features=features))
    model = AsrModel(config.model)
    for head in getattr(model, "ctc_heads", {}).values():
        head.bias.data[1:3] = -100.0
    for joiner in getattr(model, "joiners", {}).values():
        joiner.output_linear.bias.data[1:3] = -100.0
    contents = {"model": model.state_dict(), "config": config.to_dict(), "tokens": TOKENS}
    contents |= {"progress": {"epoch": 1, "step": 1, "seconds": 1.0}, "seed": 1, "world_size": 1, "device": "none"}
    save_checkpoint(path, contents)
    return path


def greedy_tokens(checkpoint: Path, features: np.ndarray, exit: int = 3) -> tuple[list[str], list[float]]:
    """CTC's greedy tokens for features (T, C) at an exit of the whole model, and the seconds at which they start."""
    model, _, _ = load_model(checkpoint)
    x = torch.from_numpy(features)[None]
    with torch.no_grad():
        outputs = {output.layer: (output, log_probs) for output, log_probs in model(x, torch.tensor([x.shape[1]]))}
        [hypothesis] = ctc_greedy_search(outputs[exit][1], outputs[exit][0].lengths)
    return [TOKENS[token] for token in hypothesis.tokens], [0.04 * frame for frame in hypothesis.timestamps]


def words_of(tokens: list[str]) -> str:
    return " ".join("".join(tokens).replace("▁", " ").split())
