"""Running every utterance of a set through all exits of a model, which fills the table that policies are fitted to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from tqdm import tqdm

from splitformer.data.batch import Batch
from splitformer.data.batches import evaluation_batches, load_cuts
from splitformer.decoding.decode import timed
from splitformer.decoding.hypothesis import words_of
from splitformer.decoding.loading import Loaded, speakers_of
from splitformer.decoding.searches import Method, Options, exit_view
from splitformer.early_exit.exit_table import ExitTable
from splitformer.early_exit.running import has_nan
from splitformer.early_exit.statistics import OF_CTC, Meter
from splitformer.errors import UserError
from splitformer.model.asr import AsrModel
from splitformer.model.complexity import counted, transducer_heads
from splitformer.model.encoder import ExitOutput

Row = dict[str, list[float]]
"""One utterance: {name: its values at the exits}. The names are columns of ExitTable, statistics, and NAME_seconds."""

PARTS = ("encoder", "head", "search")


@torch.no_grad()
def collect(
    loaded: Loaded,
    cuts: Path,
    method: Method,
    options: Mapping[int, Options],
    repeats: int = 2,
    progress: str = "all exits",
) -> ExitTable:
    """Run every utterance through all exits in a batch of one, and search each exit.

    Args:
      options: of the method at each exit.
      repeats: number of runs of each utterance. Times are the shortest ones, which other processes affect least.
      progress: what the progress bar says.
    Raises:
      UserError: an exit's output holds a NaN.
    """
    model, _, _, tokenizer = loaded
    device = next(model.parameters()).device
    speakers = speakers_of(cuts)
    statistics = OF_CTC if "ctc" in model.heads else ()
    rows: list[Row] = []
    utterances, seconds, ref_words = [], [], []
    batches = evaluation_batches(load_cuts([cuts]), tokenizer, None, max_cuts=1)
    for batch in tqdm(batches, desc=progress, unit="cut", total=len(speakers), disable=None, leave=False):
        batch = batch.to(device)
        runs = [_all_exits(model, batch, method, options, statistics, tokenizer.decode) for _ in range(repeats)]
        shortest = {
            name: [min(each) for each in zip(*(run[name] for run in runs))] for name in runs[0] if "_seconds" in name
        }
        rows.append(runs[0] | shortest | _multiply_accumulates(model, batch, method))
        utterances.append(batch.cut_ids[0])
        seconds.append(batch.seconds)
        ref_words.append(len(batch.texts[0].split()))

    def column(name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    costs = {f"{part}_{unit}": column(f"{part}_{unit}") for part in PARTS for unit in ("macs", "seconds")}
    frames, elapsed = column("frames"), costs["encoder_seconds"] + costs["head_seconds"].cumsum(dim=1)
    return ExitTable(
        layers=model.encoder.exit_layers,
        utterances=utterances,
        speakers=[speakers[utterance] for utterance in utterances],
        audio_seconds=torch.tensor(seconds, dtype=torch.float64),
        ref_words=torch.tensor(ref_words, dtype=torch.float64),
        errors=column("errors"),
        statistics={name: column(name) for name in statistics}
        | {"frames": frames, "batch_frames": frames, "elapsed": elapsed},
        statistic_seconds={name: column(f"{name}_seconds") for name in statistics},
        **costs,
    )


def _all_exits(
    model: AsrModel,
    batch: Batch,
    method: Method,
    options: Mapping[int, Options],
    statistics: Sequence[str],
    spell: Callable[[list[int]], str],
) -> Row:
    """Return statistics, errors and times of one utterance."""
    row: Row = {}
    device, layers = batch.x.device, model.encoder.exit_layers

    def note(**values: float) -> None:
        for name, value in values.items():
            row.setdefault(name, []).append(value)

    def nbest(_: Tensor, exit_output: ExitOutput, log_probs: Tensor) -> Tensor:
        if exit_output.lengths[0] == 0:
            return torch.zeros(1)
        chosen = options.get(exit_output.layer, method.default)
        return method.run_with_uncertainty(exit_view(model, exit_output, log_probs), chosen)[2]

    meters = {name: Meter(1, layers, (name,), nbest) for name in statistics}  # one each, to time each
    first = torch.zeros(1, dtype=torch.long, device=device)
    exits = model.encoder(batch.x, batch.x_lens)
    encoder_seconds = 0.0
    for layer in layers:
        exit_output, seconds = timed(device, functools.partial(next, exits))
        encoder_seconds += seconds
        log_probs, head_seconds = None, 0.0
        if "ctc" in model.heads:
            log_probs, head_seconds = timed(device, functools.partial(model.ctc_log_probs, exit_output))
        if has_nan(exit_output.encoder_out if log_probs is None else log_probs, exit_output.lengths).any():
            raise UserError(
                f"the exit after layer {layer} gives NaN for {batch.cut_ids[0]}, so that nothing can be fitted: has "
                "the training diverged? Take another checkpoint, or end the model below (bin/calibrate --exit)"
            )
        for name, meter in meters.items():
            measured, seconds = timed(device, functools.partial(meter.measure, first, exit_output, log_probs))
            note(**{name: float(measured[name][0, -1]), f"{name}_seconds": seconds})
        view, chosen = exit_view(model, exit_output, log_probs), options.get(layer, method.default)
        (hypotheses, _), search_seconds = timed(device, functools.partial(method.run, view, chosen))
        errors = Levenshtein.distance(batch.texts[0].split(), words_of(hypotheses[0], spell))
        note(errors=errors, frames=int(exit_output.lengths[0]))
        note(encoder_seconds=encoder_seconds, head_seconds=head_seconds, search_seconds=search_seconds)
    return row


def _multiply_accumulates(model: AsrModel, batch: Batch, method: Method) -> Row:
    heads = {
        "head_macs": dict(model.ctc_heads) if "ctc" in model.heads else {},
        "search_macs": transducer_heads(model) if method.head == "transducer" else {},
    }
    row: Row = {"encoder_macs": [], "head_macs": [], "search_macs": []}
    with counted(model.encoder) as encoder:
        for exit_output in model.encoder(batch.x, batch.x_lens):
            row["encoder_macs"].append(encoder.macs)
            for name, of_layer in heads.items():
                macs = 0
                if head := of_layer.get(str(exit_output.layer)):
                    with counted(head) as own:
                        head(exit_output.encoder_out)
                    macs = own.macs
                row[name].append(macs)
    return row
