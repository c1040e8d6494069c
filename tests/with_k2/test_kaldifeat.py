"""kaldifeat and Lhotse compute the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import Recording, SupervisionSegment

from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.manifests import write_split
from splitformer.data.features import FbankOptions, extract, make_extractor
from splitformer.data.manifests import read_cuts, use_soundfile

pytest.importorskip("kaldifeat", reason="setup.sh builds kaldifeat only where it finds a C++ compiler")
RATE = 16000


def waveforms() -> list[np.ndarray]:
    """Noise of varying level and colour, and of several lengths, including odd ones."""
    rng = np.random.default_rng(1)
    return [
        (np.cumsum(rng.standard_normal(n)) * 0.001 + 0.01 * k * rng.standard_normal(n)).astype(np.float32)
        for k, n in enumerate((16000, 16001, 8123, 400, 48079))
    ]


def test_both_extractors_agree() -> None:
    batch = waveforms()
    by_lhotse = extract(make_extractor(FbankOptions("lhotse")), batch)
    by_kaldifeat = extract(make_extractor(FbankOptions("kaldifeat")), batch)
    for ours, theirs in zip(by_lhotse, by_kaldifeat):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_both_agree_on_real_speech(shared: Path) -> None:
    use_soundfile()
    batch = [soundfile.read(path, dtype="float32")[0] for path in sorted((shared / "data/LibriSpeech").rglob("*.flac"))]
    by_lhotse = extract(make_extractor(FbankOptions("lhotse")), batch)
    by_kaldifeat = extract(make_extractor(FbankOptions("kaldifeat")), batch)
    assert len(batch) == 5
    for ours, theirs in zip(by_lhotse, by_kaldifeat):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_kaldifeat_prepares_a_split(tmp_path: Path) -> None:
    pairs = []
    for number, samples in enumerate(waveforms()):
        path = tmp_path / f"u{number}.flac"
        soundfile.write(path, samples, RATE)
        recording = Recording.from_file(path)
        pairs.append((recording, [SupervisionSegment(path.stem, path.stem, 0.0, recording.duration, 0, "NOISE")]))
    files = tmp_path / "recordings.jsonl.gz", tmp_path / "supervisions.jsonl.gz"
    write_split(pairs, *files)
    stored = {}
    for name in ("lhotse", "kaldifeat"):
        compute_fbank(
            *files, tmp_path / f"{name}.jsonl.gz", tmp_path / name, FbankOptions(name), num_jobs=2, speed_perturb=True
        )
        stored[name] = {cut.id: cut.load_features() for cut in read_cuts(tmp_path / f"{name}.jsonl.gz")}
    assert stored["lhotse"].keys() == stored["kaldifeat"].keys() and len(stored["lhotse"]) == 15 - 1
    for cut, features in stored["lhotse"].items():
        np.testing.assert_allclose(features, stored["kaldifeat"][cut], atol=2**-4)  # both rounded by lilcom
