"""The front end of the published code, from wave file to batch. It needs torchaudio, which is installed with k2."""

from __future__ import annotations

from pathlib import Path

import lilcom
import numpy as np
import pytest
import soundfile
import torch
from lhotse import Recording, SupervisionSegment
from lhotse.features import FeatureExtractor
from safetensors.torch import load_file

from splitformer.corpora.fbank import compute_fbank
from splitformer.corpora.manifests import write_split
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.data.features import FbankOptions, LinearMel, LinearMelConfig
from splitformer.data.tokenizer import Tokenizer
from tests.factories import make_lang_dir
from tests.golden import KINDS, load_released_model


def store(folder: Path, waves: list[np.ndarray]) -> Path:
    """Store features of these recordings and return their cuts."""
    pairs = []
    for number, wave in enumerate(waves):
        path = folder / f"u{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, 16000, subtype="FLOAT")
        recording = Recording.from_file(path)
        pairs.append((recording, [SupervisionSegment(path.stem, path.stem, 0.0, recording.duration, 0, "AB")]))
    files = folder / "recordings.jsonl.gz", folder / "supervisions.jsonl.gz"
    write_split(pairs, *files)
    compute_fbank(*files, folder / "cuts.jsonl.gz", folder / "feats", FbankOptions("linear-mel"))
    return folder / "cuts.jsonl.gz"


def test_stored_features_are_those_of_the_released_code(shared: Path, tmp_path: Path) -> None:
    golden = load_file(shared / "data/golden/reference_splitformer_tiny.safetensors")
    cuts = store(tmp_path / "data", [golden["in.wav"][0].numpy()])
    tokenizer = Tokenizer(make_lang_dir(tmp_path, ["AB"]))
    [batch] = evaluation_batches(load_cuts([cuts]), tokenizer, 100.0)
    assert torch.equal(batch.x, golden["in.mel"].transpose(1, 2)) and batch.x_lens.tolist() == [209]
    # why they are not compressed: a good part of the energies is smaller than what lilcom adds to them
    energies = batch.x[0].numpy()
    lossy = lilcom.decompress(lilcom.compress(energies, tick_power=-5))
    assert np.mean(np.abs(lossy - energies) > energies) > 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_from_wave_file_to_log_probabilities(shared: Path, tmp_path: Path, kind: str) -> None:
    """In a padded batch too, in which the released code's own masks would let padding in."""
    model, golden, _ = load_released_model(shared, kind)
    wave = golden["in.wav"][0].numpy()
    cuts = store(tmp_path / "data", [wave, np.tile(wave, 2)])
    tokenizer = Tokenizer(make_lang_dir(tmp_path, ["AB"]))
    for seconds in (3.0, 100.0):
        [batch] = [b for b in evaluation_batches(load_cuts([cuts]), tokenizer, seconds) if "u0" in b.cut_ids]
        row = batch.cut_ids.index("u0")
        with torch.no_grad():
            exits = list(model(batch.x, batch.x_lens))
        for (exit_output, log_probs), expected in zip(exits, golden["out.mel"], strict=True):
            length = int(exit_output.lengths[row])
            torch.testing.assert_close(log_probs[row : row + 1, :length], expected, atol=1e-4, rtol=0)
    assert len(batch.cut_ids) == 2


@pytest.mark.parametrize("samples", [513, 16000, 16079, 16080, 16159])
def test_a_batch_has_every_frame_that_was_computed(tmp_path: Path, samples: int) -> None:
    """Lhotse would drop the last frame of some, and end the transcript before it."""
    rng = np.random.default_rng(samples)
    waves = [0.1 * rng.standard_normal(n).astype(np.float32) for n in (samples, 20000)]
    tokenizer = Tokenizer(make_lang_dir(tmp_path, ["AB"]))
    [batch] = evaluation_batches(load_cuts([store(tmp_path / "data", waves)]), tokenizer, 100.0)
    assert dict(zip(batch.cut_ids, batch.x_lens.tolist())) == {"u0": samples // 160 + 1, "u1": 126}
    extractor = LinearMel()
    for cut_id, x, length in zip(batch.cut_ids, batch.x, batch.x_lens):
        expected = extractor.extract(waves[int(cut_id[1:])], 16000)
        np.testing.assert_array_equal(x[:length].numpy(), expected)


def test_another_sampling_rate_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes audio of 16000 Hz, not of 8000"):
        LinearMel().extract(np.zeros(8000, dtype=np.float32), 8000)


def test_audio_that_is_too_short_is_skipped(tmp_path: Path) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    cuts = load_cuts([store(tmp_path, [noise[:512], noise])])
    assert [cut.id for cut in cuts] == ["u1"]


def test_the_extractor_can_be_made_from_its_description() -> None:
    extractor = LinearMel(LinearMelConfig(num_mel_bins=40))
    again = FeatureExtractor.from_dict(extractor.to_dict())
    assert isinstance(again, LinearMel) and again.config == extractor.config
    assert again.feature_dim(16000) == 40 and again.frame_shift == 0.01
