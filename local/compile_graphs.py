#!/usr/bin/env python3
"""Compile one of a lang_dir's graphs from an ARPA file.

HLG.pt is for the searches of CTC, G.pt to rescore their lattices, LG.pt for the searches of transducers.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

from splitformer.decoding.graphs import compile_g, compile_hlg, compile_lg
from splitformer.decoding.lang import save_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--arpa", type=Path, required=True, help="language model, plain or .gz")
    parser.add_argument("--graph", choices=("HLG", "G", "LG"), default="HLG", help="which one (default: HLG)")
    parser.add_argument(
        "--modified-topology",
        action="store_true",
        help="of HLG: no blank between equal tokens: a graph of linear size, for vocabularies of thousands",
    )
    args = parser.parse_args()
    if args.graph != "HLG" and args.modified_topology:
        parser.error(f"--modified-topology is of HLG: {args.graph} has no CTC topology")
    start = time.monotonic()
    try:
        if args.graph == "HLG":
            graph = compile_hlg(args.lang_dir, args.arpa, args.modified_topology, report)
        elif args.graph == "G":
            graph = compile_g(args.lang_dir, args.arpa, report)
        else:
            graph = compile_lg(args.lang_dir, args.arpa, report)
        path = args.lang_dir / f"{args.graph}.pt"
        save_graph(graph, path)
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
