# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of classifiers: a pre-training, another classifier, random weights; LoRA adapters."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import set_seed

from ..configuration_hivit import HiViTConfig
from ..data.labels import LabelEncoding
from ..modeling_hivit import HiViTForImageClassification
from ..training.initialization import (
    RELATIVE_POSITION_BIAS,
    Initialization,
    check_architecture,
    default_statistics,
    initialize_relative_position_biases,
    load_weights,
    normalization,
    read_config,
    resize_for,
)
from .arguments import ClassificationModelArguments, ClassificationTrainingArguments


if TYPE_CHECKING:
    from peft import PeftModel


def initialize_classifier(
    model_args: ClassificationModelArguments, labels: LabelEncoding, training_args: ClassificationTrainingArguments
) -> Initialization:
    """
    The classifier that a training begins with, the same for the same seed: with the weights of a pre-training or of
    another classifier, or random ones.

    The decoder of a pre-training is left out. What the weights lack (after the published pre-training the head, its
    norm and the relative position biases) is initialized and named in a note. The head of another classifier is kept
    only if it has the same class names in the same order.

    Raises:
        ValueError: if there is no HiViT, it is not of the recipe's architecture, weights do not fit, or a classifier
            that is only evaluated lacks weights.
    """
    set_seed(training_args.seed)
    overrides = model_args.overrides() | {"drop_path_rate": model_args.drop_path_rate}
    overrides |= {"id2label": dict(enumerate(labels.names)), "problem_type": labels.problem_type}
    overrides["label2id"] = {name: number for number, name in enumerate(labels.names)}
    made = _random(model_args, overrides) if model_args.from_scratch else _load(model_args, labels, overrides)
    if not training_args.do_train and (made.notes or model_args.from_scratch):
        raise ValueError(
            f"--do_train false evaluates a classifier that was trained on these labels. {' '.join(made.notes)}".strip()
        )
    return made


def _random(model_args: ClassificationModelArguments, overrides: dict) -> Initialization:
    if model_args.image_size is not None:
        overrides["image_size"] = model_args.image_size
    config = HiViTConfig.from_architecture(model_args.architecture, **overrides)
    model = HiViTForImageClassification(config)
    if model_args.head_init_std is not None:
        initialize_head(model, model_args.head_init_std)
    if model_args.init_relative_position_bias:
        initialize_relative_position_biases(model)
    return Initialization(model, *default_statistics(config.num_channels), [])


def _load(model_args: ClassificationModelArguments, labels: LabelEncoding, overrides: dict) -> Initialization:
    name, notes = model_args.model_name_or_path, []
    config = read_config(name)
    if model_args.architecture is not None:
        check_architecture(config, model_args.architecture, name)
    pretrained = not any("ImageClassification" in kind for kind in config.architectures or [])
    if pretrained:  # the published classifiers have it, the published pre-training has not
        overrides.setdefault("use_relative_position_bias", True)
    same_labels = not pretrained and [config.id2label[i] for i in range(config.num_labels)] == list(labels.names)
    changed, unknown = HiViTConfig.from_pretrained(name, return_unused_kwargs=True, **overrides)
    if unknown:
        raise ValueError(f"--config_overrides sets {', '.join(unknown)}, which no HiViT has: leave it out.")
    fresh = ("classifier.", "hivit.layernorm.")
    model, missing = load_weights(HiViTForImageClassification, name, changed, fresh)
    if not pretrained and not same_labels:
        missing |= {"classifier.weight", "classifier.bias"}
        notes.append(
            f"The classifier of {name} has {config.num_labels} labels that are not the {len(labels.names)} of this "
            "dataset: its head is re-initialized."
        )
    if "classifier.weight" in missing:
        initialize_head(model, model_args.head_init_std or config.initializer_range)
    biases = [key for key in missing if key.endswith(RELATIVE_POSITION_BIAS)]
    if biases and model_args.init_relative_position_bias:
        initialize_relative_position_biases(model)
    if missing and (pretrained or same_labels):
        notes.append(f"Not in {name}, so they are newly initialized: {_listed(missing, len(biases))}.")
    if model_args.image_size is not None:
        resize_for(model, model_args.image_size)
    return Initialization(model, *normalization(name, config.num_channels), notes)


def initialize_head(model: HiViTForImageClassification, std: float):
    """A new classifier: truncated normal weights, no bias."""
    nn.init.trunc_normal_(model.classifier.weight, std=std)
    nn.init.zeros_(model.classifier.bias)


def add_lora(model: HiViTForImageClassification, rank: int, base_model: str) -> "PeftModel":
    """
    The classifier with LoRA (arXiv 2106.09685) on the attention's projections; head and its norm are trained whole.

    Args:
        base_model: folder or repository where the adapted weights will be, which the adapter's configuration names.

    Raises:
        ValueError: if the rank is larger than the layers are wide.
    """
    from peft import LoraConfig, get_peft_model  # seconds that only LoRA should take

    if rank > model.config.hidden_size:
        raise ValueError(f"lora_r {rank} is more than the {model.config.hidden_size} channels: try 8 or 16.")
    whole = ["classifier", *(["layernorm"] if model.config.pooler_layernorm else [])]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["qkv", "proj"], modules_to_save=whole)
    adapted = get_peft_model(model, lora)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = base_model
    return adapted


def _listed(missing: set[str], num_biases: int) -> str:
    parts = ["the classifier"] if "classifier.weight" in missing else []
    parts += ["its norm"] if any(key.startswith("hivit.layernorm.") for key in missing) else []
    parts += [f"{num_biases} relative position biases"] if num_biases else []
    return ", ".join(parts)
