"""Lhotse Shar: cuts and features in a few large files, for corpora that outgrow a file system.

Lhotse reads such shards from their beginning to their end, because a tar archive has no table of contents. Batches here
are drawn by number, so that table is made: while cuts are read, the manifest of each one's features is told where in
which archive they lie. An index keeps it (`cut_index`), and from then on any of them can be had at once.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from lhotse.shar import ArrayTarWriter, JsonlShardWriter
from lhotse.utils import fastcopy, is_module_available
from tqdm import tqdm

from splitformer.data.cut_features import load_all_frames, with_features
from splitformer.data.manifests import ManifestError, read_cuts

SHARD_CUTS = 1000
PACKINGS = ("numpy", "lilcom")


def export_shar(cuts: str | Path, folder: str | Path, packing: str, shard_cuts: int = SHARD_CUTS) -> int:
    """Write the cuts of a manifest with their features to `folder`, and return their number.

    The folder appears when it is complete; an older one is replaced.

    Args:
      packing: "numpy": the same numbers, four bytes each. "lilcom": about a third of that, each number rounded by up to
        2 ** -6; once more, where they are stored so, because lilcom rounds what its prediction leaves, and predicts
        from other neighbours when it packs the whole of what was stored in chunks.
    Raises:
      ManifestError: no cut, or one without features.
      ValueError: another packing, or lilcom for energies without logarithm, most of which it would round to nothing.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r}: choose one of {', '.join(PACKINGS)}")
    if packing == "lilcom" and not is_module_available("lilcom"):
        raise ValueError("lilcom is not installed: use the environment that ./setup.sh makes, or packing numpy")
    cuts, folder = Path(cuts), Path(folder)
    first = next(iter(read_cuts(cuts)), None)
    if first is None or not first.has_features:
        raise ManifestError(f"{cuts}: no cuts with features to export; the fbank stage of prepare.sh makes them")
    if packing == "lilcom" and first.features.type == "linear-mel":
        raise ValueError(f"{cuts} has energies without logarithm, which lilcom spoils: choose packing numpy")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    for old in folder.parent.glob(f".{folder.name}.*.tmp"):  # of an export that was killed
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    count = 0
    try:
        with (
            JsonlShardWriter(f"{temporary}/cuts.%06d.jsonl.gz", shard_cuts) as manifest,
            ArrayTarWriter(f"{temporary}/features.%06d.tar", shard_cuts, packing) as archive,
        ):
            for cut in tqdm(read_cuts(cuts), desc=f"shar {cuts.name}", unit=" cuts"):
                if not cut.has_features:
                    raise ManifestError(f"{cuts}: {cut.id} has no features")
                feats = load_all_frames(cut)
                # without its recording, of which the cut, which now begins at 0, is a part
                cut = fastcopy(cut, start=0.0, recording=None)
                storage = {"storage_type": "shar", "storage_path": "", "storage_key": ""}
                cut = with_features(cut, feats, cut.features.type, cut.frame_shift, storage)
                archive.write(cut.id, feats, cut.features)
                manifest.write(cut)
                count += 1
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count
