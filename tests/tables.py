"""Random tables of exits, in which errors fall with depth as those of a trained model do."""

from __future__ import annotations

import math

import torch

from splitformer.early_exit.exit_table import ExitTable

LAYERS = (2, 4, 6, 8, 10, 12)
UNCERTAINTIES = ("entropy", "entropy_non_blank", "posterior", "nbest_posterior")


def make_table(
    utterances: int = 60,
    speakers: int = 12,
    layers: tuple[int, ...] = LAYERS,
    seed: int = 0,
    prefix: str = "dev",
    search: float = 0.5,
) -> ExitTable:
    """Return utterances with a latent difficulty, which depends on the speaker too.

    Errors fall with depth, though not for every utterance. Uncertainty rises with the expected errors; costs rise with
    depth and length.

    Args:
      search: seconds of a search relative to those of a layer; uncertain exits take longer.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (utterances, len(layers))
    depth = torch.tensor(layers, dtype=torch.float64)
    speaker = torch.arange(utterances) % speakers
    difficulty = (0.8 * normal(speakers)[speaker] + normal(utterances)).unsqueeze(1)
    words = torch.randint(3, 20, (utterances,), generator=generator)
    gain = 2.0 * (1.0 - torch.exp(-0.7 * torch.arange(len(layers))))  # saturates with depth
    logit = 1.5 * difficulty - 1.0 - gain + 0.2 * normal(*shape)
    # a word that is hard at one exit is hard at all of them, except for some noise
    hard = uniform(utterances, 1, 20) + 0.03 * normal(*shape, 20)
    errors = ((hard < torch.sigmoid(logit).unsqueeze(2)) & (torch.arange(20) < words.view(-1, 1, 1))).sum(dim=2)
    uncertainty = {name: (logit - 1.0 + 0.4 * normal(*shape)).exp() for name in UNCERTAINTIES}
    uncertainty["posterior"] = uncertainty["posterior"] / (1.0 + uncertainty["posterior"])
    disagreement = (20 * torch.sigmoid(logit + 0.3 * normal(*shape))).round() / 20
    disagreement[:, 0] = math.nan

    frames = (20 * words * (1.0 + 0.3 * uniform(utterances))).round().unsqueeze(1).expand(shape).double()
    encoder_seconds = 1e-5 * (frames * torch.diff(depth, prepend=torch.zeros(1)) * (1.0 + 0.2 * uniform(*shape)))
    encoder_seconds = encoder_seconds.cumsum(dim=1)
    head_seconds = 1e-6 * frames * (1.0 + uniform(*shape))
    search_seconds = 1e-5 * search * frames * (1.0 + uncertainty["entropy"])
    return ExitTable(
        layers=layers,
        utterances=[f"{prefix}-{number}" for number in range(utterances)],
        speakers=[f"{prefix}-speaker-{number}" for number in speaker.tolist()],
        audio_seconds=0.04 * frames[:, 0],
        ref_words=words.double(),
        errors=errors.double(),
        statistics={
            **uncertainty,
            "disagreement": disagreement,
            "frames": frames,
            "batch_frames": frames,
            "elapsed": encoder_seconds + head_seconds.cumsum(dim=1),
        },
        encoder_macs=frames * (2.0 + depth) * 1e6,
        head_macs=frames * torch.full(shape, 1e5),
        search_macs=frames * torch.full(shape, 3e4),
        encoder_seconds=encoder_seconds,
        head_seconds=head_seconds,
        search_seconds=search_seconds,
        statistic_seconds={
            name: 1e-6 * frames * (1.0 + uniform(*shape)) + (search_seconds if name == "nbest_posterior" else 0.0)
            for name in (*UNCERTAINTIES, "disagreement")
        },
    )
