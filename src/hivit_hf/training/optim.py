# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the optimizer decays, and the learning rate of each step."""

import math

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    The trainable parameters in two groups, for any optimizer: matrices are decayed; biases and other vectors (layer
    norms) are not, as in the published pre-training and fine-tuning.

    Args:
        model: the model whose frozen parameters are left out.
        weight_decay: of the first group.

    Raises:
        ValueError: if the weight decay is negative, or nothing is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}. The published value is 0.05.")
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: call requires_grad_(True) on what shall be trained.")
    decayed = [parameter for name, parameter in trainable if parameter.ndim > 1 and not name.endswith("bias")]
    exempt = [parameter for name, parameter in trainable if parameter.ndim <= 1 or name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def cosine_learning_rate(
    step: int | float, total_steps: int, warmup_steps: int | float, base: float, minimum: float = 0.0
) -> float:
    """
    The learning rate of one step, as MAE and HiViT set it: linear from 0 in the warm-up, then half a cosine.

    Args:
        step: steps taken before this one, so the first step of a warm-up has learning rate 0.
        total_steps: steps of the whole training, warm-up included.
        warmup_steps: steps of the warm-up; 0 for none.
        base: the highest learning rate, which the warm-up leads to.
        minimum: what the cosine ends at.

    Raises:
        ValueError: if the warm-up is not within the training, the step is not, or `minimum` exceeds `base`.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than total_steps {total_steps}, got {warmup_steps}. "
            "Train longer or warm up for fewer steps."
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be between 0 and total_steps {total_steps}, got {step}.")
    if not 0 <= minimum <= base:
        raise ValueError(f"minimum must be between 0 and base {base}, got {minimum}.")
    if step < warmup_steps:
        return base * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
