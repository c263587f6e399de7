# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Classifiers to begin with: from a pre-training, from another classifier, at random, or with a LoRA adapter."""

from collections.abc import Sequence

import torch
from torch import nn

from ..configuration_hivit import HiViTConfig
from ..image_processing import IMAGENET_MEAN, IMAGENET_STD
from ..modeling_hivit import HiViTForImageClassification
from ..training.initialization import (
    Start,
    check_architecture,
    draw_tables,
    normalization,
    read_config,
    resize_for,
    silent_transformers,
)


def random_classifier(
    architecture: str,
    names: Sequence[str],
    problem_type: str,
    changes: dict | None = None,
    head_init_std: float | None = None,
    draw_relative_tables: bool = False,
) -> Start:
    """
    A classifier with random weights.

    Args:
        architecture: one of `ARCHITECTURES`.
        names: of its outputs.
        problem_type: what it learns.
        changes: keywords of the configuration.
        head_init_std: deviation of the classifier's weights; as all others if not given.
        draw_relative_tables: whether relative tables start at random, as in the original's supervised training, or at
            zero, as in its fine-tuning.
    """
    config = HiViTConfig.from_architecture(architecture, **(changes or {}), **_labels(names, problem_type))
    model = HiViTForImageClassification(config)
    if head_init_std is not None:
        draw_head(model, head_init_std)
    if draw_relative_tables:
        draw_tables(model)
    channels = config.num_channels
    mean, std = (list(v) if channels == 3 else [0.5] * channels for v in (IMAGENET_MEAN, IMAGENET_STD))
    return Start(model, mean, std, [])


def load_classifier(
    name: str,
    names: Sequence[str],
    problem_type: str,
    architecture: str | None = None,
    changes: dict | None = None,
    image_size: int | None = None,
    head_init_std: float | None = None,
    draw_relative_tables: bool = False,
) -> Start:
    """
    A classifier with the weights of a pre-training or of another classifier. The decoder is left aside; what the
    weights lack (after the published pre-training the head, its norm and the relative tables) starts fresh and is named
    in a note. The head of another classifier is kept only if it has the same names in the same order.

    Args:
        name: a folder, or a repository of the Hub.
        names: of the outputs.
        problem_type: what it learns.
        architecture: what the network must be, if given.
        changes: keywords of the configuration that do not change the shapes of other weights.
        image_size: side of the images in px; position embedding and relative tables are interpolated to it.
        head_init_std, draw_relative_tables: as in `random_classifier`, for what starts fresh.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, or weights do not fit.
    """
    config = read_config(name)
    if architecture is not None:
        check_architecture(config, architecture, name)
    changes, notes = dict(changes or {}), []
    pretrained = not any("ImageClassification" in kind for kind in config.architectures or [])
    if pretrained:  # the published classifiers have it, the published pre-training has not
        changes.setdefault("use_relative_position_bias", True)
    same_labels = not pretrained and [config.id2label[i] for i in range(config.num_labels)] == list(names)
    with silent_transformers():
        model, loading = HiViTForImageClassification.from_pretrained(
            name,
            **changes,
            **_labels(names, problem_type),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fresh = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    allowed = ("classifier.", "hivit.layernorm.")
    lacking = sorted(
        key for key in fresh if not key.startswith(allowed) and not key.endswith("relative_position_bias_table")
    )
    tables_of_other_sizes = [key for key, *_ in loading["mismatched_keys"] if "relative_position" in key]
    if lacking or tables_of_other_sizes:
        raise ValueError(
            f"The weights of {name} do not fit the network: {(lacking or tables_of_other_sizes)[0]} and "
            f"{len(lacking or tables_of_other_sizes) - 1} more are missing or of another shape. Leave the sizes in "
            "--model as they are, or choose another start."
        )
    if not pretrained and not same_labels:
        fresh |= {"classifier.weight", "classifier.bias"}
        notes.append(
            f"The classifier of {name} has {config.num_labels} labels that are not the {len(names)} of this dataset: "
            "its head starts fresh."
        )
    if "classifier.weight" in fresh:
        draw_head(model, config.initializer_range if head_init_std is None else head_init_std)
    tables = [key for key in fresh if key.endswith("relative_position_bias_table")]
    if tables and draw_relative_tables:
        draw_tables(model)
    if fresh and (pretrained or same_labels):
        notes.append(f"Not in {name}, so they start fresh: {_named(fresh, len(tables))}.")
    if image_size is not None:
        resize_for(model, image_size)
    mean, std = normalization(name, config.num_channels)
    return Start(model, mean, std, notes)


def draw_head(model: HiViTForImageClassification, std: float):
    """A new classifier: truncated normal weights, no bias."""
    nn.init.trunc_normal_(model.classifier.weight, std=std)
    nn.init.zeros_(model.classifier.bias)


def add_lora(model: HiViTForImageClassification, rank: int):
    """
    The classifier with LoRA (arXiv 2106.09685) on the attention's projections; head and its norm are learned whole.

    Raises:
        ValueError: if the rank is larger than the layers are wide.
    """
    from peft import LoraConfig, get_peft_model  # seconds that only LoRA should take

    if rank > model.config.hidden_size:
        raise ValueError(f"lora_rank {rank} is more than the {model.config.hidden_size} channels: try 8 or 16.")
    whole = ["classifier", *(["layernorm"] if model.config.pooler_layernorm else [])]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv", "proj"], modules_to_save=whole)
    return get_peft_model(model, lora)


def _labels(names: Sequence[str], problem_type: str) -> dict:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": problem_type,
    }


def _named(fresh: set[str], num_tables: int) -> str:
    parts = ["the classifier"] if "classifier.weight" in fresh else []
    parts += ["its norm"] if any(key.startswith("hivit.layernorm.") for key in fresh) else []
    parts += [f"{num_tables} relative position tables"] if num_tables else []
    return ", ".join(parts)
