#!/usr/bin/env python3
"""Compile a decoding graph of a lang_dir from an ARPA file: HLG.pt, G.pt or LG.pt."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from splitformer.cli import command
from splitformer.decoding.graphs import compile_g, compile_hlg, compile_lg, save_graph
from splitformer.errors import UserError


@dataclass(frozen=True)
class Options:
    """Compile a decoding graph of a lang_dir from an ARPA file.

    HLG.pt is for CTC searches, G.pt rescores their lattices, LG.pt is for transducer searches.
    """

    lang_dir: Path
    arpa: Path
    """language model, plain or .gz"""
    graph: Literal["HLG", "G", "LG"] = "HLG"
    modified_topology: bool = False
    """of HLG: no blank between equal tokens. The graph has linear size, for vocabularies of thousands"""


def run(options: Options) -> None:
    if options.graph != "HLG" and options.modified_topology:
        raise UserError(f"--modified-topology is for HLG: {options.graph} has no CTC topology")
    start = time.monotonic()
    report = partial(print, flush=True)
    if options.graph == "HLG":
        graph = compile_hlg(options.lang_dir, options.arpa, options.modified_topology, report)
    else:
        compile_graph = compile_g if options.graph == "G" else compile_lg
        graph = compile_graph(options.lang_dir, options.arpa, report)
    path = options.lang_dir / f"{options.graph}.pt"
    save_graph(graph, path)
    states = graph.arcs.shape().tot_size(graph.arcs.num_axes() - 2)
    processes = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN  # kaldilm runs in a child
    peak = max(resource.getrusage(each).ru_maxrss for each in processes) / (1 << 20)
    print(
        f"{path}: {states} states, {graph.num_arcs} arcs, {path.stat().st_size / 1e6:.1f} MB on disk, "
        f"{time.monotonic() - start:.1f} s, peak memory {peak:.1f} GiB"
    )


if __name__ == "__main__":
    sys.exit(command(run))
