"""Recognise speech stage after stage and stop when an exit policy says so, with nothing but numpy and onnxruntime.

    python examples/run_stages.py --stages DIR [--policy policy.json] [--int8] speech.wav [more.wav ...]

DIR holds encoder-stage-*.onnx and tokens.txt of `bin/export --stages`; policy.json is from `bin/calibrate`, for CTC and
made for the same checkpoint. Audio is WAV, 16 kHz, 16 bits, one channel. One file, to be copied to the device and
changed.
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
STATISTICS = ("entropy", "entropy_non_blank", "posterior", "disagreement")


class Result(NamedTuple):
    """layer: of the exit at which the utterance left; timestamps: the output frames at which its tokens start."""

    layer: int
    tokens: list[int]
    timestamps: list[int]


Stops = Callable[[int, np.ndarray, "list[list[int]]"], bool]
"""(exit layer, its log_probs (T', V), the hypotheses of all exits so far, this one's last) to stop or not."""


class Stages:
    """The files encoder-stage-01.onnx ... of a folder; each is loaded when an utterance first gets there."""

    def __init__(self, folder: Path, int8: bool = False, threads: int = 1) -> None:
        kind = ".int8.onnx" if int8 else ".onnx"
        self.files = sorted(f for f in folder.glob(f"encoder-stage-??{kind}"))
        if not self.files:
            raise SystemExit(f"{folder} has no encoder-stage-01{kind}; make it with bin/export --stages")
        self.threads = threads
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}
        self.metadata = self._session(0).get_modelmeta().custom_metadata_map

    def _session(self, stage: int) -> onnxruntime.InferenceSession:
        if stage not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            self._sessions[stage] = onnxruntime.InferenceSession(
                str(self.files[stage]), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[stage]

    def recognise(self, features: np.ndarray, stops: Stops) -> Result:
        """Features (T, C), float32, of one utterance through as many stages as `stops` wants."""
        state = [features[np.newaxis], np.array([len(features)], dtype=np.int64)]
        hypotheses: list[list[int]] = []
        sound: Result | None = None  # the last exit without NaN
        for stage in range(len(self.files)):
            session = self._session(stage)
            names = [each.name for each in session.get_inputs()]
            hidden, lengths, log_probs = session.run(None, dict(zip(names, state)))
            state = [hidden, lengths]
            layer = int(session.get_modelmeta().custom_metadata_map["exit_layer"])
            heard = log_probs[0, : lengths[0]]
            if np.isnan(heard).any():
                continue
            sound = Result(layer, *greedy_search(heard))
            hypotheses.append(sound.tokens)
            if len(heard) == 0 or stops(layer, heard, hypotheses):
                break
        if sound is None:
            raise ValueError("all exits hold NaN: are the features right?")
        return sound


def greedy_search(log_probs: np.ndarray) -> tuple[list[int], list[int]]:
    """The best symbol of each frame of (T', V), repetitions merged, blanks dropped: tokens and their frames."""
    best = log_probs.argmax(axis=1)
    before = np.concatenate([[BLANK], best[:-1]])
    frames = np.flatnonzero((best != BLANK) & (best != before))
    return best[frames].tolist(), frames.tolist()


# ---- policies


def load_policy(path: Path, stages: Stages) -> Stops:
    """What `bin/calibrate` wrote, as a function that answers stop or go on."""
    fitted = json.loads(path.read_text(encoding="utf-8"))
    if fitted["checkpoint"] != stages.metadata["checkpoint"]:
        raise SystemExit(
            f"{path} was fitted for checkpoint {fitted['checkpoint']}, and the stages are of "
            f"{stages.metadata['checkpoint']}: export or fit again"
        )
    return make_policy(fitted["policy"])


def make_policy(policy: dict[str, Any]) -> Stops:
    """The `policy` of a policy.json."""
    kind = policy["kind"]
    if kind == "fixed":
        return lambda layer, log_probs, hypotheses: layer >= policy["layer"]
    if kind == "threshold":
        thresholds, name = policy["thresholds"], policy["statistic"]
        _check_known([name])
        return lambda layer, *heard: _at_most(statistic(name, *heard), thresholds.get(str(layer)))
    if kind == "patience":
        wanted = policy["consecutive"]

        def patient(layer: int, log_probs: np.ndarray, hypotheses: list[list[int]]) -> bool:
            limit = policy["thresholds"].get(str(layer))
            pairs = list(itertools.pairwise(hypotheses))[-wanted:]
            return len(pairs) == wanted and all(_at_most(disagreement(*pair), limit) for pair in pairs)

        return patient
    if kind == "learned":
        _check_known(policy["weights"])

        def learned(layer: int, *heard: Any) -> bool:
            logit = policy["intercepts"].get(str(layer))
            if logit is None:
                return False
            for name, weight in policy["weights"].items():
                value = statistic(name, *heard)
                if name != "disagreement":
                    value = math.log(max(value, 0.0) + 1e-4)
                logit += weight * (policy["means"][name] if math.isnan(value) else value)
            return 1.0 / (1.0 + math.exp(-logit)) <= policy["probability"]

        return learned
    raise SystemExit(f"policy of kind {kind!r}: this example knows fixed, threshold, patience and learned")


def _check_known(names: Any) -> None:
    unknown = [name for name in names if name not in STATISTICS]
    if unknown:
        raise SystemExit(f"the policy reads {', '.join(unknown)}; this example computes {', '.join(STATISTICS)}")


def _at_most(value: float, limit: float | None) -> bool:
    return limit is not None and value <= limit


def statistic(name: str, log_probs: np.ndarray, hypotheses: list[list[int]]) -> float:
    """How doubtful an exit is, from its log_probs (T', V); NaN for the disagreement of the first."""
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
    """Edit distance over the longer length, rounded as the thresholds were when they were fitted."""
    row = list(range(len(now) + 1))
    for i, a in enumerate(before, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(now, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return float(np.float32(row[-1] / max(len(before), len(now), 1)))


# ---- audio and text


def read_wav(path: Path) -> np.ndarray:
    """(samples,) within -1 and 1."""
    with wave.open(str(path), "rb") as file:
        shape = (file.getframerate(), file.getsampwidth(), file.getnchannels())
        if shape != (16000, 2, 1):
            raise SystemExit(f"{path}: {shape[0]} Hz, {8 * shape[1]} bits, {shape[2]} channels; expected 16000, 16, 1")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768.0


def fbank(samples: np.ndarray, num_mel_bins: int = 80) -> np.ndarray:
    """(T, C) log-mel filterbank as Kaldi and Lhotse have it: 25 ms every 10 ms, mirrored at the ends, no dither."""
    size, shift, fft = 400, 160, 512
    count = (len(samples) + shift // 2) // shift
    places = (np.arange(count) * shift + shift // 2 - size // 2)[:, np.newaxis] + np.arange(size)
    places = np.where(places < 0, -1 - places, places)
    places = np.where(places >= len(samples), 2 * len(samples) - 1 - places, places)
    frames = samples[places].astype(np.float64)
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
    parser.add_argument("--policy", type=Path, help="policy.json (default: all stages)")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("audio", type=Path, nargs="+")
    args = parser.parse_args()
    stages = Stages(args.stages, args.int8, args.threads)
    stops = load_policy(args.policy, stages) if args.policy else lambda *heard: False
    lines = (args.stages / "tokens.txt").read_text(encoding="utf-8").split("\n")
    tokens = [line.rpartition(" ")[0] for line in lines if line]
    for path in args.audio:
        found = stages.recognise(fbank(read_wav(path), int(stages.metadata["num_mel_bins"])), stops)
        text = "".join(tokens[each] for each in found.tokens).replace("▁", " ").strip()
        print(f"{path}\tlayer {found.layer}\t{text}")


if __name__ == "__main__":
    sys.exit(main())
