#!/usr/bin/env python3
"""Compile HLG.pt, the graph of CTC's 1best search, or LG.pt, the transducer's, from a lang_dir and an ARPA file."""

import argparse
import resource
import sys
import time
from pathlib import Path

from splitformer.decoding.graphs import compile_hlg, compile_lg, save_hlg, save_lg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang-dir", type=Path, required=True)
    parser.add_argument("--arpa", type=Path, required=True, help="language model, plain or .gz")
    parser.add_argument("--graph", choices=("hlg", "lg"), default="hlg", help="which one (default: hlg)")
    parser.add_argument(
        "--modified-topology",
        action="store_true",
        help="of hlg: no blank between equal tokens: a graph of linear size, for vocabularies of thousands",
    )
    args = parser.parse_args()
    if args.graph == "lg" and args.modified_topology:
        parser.error("--modified-topology is of hlg: LG has no CTC topology")

    def report(line: str) -> None:
        print(line, flush=True)

    start = time.monotonic()
    try:
        if args.graph == "hlg":
            graph = compile_hlg(args.lang_dir, args.arpa, args.modified_topology, report)
            path = save_hlg(graph, args.lang_dir)
        else:
            graph = compile_lg(args.lang_dir, args.arpa, report)
            path = save_lg(graph, args.lang_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"compile_graphs: {error}")
    states = graph.shape[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform != "darwin" else 1 << 30)
    print(
        f"{path}: {states} states, {graph.num_arcs} arcs, {path.stat().st_size / 1e6:.1f} MB on disk, "
        f"{time.monotonic() - start:.1f} s, peak memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
