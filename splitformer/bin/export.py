"""Export a model, truncated at an exit, as ONNX, TorchScript or safetensors files."""

from __future__ import annotations

import sys

from splitformer.cli import command
from splitformer.export.exporter import ExportOptions, export_model


def run(options: ExportOptions) -> None:
    export_model(options)


if __name__ == "__main__":
    sys.exit(command(run))
