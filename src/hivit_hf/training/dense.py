# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What detectors and segmenters begin with: the pyramid of a pre-training or of a classifier, or a random one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..configuration_hivit import HiViTConfig
from ..configuration_pyramid import HiViTPyramidConfig
from ..hub import IMAGENET_MEAN, IMAGENET_STD
from ..modeling_pyramid import HiViTPyramid
from .classifier import check_architecture, normalization, read_config, silent_transformers


@dataclass(frozen=True)
class DenseStart:
    """
    What a dense model begins with.

    Args:
        backbone: the pyramid.
        mean, std: of each channel, as the start has learnt from.
        notes: what a user should know, a sentence each.
    """

    backbone: HiViTPyramid
    mean: list[float]
    std: list[float]
    notes: list[str]


def pyramid_start(
    name: str | None,
    architecture: str | None = None,
    changes: dict | None = None,
    out_features: Sequence[str] | None = None,
) -> DenseStart:
    """
    A pyramid with the weights of a folder; its norms are new, and the decoder or classifier is left aside.

    Args:
        name: a folder, or a repository of the Hub; random weights of `architecture` if not given.
        architecture: what the network must be, if given.
        changes: keywords of the configuration that do not change the shapes of weights.
        out_features: the stages that are returned, all four if not given.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, or weights do not fit.
    """
    changes, notes = dict(changes or {}), []
    for key in ("out_features", "out_indices"):
        if key in changes:
            raise ValueError(f"--model sets {key}, but what reads the pyramid decides that: leave it out.")
    if out_features is not None:
        changes["out_features"] = list(out_features)
    if name is None:
        config = HiViTPyramidConfig.from_hivit(HiViTConfig.from_architecture(architecture), **changes)
        channels = config.num_channels
        mean, std = (list(values) if channels == 3 else [0.5] * channels for values in (IMAGENET_MEAN, IMAGENET_STD))
        return DenseStart(HiViTPyramid(config), mean, std, notes)
    config = read_config(name)
    if architecture is not None:
        check_architecture(config, architecture, name)
    config = HiViTPyramidConfig.from_hivit(config, **changes)
    with silent_transformers():
        backbone, loading = HiViTPyramid.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    misfits = [key for key, *_ in loading["mismatched_keys"]]
    tables = [key for key in loading["missing_keys"] if key.endswith("relative_position_bias_table")]
    misfits += [key for key in loading["missing_keys"] if key not in tables and not key.startswith("norms.")]
    if misfits:
        raise ValueError(
            f"The weights of {name} do not fit the network: {sorted(misfits)[0]} and {len(misfits) - 1} more are "
            "missing or of another shape. Leave the sizes in --model as they are, or choose another start."
        )
    if tables:
        notes.append(f"Not in {name}, so they start at zero: {len(tables)} relative position tables.")
    mean, std = normalization(name, config.num_channels)
    return DenseStart(backbone, mean, std, notes)
