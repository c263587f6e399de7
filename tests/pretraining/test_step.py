"""Optimizer steps of pre-training: schedule, accumulation, clipping, moving average, compilation."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.testing import assert_close

import kill_test
from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.pretraining.step import StepResult
from support.pretraining import exact_losses, next_batch, train_and_save


def test_learning_rates_follow_the_papers_rule(make_run, tmp_path):
    run = make_run(num_train_epochs=8, warmup_epochs=2)
    seen = []
    step = run.training.step

    def note(number, batches, stop=False):
        result = step(number, batches, stop)
        seen.append((result.learning_rate, run.training.optimizer.param_groups[0]["lr"]))
        return result

    run.training.step = note
    run.train()
    peak = 0.01 * 16 / 256
    expected = [peak * (n / 3) / 2 for n in range(6)]
    expected += [peak * 0.5 * (1 + math.cos(math.pi * (n / 3 - 2) / 6)) for n in range(6, 24)]
    assert [told for told, _ in seen] == [used for _, used in seen] == pytest.approx(expected)


def test_half_precision_with_clipping_survives_a_loss_that_is_not_finite(make_run):
    """The scaler must not be left between unscaling and its update."""
    run = make_run(max_grad_norm=0.1)
    run.accelerator.state._mixed_precision, run.accelerator.native_amp = "fp16", True
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    run.training.optimizer = AcceleratedOptimizer(run.training.optimizer.optimizer, scaler=run.accelerator.scaler)
    run.accelerator._optimizers = [run.training.optimizer]
    batch = next_batch(run, iter(run.loader))
    broken = {**batch, "pixel_values": batch["pixel_values"] * float("nan")}
    before = run.training.model.decoder.head.weight.detach().clone()
    assert math.isnan(run.training.step(20, [broken]).loss)
    assert torch.equal(run.training.model.decoder.head.weight, before)
    assert math.isfinite(run.training.step(20, [batch]).loss)
    assert not torch.equal(run.training.model.decoder.head.weight, before)


@pytest.mark.parametrize(
    "batch_size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 16]
)
def test_accumulation_changes_nothing_but_the_last_digits(batch_size, make_run, tmp_path):
    assert make_run(per_device_train_batch_size=8, output_dir=str(tmp_path / "reference")).train()
    assert make_run(per_device_train_batch_size=batch_size).train()
    reference, found = exact_losses(tmp_path / "reference"), exact_losses(tmp_path / "run")
    assert list(found.values()) == pytest.approx(list(reference.values()), rel=2e-5)
    samples = [kill_test.records(tmp_path / name)[0][24][0]["samples"] for name in ("reference", "run")]
    assert samples[0] == samples[1]


def test_gradients_are_clipped_and_the_average_follows(make_run):
    run = make_run(max_grad_norm=1e-3, ema_decay=0.5)
    run.begin()
    batches = iter(run.loader)
    run.step = 12
    result = run.training.step(12, [next_batch(run, batches) for _ in range(2)])
    assert isinstance(result, StepResult)
    assert result.gradient_norm > 1e-3
    clipped = math.sqrt(
        sum(p.grad.square().sum().item() for p in run.training.model.parameters() if p.grad is not None)
    )
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    for name, parameter in run.training.model.named_parameters():
        average = run.training.ema.module.get_parameter(name)
        if parameter.requires_grad:
            assert_close(average.data, parameter.data)  # the first one
    before = {name: p.clone() for name, p in run.training.ema.module.named_parameters()}
    run.training.step(13, [next_batch(run, batches) for _ in range(2)])
    for name, parameter in run.training.model.named_parameters():
        if parameter.requires_grad:
            expected = run.args.ema_decay * before[name] + (1 - run.args.ema_decay) * parameter
            assert_close(run.training.ema.module.get_parameter(name).data, expected.data)


@pytest.mark.slow
def test_a_compiled_run_leaves_a_model_that_loads(make_run, tmp_path):
    run = make_run(Accelerator(cpu=True, dynamo_backend="eager"), eval_steps=5, ema_decay=0.5)
    train_and_save(run)
    for name in ("model", "model_ema"):
        loaded, info = HiViTForMaskedImageModeling.from_pretrained(tmp_path / "run" / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(run.training.ema.module.state_dict(), loaded.state_dict(), atol=0, rtol=0)
