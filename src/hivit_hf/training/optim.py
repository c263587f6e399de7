# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the optimizer decays, and the learning rate of each step."""

import math
from collections.abc import Sequence

from torch import nn

from ..configuration_hivit import HiViTConfig
from ..modeling_hivit import LAYER, POSITION_PARAMETERS, layer_id, number_of_layer_ids


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """
    The trainable parameters in two groups, for any optimizer: matrices are decayed; biases and other vectors (layer
    norms) are not, as in the published pre-training and fine-tuning.

    Raises:
        ValueError: if the weight decay is negative, or nothing is trainable.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}. The published value is 0.05.")
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("The model has no trainable parameter: call requires_grad_(True) on what shall be trained.")
    decayed = [parameter for name, parameter in trainable if _is_decayed(name, parameter)]
    exempt = [parameter for name, parameter in trainable if not _is_decayed(name, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_decayed(name: str, parameter: nn.Parameter, exempt: tuple[str, ...] = ()) -> bool:
    return parameter.ndim > 1 and not name.endswith(("bias", *exempt))


def layerwise_parameter_groups(
    model: nn.Module,
    config: HiViTConfig,
    weight_decay: float,
    learning_rate: float,
    layer_decay: float = 1.0,
    count_early_layers: bool = True,
) -> list[dict]:
    """
    The trainable parameters by layer, each with the learning rate `learning_rate * layer_decay ** (last id - its id)`.

    Vectors, biases, the position embedding and relative tables are not decayed.

    Args:
        model: a classifier, or anything with a HiViT inside; frozen parameters are left out.
        config: of the HiViT.
        weight_decay: of the matrices.
        learning_rate: of the head.
        layer_decay: factor from one layer to the one below.
        count_early_layers: which numbering, see `layer_id`.

    Returns:
        Groups for an optimizer, in the order of their ids; also with `layer_id`, `scale` and `names` for people.

    Raises:
        ValueError: if the weight decay is negative, the layer decay is not in (0, 1], or nothing is trainable.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}. Published: 0.85 for base; 1 for none.")
    parameter_groups(model, weight_decay)  # refuses the same
    last, groups = number_of_layer_ids(config, count_early_layers) - 1, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_id(name, config, count_early_layers), _is_decayed(name, parameter, POSITION_PARAMETERS)
        scale = layer_decay ** (last - layer)
        numbers = {"lr": learning_rate * scale, "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault(
            (layer, not decayed), {"params": [], "names": [], "layer_id": layer, "scale": scale, **numbers}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def layer_table(groups: list[dict]) -> str:
    """What `layerwise_parameter_groups` decided, as a table: one line per group."""
    lines = [f"{'id':>3} {'scale':>7} {'learning rate':>13} {'decay':>6} {'tensors':>7} {'weights':>11}  parameters"]
    for group in groups:
        weights = sum(parameter.numel() for parameter in group["params"])
        prefixes = dict.fromkeys(_short(name) for name in group["names"])
        lines.append(
            f"{group['layer_id']:>3} {group['scale']:>7.4f} {group['lr']:>13.3e} {group['weight_decay']:>6.3g} "
            f"{len(group['names']):>7} {weights:>11,}  {', '.join(prefixes)}"
        )
    return "\n".join(lines)


def _short(name: str) -> str:
    found = LAYER.search(name)
    return found[0].strip(".") if found else name.removeprefix("hivit.")


def cosine_learning_rate(
    step: int | float,
    total_steps: int,
    warmup_steps: int | float,
    base: float,
    minimum: float = 0.0,
    start: float = 0.0,
) -> float:
    """
    The learning rate of one step, as MAE and HiViT set it: linear in the warmup, then half a cosine.

    Args:
        step: steps taken before this one, so the first step of a warmup has learning rate `start`.
        total_steps: steps of the whole training, warmup included.
        warmup_steps: steps of the warmup; 0 for none.
        base: the highest learning rate, which the warmup leads to.
        minimum: what the cosine ends at.
        start: what the warmup begins with.

    Raises:
        ValueError: if the warmup or the step is not within the training, or `minimum` or `start` exceeds `base`.
    """
    _check_step(step, total_steps, warmup_steps)
    for name, value in (("minimum", minimum), ("start", start)):
        if not 0 <= value <= base:
            raise ValueError(f"{name} must be between 0 and base {base}, got {value}.")
    if step < warmup_steps:
        return start + (base - start) * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (base - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def poly_learning_rate(step: int | float, total_steps: int, warmup_steps: int, base: float, power: float) -> float:
    """
    The learning rate of one step, as the published segmenters were trained: it falls to zero as a power of what is left
    of the training, from the first step on, and is scaled up linearly in the warmup.

    Args:
        step, total_steps, warmup_steps, base: as in `cosine_learning_rate`.
        power: 1 for a straight line.

    Raises:
        ValueError: if the warmup or the step is not within the training.
    """
    _check_step(step, total_steps, warmup_steps)
    rate = base * (1 - step / total_steps) ** power
    return rate * step / warmup_steps if step < warmup_steps else rate


def _check_step(step: int | float, total_steps: int, warmup_steps: int | float):
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than total_steps {total_steps}, got {warmup_steps}. "
            "Train longer or warm up for fewer steps."
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be between 0 and total_steps {total_steps}, got {step}.")


def stepped_learning_rate(step: int, warmup_steps: int, milestones: Sequence[int], factor: float, base: float) -> float:
    """
    The learning rate of one step of the published detectors: linear in the warmup, then lower after each milestone.

    Args:
        step, warmup_steps, base: as in `cosine_learning_rate`; the first step of a warmup of n has 1/n of `base`.
        milestones: steps after which the learning rate falls.
        factor: what it falls to each time, of what it was.
    """
    rate = base * factor ** sum(step >= milestone for milestone in milestones)
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate
