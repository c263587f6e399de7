# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Optimizer steps of masked pre-training, with Accelerate: schedule, accumulation, clipping, moving average."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_model, save_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling_hivit import HiViTForMaskedImageModeling
from ..training.manifest import AVERAGE
from ..training.optim import parameter_groups


@dataclass(frozen=True)
class StepResult:
    """
    The result of a step, the same in all ranks.

    Args:
        loss: mean over the ranks and the accumulated batches. If it is not finite, nothing was changed.
        learning_rate: of this step.
        gradient_norm: before clipping; None without clipping.
        stop: whether a rank was asked to stop.
    """

    loss: float
    learning_rate: float
    gradient_norm: float | None
    stop: bool


class MaskedTraining:
    """
    A masked autoencoder and its AdamW, one optimizer step at a time.

    Args:
        model: trained in place.
        accelerator: decides device, precision and ranks.
        learning_rate: of the step after a number of others.
        weight_decay: of matrices; vectors have none.
        betas: of AdamW.
        max_grad_norm: maximum norm of the gradient; 0 for no clipping.
        ema_decay: decay of a moving average of the weights, which `ema` then holds.
    """

    def __init__(
        self,
        model: HiViTForMaskedImageModeling,
        accelerator: Accelerator,
        learning_rate: Callable[[int], float],
        weight_decay: float = 0.05,
        betas: Sequence[float] = (0.9, 0.95),
        max_grad_norm: float = 0.0,
        ema_decay: float | None = None,
    ):
        self.accelerator, self.learning_rate, self.max_grad_norm = accelerator, learning_rate, max_grad_norm
        self.bare = model  # shares its weights with the prepared one, which may be wrapped or compiled
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), betas=tuple(betas))
        if accelerator.is_fsdp2:
            # Accelerate's own policy casts pixels, noise and loss to bfloat16; autocast decides what is computed in it
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()
        if accelerator.distributed_type == DistributedType.FSDP:
            self._begin_optimizer()
        self.ema = None
        if ema_decay is not None:
            self.ema = AveragedModel(self.bare, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
            accelerator.register_save_state_pre_hook(self._save_average)
            accelerator.register_load_state_pre_hook(self._load_average)

    def _save_average(self, _models: list, _weights: list, folder: str):
        """Called by `Accelerator.save_state`; what is registered for checkpointing would be unpickled freely."""
        if self.accelerator.is_main_process:
            save_model(self.ema, str(Path(folder) / AVERAGE))

    def _load_average(self, _models: list, folder: str):
        """Called by `Accelerator.load_state`."""
        load_model(self.ema, Path(folder) / AVERAGE)

    def _begin_optimizer(self):
        """AdamW's state before the first step: saving an optimizer without one, torch takes a step to make it."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **averages}

    def step(self, number: int, batches: Sequence[dict[str, torch.Tensor]], stop: bool = False) -> StepResult:
        """
        One optimizer step over the accumulated batches.

        Args:
            number: number of steps before, which decides the learning rate.
            batches: arguments of the model, all with the same number of images.
            stop: whether this rank was asked to stop; the result says whether any was.
        """
        rate = self.learning_rate(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.model(**batch).loss / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        summed = self.accelerator.reduce(torch.stack([total, torch.full_like(total, float(stop))]), "sum").tolist()
        mean_loss, stop = summed[0] / self.accelerator.num_processes, summed[1] > 0
        norm = None
        if self.max_grad_norm and math.isfinite(mean_loss):
            norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
            if not math.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such steps by itself
                mean_loss = math.nan
        if math.isfinite(mean_loss):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(self.bare)
        return StepResult(mean_loss, rate, norm, stop)

    def is_finite(self) -> bool:
        """Whether all weights of all ranks are finite: a gradient can be NaN where the loss is not."""
        bad = sum((~torch.isfinite(parameter)).any().float() for parameter in self.model.parameters())
        bad = bad.full_tensor() if hasattr(bad, "full_tensor") else bad
        return self.accelerator.reduce(bad, "sum").item() == 0
