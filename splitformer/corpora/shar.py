"""Write cuts and their features as Lhotse Shar: a few large files. `splitformer.data.shar` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lhotse.shar import ArrayTarWriter, JsonlShardWriter
from lhotse.utils import fastcopy, is_module_available
from tqdm import tqdm

from splitformer.data.cut_features import load_all_frames, with_features
from splitformer.data.features import features_of
from splitformer.data.manifests import ManifestError, read_cuts
from splitformer.errors import UserError
from splitformer.files import atomic_folder

SHARD_CUTS = 1000
Packing = Literal["numpy", "lilcom"]


def export_shar(cuts: str | Path, folder: str | Path, packing: Packing, shard_cuts: int = SHARD_CUTS) -> int:
    """Write the cuts of a manifest with their features to `folder`, and return their number.

    The folder appears when it is complete; an older one is replaced.

    Args:
      packing: "numpy" keeps the numbers exactly, four bytes each. "lilcom" takes about a third of that and rounds by up
        to 2 ** -6, again if the features were stored so: lilcom rounds the residual of a prediction from neighbouring
        values, and the neighbours differ when whole features are packed instead of chunks.
    Raises:
      ManifestError: there is no cut, or one has no features.
      UserError: lilcom is not installed, or too coarse for energies without a logarithm.
    """
    if packing == "lilcom" and not is_module_available("lilcom"):
        raise UserError("lilcom is not installed: use the environment that ./setup.sh makes, or packing numpy")
    cuts, folder = Path(cuts), Path(folder)
    first = next(iter(read_cuts(cuts)), None)
    if first is None or not first.has_features:
        raise ManifestError(f"{cuts}: no cuts with features to export; the fbank stage of prepare.sh makes them")
    if packing == "lilcom" and features_of(first) == "linear-mel":
        raise UserError(f"{cuts} has energies without a logarithm, lilcom is too coarse for: choose packing numpy")
    count = 0
    with (
        atomic_folder(folder) as temporary,
        JsonlShardWriter(f"{temporary}/cuts.%06d.jsonl.gz", shard_cuts) as manifest,
        ArrayTarWriter(f"{temporary}/features.%06d.tar", shard_cuts, packing) as archive,
    ):
        for cut in tqdm(read_cuts(cuts), desc=f"shar {cuts.name}", unit=" cuts"):
            if not cut.has_features:
                raise ManifestError(f"{cuts}: {cut.id} has no features")
            feats = load_all_frames(cut)
            # a cut of its own, which starts at 0, instead of a part of a recording
            cut = fastcopy(cut, start=0.0, recording=None)
            storage = {"storage_type": "shar", "storage_path": "", "storage_key": ""}
            cut = with_features(cut, feats, cut.features.type, cut.frame_shift, storage)
            archive.write(cut.id, feats, cut.features)
            manifest.write(cut)
            count += 1
    return count
