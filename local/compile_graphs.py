#!/usr/bin/env python3
"""Compile HLG.pt, the graph of the 1best search, from a lang_dir and an ARPA file."""

import argparse
import resource
import sys
import time
from pathlib import Path

from splitformer.decoding.graphs import compile_hlg, save_hlg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--arpa", type=Path, required=True, help="language model, plain or .gz")
    parser.add_argument(
        "--modified-topology",
        action="store_true",
        help="no blank between equal tokens: a graph of linear size, for vocabularies of thousands",
    )
    args = parser.parse_args()
    start = time.monotonic()
    try:
        hlg = compile_hlg(args.lang_dir, args.arpa, args.modified_topology, lambda line: print(line, flush=True))
        path = save_hlg(hlg, args.lang_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"compile_graphs: {error}")
    states = hlg.shape[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    print(
        f"{path}: {states} states, {hlg.num_arcs} arcs, {path.stat().st_size / 1e6:.1f} MB on disk, "
        f"{time.monotonic() - start:.1f} s, peak memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
