"""Helpers of the tests of pre-training: exact losses, batches on their device, losses that are not finite."""

from dataclasses import replace
from pathlib import Path

import torch

import kill_test
from hivit_hf.pretraining.data import to_device
from hivit_hf.pretraining.run import PretrainingRun


def exact_losses(output: Path, rank: int = 0) -> dict[int, float]:
    """The loss of each step of a run with --log_samples."""
    records = kill_test.records(output)[rank]
    return {step: float.fromhex(done[-1]["loss"]) for step, done in sorted(records.items())}


def next_batch(run: PretrainingRun, batches) -> dict[str, torch.Tensor]:
    """The next batch of a run, as its model takes it."""
    return to_device(next(batches), run.accelerator.device, run.data_args)


def nan_at(run: PretrainingRun, numbers: list[int]) -> list[int]:
    """Makes loss and weights NaN in some steps, once each; returns the list of all steps that are taken."""
    step, seen = run.training.step, []

    def broken(number, batches, stop=False):
        result = step(number, batches, stop)
        seen.append(number)
        if number in numbers:
            numbers.remove(number)
            for parameter in run.training.model.parameters():
                parameter.data.fill_(float("nan"))
            return replace(result, loss=float("nan"))
        return result

    run.training.step = broken
    return seen


def train_and_save(run: PretrainingRun):
    """To the end, as the script does."""
    assert run.train()
    run.save_model()
