# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Model soups (arXiv 2203.05482): averages of the weights of several classifiers."""

import json
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling_hivit import HiViTForImageClassification
from .evaluation import load_for_evaluation


def average_weights(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of the weights of several models, tensor by tensor."""
    return {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in states[0]}


def soup(
    folders: Sequence[str], kind: str, accuracy: Callable[[PreTrainedModel, BaseImageProcessor], float]
) -> tuple[HiViTForImageClassification, BaseImageProcessor, dict]:
    """
    One classifier from several that were fine-tuned from the same initialization (arXiv 2203.05482).

    Args:
        folders: of the classifiers.
        kind: `"uniform"` averages all; `"greedy"` begins with the best, and adds each next one that does not lower the
            accuracy.
        accuracy: validation accuracy of a classifier with its image processor, for `"greedy"`.

    Returns:
        The classifier, its processor, and a record: `ingredients`, and for greedy the `accuracy` of each folder.

    Raises:
        ValueError: for fewer than two folders, and for classifiers that differ in network, labels or image processor.
    """
    if len(folders) < 2:
        raise ValueError(f"A soup needs two folders or more, got {len(folders)}: give more --model_name_or_path.")
    models, processors = [], []
    for folder in folders:
        model, processor = load_for_evaluation(folder)
        if not isinstance(model, HiViTForImageClassification) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(f"{folder} is an adapter: a soup is made of whole classifiers.")
        if models:
            _check_same_network(models[0], model, folders[0], folder)
            _check_same_processor(processors[0], processor, folders[0], folder)
        models.append(model)
        processors.append(processor)
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    pot = models[0]
    if kind == "uniform":
        pot.load_state_dict(average_weights(states))
        return pot, processor, {"kind": kind, "ingredients": list(folders)}
    scores = {folder: accuracy(model, processor) for folder, model in zip(folders, models)}
    order = sorted(range(len(folders)), key=lambda index: -scores[folders[index]])
    taken, best = [order[0]], scores[folders[order[0]]]
    for index in order[1:]:
        pot.load_state_dict(average_weights([states[i] for i in [*taken, index]]))
        if (score := accuracy(pot, processor)) >= best:
            taken, best = [*taken, index], score
    pot.load_state_dict(average_weights([states[i] for i in taken]))
    return pot, processor, {"kind": kind, "ingredients": [folders[i] for i in taken], "accuracy": scores}


def _check_same_network(first, other, first_name: str, other_name: str):
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (first, other)]
    if shapes[0] != shapes[1] or first.config.id2label != other.config.id2label:
        raise ValueError(
            f"{first_name} and {other_name} have other networks or labels: a soup is made of classifiers that were "
            "fine-tuned from the same initialization on the same dataset."
        )


def _check_same_processor(first: BaseImageProcessor, other: BaseImageProcessor, first_name: str, other_name: str):
    settings = [_what_it_does(processor) for processor in (first, other)]
    for field, value in settings[0].items():
        if settings[1][field] != value:
            raise ValueError(
                f"{first_name} and {other_name} have image processors of another {field}, {value} and "
                f"{settings[1][field]}: a soup is made of classifiers with the same transform."
            )


def _what_it_does(processor: BaseImageProcessor) -> dict:
    """The settings of an image processor that change its output; None where a step is left out."""
    steps = {"size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop"}
    steps |= {"rescale_factor": "do_rescale", "image_mean": "do_normalize", "image_std": "do_normalize"}
    known = json.loads(processor.to_json_string())
    return {field: known.get(field) if known.get(step) else None for field, step in steps.items()}
