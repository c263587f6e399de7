# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Masked pre-training with Accelerate: one process or many, on whatever device there is."""

import math
import time
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..modeling_hivit import HiViTForMaskedImageModeling
from .optim import cosine_learning_rate, parameter_groups


@dataclass
class PretrainEpoch:
    """What is recorded of an epoch: the mean loss, the last learning rate, and the speed over all processes."""

    epoch: int
    loss: float
    learning_rate: float
    images_per_second: float


def pretrain(
    model: HiViTForMaskedImageModeling,
    dataloader: DataLoader,
    epochs: int,
    learning_rate: float,
    warmup_epochs: float = 0.0,
    weight_decay: float = 0.05,
    accelerator: Accelerator | None = None,
) -> list[dict]:
    """
    Trains a masked autoencoder in place with AdamW (betas 0.9 and 0.95), warm-up and cosine.

    Args:
        model: trained in place; it draws a new mask for every image and step.
        dataloader: gives dictionaries with `pixel_values` (B, num_channels, H, W); `len(dataloader)` must be known.
        epochs: passes over the data.
        learning_rate: the highest one, for the batch size at hand; nothing is scaled.
        warmup_epochs: epochs until it is reached, fractions allowed.
        weight_decay: of the matrices; vectors are not decayed.
        accelerator: decides device, precision and processes. One with Accelerate's defaults if not given.

    Returns:
        One record per epoch: the fields of `PretrainEpoch`.

    Raises:
        ValueError: for settings and data that nothing can be learnt with, before the first step.
        FloatingPointError: as soon as a loss is not finite.
    """
    _check_settings(dataloader, epochs, learning_rate, warmup_epochs)
    accelerator = accelerator or Accelerator()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.95))
    prepared, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    steps_per_epoch = len(dataloader)  # after prepare: it is the share of one process now
    total_steps, warmup_steps = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch

    prepared.train()
    history = []
    with tqdm(total=total_steps, desc="pre-training", unit="step", disable=not accelerator.is_main_process) as progress:
        for epoch in range(epochs):
            start, loss_sum, images = time.perf_counter(), 0.0, 0
            for i, batch in enumerate(dataloader):
                rate = cosine_learning_rate(epoch * steps_per_epoch + i, total_steps, warmup_steps, learning_rate)
                mean_loss = _train_step(prepared, optimizer, batch["pixel_values"], rate, accelerator)
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"The loss is {mean_loss} in epoch {epoch + 1}, step {i + 1} at learning rate {rate:.3g}. "
                        "Lower the learning rate, lengthen the warm-up, or check the images for NaN."
                    )
                loss_sum += mean_loss
                images += len(batch["pixel_values"]) * accelerator.num_processes
                speed = images / (time.perf_counter() - start)
                progress.set_postfix(
                    {"loss": f"{mean_loss:.4f}", "lr": f"{rate:.2e}", "img/s": f"{speed:.0f}"}, refresh=False
                )
                progress.update()
            history.append(asdict(PretrainEpoch(epoch + 1, loss_sum / steps_per_epoch, rate, speed)))
    model.eval()
    return history


def _train_step(
    model: nn.Module, optimizer: AcceleratedOptimizer, pixel_values: torch.Tensor, rate: float, accelerator: Accelerator
) -> float:
    """One step, skipped if the loss is not finite. Returns the mean loss of all processes, so they decide alike."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(pixel_values=pixel_values).loss
    mean_loss = accelerator.reduce(loss.detach(), "mean").item()
    if math.isfinite(mean_loss):
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    return mean_loss


def _check_settings(dataloader: DataLoader, epochs: int, learning_rate: float, warmup_epochs: float):
    if len(dataloader) == 0:
        raise ValueError(
            "The data loader gives no batch. Add images, or with drop_last=True choose a batch size no larger than "
            "the number of images."
        )
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}.")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be a positive number, got {learning_rate}. Try 1e-3.")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs must be at least 0 and less than epochs {epochs}, got {warmup_epochs}.")
