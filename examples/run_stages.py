"""Recognise speech stage by stage and stop where an exit policy decides, with numpy and onnxruntime alone.

    python examples/run_stages.py --stages DIR [--policy policy.json] [--int8] speech.wav [more.wav ...]

DIR holds the files encoder-stage-*.onnx and tokens.txt of `export --stages`; policy.json is a policy that `calibrate`
fitted for the same checkpoint. Audio is WAV, 16 kHz, 16 bits, one channel. This is one file, to be copied to the device
and changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

BLANK = 0
STATISTICS = ("entropy", "entropy_non_blank", "posterior", "disagreement", "frames")
REMEDY = """; stages run the policies fixed, entropy, entropy_non_blank, posterior, patience and learned. Fit one:
  python -m splitformer calibrate --policy learned --method greedy_search --checkpoint EXP/averaged.pt \\
    --cuts dev=DEV_CUTS --lang-dir LANG --output policy-learned.json"""


class Result(NamedTuple):
    """layer: encoder layer of the exit; timestamps: output frames at which the tokens start."""

    layer: int
    tokens: list[int]
    timestamps: list[int]


Stops = Callable[[int, np.ndarray, "list[list[int]]"], bool]
"""(layer of the exit, its log_probs (T', V), hypotheses of all exits so far including this one) to stop or not."""


class Stages:
    """The files encoder-stage-01.onnx ... of a folder; each is loaded when an utterance first reaches it."""

    def __init__(self, folder: Path, int8: bool = False, threads: int = 1) -> None:
        suffix = ".int8.onnx" if int8 else ".onnx"
        self.files = sorted(folder.glob(f"encoder-stage-??{suffix}"))
        if not self.files:
            raise SystemExit(f"{folder} has no encoder-stage-01{suffix}; write it with `splitformer export --stages`")
        self.threads = threads
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self.metadata = self._session(0).get_modelmeta().custom_metadata_map
        if self.metadata.get("feature_type", "fbank") != "fbank":
            raise SystemExit(f"{folder}: the model takes {self.metadata['feature_type']} features; this computes fbank")

    def _session(self, stage: int) -> onnxruntime.InferenceSession:
        if stage not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            self._sessions[stage] = onnxruntime.InferenceSession(
                str(self.files[stage]), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[stage]

    def recognise(self, features: np.ndarray, stops: Stops) -> Result:
        """Run features (T, C), float32, of one utterance through as many stages as `stops` asks for.

        A stage whose output holds NaN is passed over.
        """
        state = [features[np.newaxis], np.array([len(features)], dtype=np.int64)]
        hypotheses: list[list[int]] = []
        result: Result | None = None
        for stage in range(len(self.files)):
            session = self._session(stage)
            names = [each.name for each in session.get_inputs()]
            hidden, lengths, log_probs = session.run(None, dict(zip(names, state)))
            state = [hidden, lengths]
            layer = int(session.get_modelmeta().custom_metadata_map["exit_layer"])
            log_probs = log_probs[0, : lengths[0]]
            if np.isnan(log_probs).any():
                continue
            result = Result(layer, *greedy_search(log_probs))
            hypotheses.append(result.tokens)
            if len(log_probs) == 0 or stops(layer, log_probs, hypotheses):
                break
        if result is None:
            raise ValueError("the outputs of all stages hold NaN: check the features")
        return result


def greedy_search(log_probs: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the tokens of the best path through (T', V), without repetitions and blanks, and their frames."""
    best = log_probs.argmax(axis=1)
    before = np.concatenate([[BLANK], best[:-1]])
    frames = np.flatnonzero((best != BLANK) & (best != before))
    return best[frames].tolist(), frames.tolist()


# ---- policies


def load_policy(path: Path, stages: Stages) -> Stops:
    """Return the policy of a policy.json as a function that says whether to stop."""
    fitted = json.loads(path.read_text(encoding="utf-8"))
    if fitted["checkpoint"] != stages.metadata["checkpoint"]:
        raise SystemExit(
            f"{path} was fitted for checkpoint {fitted['checkpoint']}, but the stages are of "
            f"{stages.metadata['checkpoint']}: export or fit again"
        )
    policy, title = fitted["policy"], fitted["title"]
    read = [policy["statistic"]] if "statistic" in policy else policy.get("weights", [])
    unknown = [name for name in read if name not in STATISTICS]
    if unknown:
        raise SystemExit(f"{path}: the policy {title} reads {', '.join(unknown)}{REMEDY}")
    if policy["kind"] not in ("fixed", "threshold", "patience", "learned"):
        raise SystemExit(f"{path}: the policy {title} cannot run here{REMEDY}")
    return make_policy(policy)


def make_policy(policy: dict[str, Any]) -> Stops:
    """Return the function of the entry `policy` in a policy.json."""
    kind = policy["kind"]
    if kind == "fixed":
        return lambda layer, log_probs, hypotheses: layer >= policy["layer"]
    thresholds = policy.get("thresholds", {})
    if kind == "threshold":
        return lambda layer, *outputs: _at_most(statistic(policy["statistic"], *outputs), thresholds.get(str(layer)))
    if kind == "patience":
        wanted = policy["consecutive"]

        def patient(layer: int, log_probs: np.ndarray, hypotheses: list[list[int]]) -> bool:
            pairs = list(itertools.pairwise(hypotheses))[-wanted:]
            limit = thresholds.get(str(layer))
            return len(pairs) == wanted and all(_at_most(disagreement(*pair), limit) for pair in pairs)

        return patient

    def learned(layer: int, *outputs: Any) -> bool:
        logit = policy["intercepts"].get(str(layer))
        if logit is None:
            return False
        for name, weight in policy["weights"].items():
            value = statistic(name, *outputs)
            if name != "disagreement":
                value = math.log(max(value, 0.0) + 1e-4)
            logit += weight * (policy["means"][name] if math.isnan(value) else value)
        return 1.0 / (1.0 + math.exp(-logit)) <= policy["probability"]

    return learned


def _at_most(value: float, limit: float | None) -> bool:
    return limit is not None and value <= limit


def statistic(name: str, log_probs: np.ndarray, hypotheses: list[list[int]]) -> float:
    """Return a statistic of an exit from its log_probs (T', V); NaN for the disagreement of the first exit."""
    if name == "frames":
        return float(len(log_probs))
    if name == "disagreement":
        return disagreement(*hypotheses[-2:]) if len(hypotheses) > 1 else math.nan
    if name == "posterior":
        return float((1.0 - np.exp(log_probs.max(axis=1))).mean())
    entropy = -(np.exp(log_probs) * np.maximum(log_probs, np.finfo(np.float32).min)).sum(axis=1)
    spoken = log_probs.argmax(axis=1) != BLANK
    if name == "entropy_non_blank" and spoken.any():
        entropy = entropy[spoken]
    return float(entropy.mean())


def disagreement(before: list[int], now: list[int]) -> float:
    """Return the edit distance over the longer length, rounded to float32 as in the fit of the thresholds."""
    row = list(range(len(now) + 1))
    for i, a in enumerate(before, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(now, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return float(np.float32(row[-1] / max(len(before), len(now), 1)))


# ---- audio and text


def read_wav(path: Path) -> np.ndarray:
    """Return samples (S,) between -1 and 1."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, size, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            samples = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise SystemExit(f"{path} cannot be read as WAV: {error}") from error
    if (rate, size, channels) != (16000, 2, 1):
        raise SystemExit(f"{path}: {rate} Hz, {8 * size} bits, {channels} channels; expected 16000, 16, 1")
    return np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768.0


def fbank(samples: np.ndarray, num_mel_bins: int = 80) -> np.ndarray:
    """Return (T, C) log-mel features as Lhotse computes them: 25 ms every 10 ms, mirrored at the ends, no dither."""
    size, shift, fft = 400, 160, 512
    count = (len(samples) + shift // 2) // shift
    index = (np.arange(count) * shift + shift // 2 - size // 2)[:, np.newaxis] + np.arange(size)
    index = np.where(index < 0, -1 - index, index)
    index = np.where(index >= len(samples), 2 * len(samples) - 1 - index, index)
    frames = samples[index].astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)
    frames -= 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames *= (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / (size - 1))) ** 0.85
    power = np.abs(np.fft.rfft(frames, fft)) ** 2

    def mel(hertz: Any) -> Any:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(16000 / 2 - 400.0), num_mel_bins + 2)[:, np.newaxis]
    bins = mel(np.arange(fft // 2 + 1) * 16000 / fft)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0.0, np.minimum(rising, falling))
    return np.log(np.maximum(power @ weights.T, np.finfo(np.float32).eps)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=Path, required=True, metavar="DIR")
    parser.add_argument("--policy", type=Path, help="policy.json (default: run all stages)")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("audio", type=Path, nargs="+")
    args = parser.parse_args()
    stages = Stages(args.stages, args.int8, args.threads)
    stops = load_policy(args.policy, stages) if args.policy else lambda *outputs: False
    lines = (args.stages / "tokens.txt").read_text(encoding="utf-8").split("\n")
    tokens = [line.rpartition(" ")[0] for line in lines if line]
    for path in args.audio:
        result = stages.recognise(fbank(read_wav(path), int(stages.metadata["num_mel_bins"])), stops)
        text = "".join(tokens[each] for each in result.tokens).replace("▁", " ").strip()
        print(f"{path}\tlayer {result.layer}\t{text}")


if __name__ == "__main__":
    sys.exit(main())
