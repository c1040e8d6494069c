"""The pruned transducer loss at every exit, compared with enumeration, plain autograd and k2's pruning."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref

import k2
import pytest
import torch

from splitformer.config import LossConfig, ModelConfig
from splitformer.losses.multi_exit import MultiExitLoss
from splitformer.losses.pruned_transducer import PrunedTransducerLoss, _WithGradient, prune
from splitformer.model.asr import AsrModel
from splitformer.model.encoder import ExitOutput

SMALL = ModelConfig(
    num_mel_bins=20, vocab_size=6, d_model=16, num_heads=2, feedforward_dim=32, conv_kernel=3, num_layers=2,
    exit_layers=(1, 2), parallel_exits=(1,), dropout=0.0, decoder_dim=12, joiner_dim=10, heads=("ctc", "transducer"),
)  # fmt: skip
WHOLE = LossConfig(prune_range=10, lm_scale=0.0, am_scale=0.0)  # nothing pruned, nothing smoothed
LABELS = [[1, 2, 1], [4, 4], [], [5]]
Y = torch.tensor([[1, 2, 1], [4, 4, 9], [7, 7, 7], [5, -1, -1]])  # padding holds anything
Y_LENS = torch.tensor([3, 2, 0, 1])
LENGTHS = torch.tensor([5, 3, 4, 2])


def make_model(heads=("ctc", "transducer"), seed=3):
    torch.manual_seed(seed)
    return AsrModel(dataclasses.replace(SMALL, heads=heads)).eval()


def make_exits(seed=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        ExitOutput(layer, torch.randn(4, 5, 16, generator=generator, requires_grad=True), LENGTHS) for layer in (1, 2)
    ]


def brute_force(log_probs: torch.Tensor, labels: list[int], frames: int) -> float:
    """-log of the summed probability of all paths: in each frame any number of labels, then a blank.

    log_probs (T', S + 1, V) are those of the symbols in each frame after each number of labels.
    """
    total = 0.0
    for moments in itertools.combinations_with_replacement(range(frames), len(labels)):
        score = sum(float(log_probs[t, s, labels[s]]) for s, t in enumerate(moments))
        score += sum(float(log_probs[t, sum(m <= t for m in moments), 0]) for t in range(frames))
        total += math.exp(score)
    return -math.log(total)


def test_simple_and_pruned_loss_equal_enumeration_at_every_exit():
    model, exits = make_model(), make_exits()
    loss = PrunedTransducerLoss(model, WHOLE)
    for scales in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.1)):
        found = loss(model, exits, Y, Y_LENS, *scales)
        for exit_output, value in zip(exits, found.tolist(), strict=True):
            joiner, am_proj = model.joiner(exit_output.layer), loss.simple_am_proj[str(exit_output.layer)]
            expected = 0.0
            for i, labels in enumerate(LABELS):
                decoder_out = model.decoder.teacher_forced(torch.tensor([labels], dtype=torch.long))
                frames = exit_output.encoder_out[i : i + 1].detach()
                am, lm = am_proj(frames).unsqueeze(2), loss.simple_lm_proj(decoder_out).unsqueeze(1)
                logits = joiner(
                    joiner.encoder_proj(frames).unsqueeze(2), joiner.decoder_proj(decoder_out).unsqueeze(1)
                )
                for scale, log_probs in zip(scales, ((am + lm), logits)):
                    expected += scale * brute_force(log_probs[0].log_softmax(-1), labels, int(LENGTHS[i]))
            assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("prune_range", [2, 3, 10])
def test_gradients_are_those_of_plain_autograd(prune_range, monkeypatch):
    def run():
        model, exits = make_model(), make_exits()
        torch.manual_seed(0)
        loss = PrunedTransducerLoss(model, LossConfig(prune_range=prune_range))
        values = loss(model, exits, Y, Y_LENS, 0.5, 1.0)
        (values * torch.tensor([1.0, 3.0])).sum().backward()
        tensors = [e.encoder_out for e in exits] + [*loss.parameters()]
        tensors += [*model.decoder.parameters(), *model.joiners.parameters()]
        return values, [tensor.grad for tensor in tensors]

    values, gradients = run()
    monkeypatch.setattr(_WithGradient, "apply", lambda loss, n, *tensors: loss(*tensors[:n]))
    plain_values, plain_gradients = run()
    torch.testing.assert_close(values, plain_values)
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)
    torch.testing.assert_close(gradients, plain_gradients)


def test_nothing_as_large_as_the_logits_is_kept_until_the_backward_pass():
    model, exits = make_model(), make_exits()
    loss = PrunedTransducerLoss(model, LossConfig(prune_range=3))
    kept = weakref.WeakSet()

    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor):
        losses = loss(model, exits, Y, Y_LENS, 0.5, 1.0)
    sizes = [packed.tensor.numel() for packed in kept]
    assert sizes and max(sizes) < 4 * 5 * 3 * SMALL.vocab_size
    losses.sum().backward()


def test_without_gradients_the_value_is_the_same():
    model, exits = make_model(), make_exits()
    loss = PrunedTransducerLoss(model, LossConfig())
    with torch.no_grad():
        value = loss(model, exits, Y, Y_LENS, 0.5, 1.0)
    torch.testing.assert_close(value, loss(model, exits, Y, Y_LENS, 0.5, 1.0).detach())


def test_pruning_selects_the_states_that_k2_selects():
    generator = torch.Generator().manual_seed(1)
    am, lm = torch.randn(3, 7, 4, generator=generator), torch.randn(3, 6, 5, generator=generator)
    starts = torch.randint(0, 4, (3, 7, 1), generator=generator)
    ranges = starts + torch.arange(3)
    torch.testing.assert_close(prune(lm, ranges), k2.do_rnnt_pruning(am, lm, ranges)[1])


def test_the_loss_of_a_batch_is_the_sum_over_its_utterances():
    model, exits = make_model(), make_exits()
    loss = PrunedTransducerLoss(model, WHOLE)
    together = loss(model, exits, Y, Y_LENS, 0.5, 1.0)
    alone = torch.zeros(2)
    for i, labels in enumerate(LABELS):
        frames = int(LENGTHS[i])
        own = [ExitOutput(e.layer, e.encoder_out[i : i + 1, :frames], LENGTHS[i : i + 1]) for e in exits]
        y = torch.tensor([labels], dtype=torch.long)
        alone = alone + loss(model, own, y, torch.tensor([len(labels)]), 0.5, 1.0)
    torch.testing.assert_close(together, alone)


def test_more_labels_than_frames_are_allowed_up_to_the_prune_range():
    model = make_model()
    exits = [ExitOutput(1, torch.randn(1, 2, 16), torch.tensor([2]))]
    loss = PrunedTransducerLoss(model, LossConfig(prune_range=3))
    y = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.isfinite(loss(model, exits, y, torch.tensor([4]), 0.5, 1.0)).all()
    with pytest.raises(ValueError, match="utterance 0 has 5 labels and 2 output frames"):
        loss(model, exits, y, torch.tensor([5]), 0.5, 1.0)
    with pytest.raises(ValueError, match="0 labels and 0 output frames"):
        none = [exits[0]._replace(lengths=torch.tensor([0]))]
        loss(model, none, y[:, :0], torch.tensor([0]), 0.5, 1.0)


@pytest.mark.parametrize("label", [6, -1, 0])
def test_labels_outside_the_vocabulary_are_an_error(label):
    model, exits = make_model(), make_exits()
    y = Y.clone()
    y[1, 1] = label
    with pytest.raises(ValueError, match=f"label {label} at position 1 of utterance 1"):
        PrunedTransducerLoss(model, LossConfig())(model, exits, y, Y_LENS, 0.5, 1.0)


def test_scales_change_from_ctc_to_transducer():
    config = LossConfig(ctc_scale=0.2, simple_scale=0.5, warm_steps=10)
    model = make_model()
    x, x_lens = torch.randn(2, 27, 20), torch.tensor([27, 23])
    batch = (x, x_lens, Y[:2], Y_LENS[:2])
    torch.manual_seed(0)
    both = MultiExitLoss(model, config, transducer_from=100)
    part = both.transducer
    ctc = MultiExitLoss(make_model(("ctc",)), config)
    ctc.model.load_state_dict(model.state_dict(), strict=False)
    only_ctc = ctc(*batch).per_exit
    exits = list(model.encoder(x, x_lens))
    tokens = Y_LENS[:2].sum()

    def transducer(simple, pruned):
        return part(model, exits, Y[:2], Y_LENS[:2], simple, pruned).detach() / tokens

    for step, expected in {
        100: only_ctc,
        105: 0.6 * only_ctc + transducer(0.75, 0.55),
        110: 0.2 * only_ctc + transducer(0.5, 1.0),
        999: 0.2 * only_ctc + transducer(0.5, 1.0),
    }.items():
        found = both(*batch, step)
        torch.testing.assert_close(found.per_exit, expected)
        found.total.backward()
        # DistributedDataParallel expects a gradient of every parameter, also before the transducer starts
        assert all(p.grad is not None for p in both.parameters())
        silent = all(float(p.grad.abs().sum()) == 0 for p in [*part.parameters(), *model.joiners.parameters()])
        assert silent == (step == 100)
        both.zero_grad(set_to_none=True)
    names = both.training_only_state()
    assert len(names) == 6 and not any(name in model.state_dict() for name in names)


def test_a_model_without_transducer_heads_trains_no_transducer():
    assert MultiExitLoss(make_model(("ctc",)), LossConfig()).training_only_state() == {}
    assert MultiExitLoss(make_model(), LossConfig()).training_only_state()
