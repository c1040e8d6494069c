#!/usr/bin/env python3
"""Compile a lang_dir's graphs from an ARPA file: HLG.pt for the searches, or G.pt for the rescoring of lattices."""

import argparse
import resource
import sys
import time
from pathlib import Path

from splitformer.decoding.graphs import compile_g, compile_hlg, save_g, save_hlg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--arpa", type=Path, required=True, help="language model, plain or .gz")
    parser.add_argument(
        "--modified-topology",
        action="store_true",
        help="no blank between equal tokens: a graph of linear size, for vocabularies of thousands",
    )
    parser.add_argument("--grammar", action="store_true", help="make G.pt, not HLG.pt")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        if args.grammar:
            graph = compile_g(args.lang_dir, args.arpa, report)
            path = save_g(graph, args.lang_dir)
        else:
            graph = compile_hlg(args.lang_dir, args.arpa, args.modified_topology, report)
            path = save_hlg(graph, args.lang_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"compile_graphs: {error}")
    states = graph.arcs.shape().tot_size(graph.arcs.num_axes() - 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    print(
        f"{path}: {states} states, {graph.num_arcs} arcs, {path.stat().st_size / 1e6:.1f} MB on disk, "
        f"{time.monotonic() - start:.1f} s, peak memory {peak:.1f} GiB"
    )


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
