# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of UPerNet on a HiViT: a pre-training, a classifier, a segmentation model, random weights."""

from collections.abc import Sequence

from accelerate import PartialState
from transformers import AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

from ..configuration_hivit import HiViTConfig, nearest_multiples
from ..modeling_hivit import HiViTBackbone
from ..training.initialization import (
    PYRAMID,
    Initialization,
    check_architecture,
    initialize_backbone,
    load_fitting,
    normalization,
    pyramid_config,
    read_config,
    resize_for,
)
from .arguments import SegmentationDataArguments, SegmentationModelArguments


def initialize_segmenter(
    model_args: SegmentationModelArguments, data_args: SegmentationDataArguments, do_train: bool = True
) -> Initialization:
    """
    UPerNet with the weights that the arguments ask for; notes on what is initialized are printed.

    Raises:
        ValueError: as `load_segmenter`; without training, also for weights that lack the heads.
    """
    names, crop_size = data_args.class_names, data_args.crop_size
    overrides = model_args.overrides() | {"drop_path_rate": model_args.drop_path_rate}
    if not do_train:
        check_segmenter(model_args.model_name_or_path)
    if model_args.from_scratch:
        start = initialize_backbone(None, model_args.architecture, overrides)
        resize_pyramid(start.model, crop_size)
        made = new_segmenter(start, names, **model_args.heads())
    else:
        made = load_segmenter(
            model_args.model_name_or_path, names, model_args.architecture, overrides, crop_size, **model_args.heads()
        )
    for note in made.notes:
        PartialState().print(note)
    return made


def new_segmenter(
    start: Initialization,
    names: Sequence[str],
    head_channels: int = 512,
    auxiliary_channels: int = 256,
    auxiliary_weight: float = 0.4,
) -> Initialization:
    """
    UPerNet (arXiv 1807.10221) with new heads on a backbone: strides 4, 8, 16 and 32 for patches of 16 px.

    Args:
        start: the backbone, which becomes a part of the model.
        names: of the classes.
        head_channels: width of the decoder.
        auxiliary_channels: width of the auxiliary head, on stage 3.
        auxiliary_weight: of its loss; 0 for no such head.
    """
    config = UperNetConfig(
        backbone_config=start.model.config,
        hidden_size=head_channels,
        use_auxiliary_head=auxiliary_weight > 0,
        auxiliary_loss_weight=float(auxiliary_weight),
        auxiliary_channels=auxiliary_channels,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(start.model.state_dict())
    return Initialization(model, start.image_mean, start.image_std, start.notes)


def load_segmenter(
    name: str,
    names: Sequence[str],
    architecture: str | None = None,
    changes: dict | None = None,
    crop_size: int | None = None,
    **head,
) -> Initialization:
    """
    UPerNet with the weights of a folder or a repository of the Hub: of a HiViT of any kind, with new heads, or of a
    segmentation model with the same classes and heads, as it is.

    Args:
        name: where.
        names: of the classes.
        architecture, changes: as in `initialize_backbone`.
        crop_size: side of the images in px that position embedding and relative position biases are interpolated to.
        head: as in `new_segmenter`; what is given must be what a segmentation model has.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, weights, classes or heads do not fit.
    """
    if _is_segmenter(name):
        return _load_whole(name, names, architecture, changes, crop_size, **head)
    start = initialize_backbone(name, architecture, changes)
    if crop_size is not None:
        resize_pyramid(start.model, crop_size)
    return new_segmenter(start, names, **head)


def check_segmenter(name: str):
    """ValueError if a folder or a repository of the Hub has no heads that were trained."""
    if not _is_segmenter(name):
        read_config(name)
        raise ValueError(
            f"{name} is no segmentation model, so --do_train false would evaluate untrained heads: train one first, or "
            "give the folder of one."
        )


def _is_segmenter(name: str) -> bool:
    try:
        return AutoConfig.from_pretrained(name).model_type == UperNetConfig.model_type
    except (OSError, ValueError):
        return False  # `read_config` says what it is


def _load_whole(
    name: str,
    names: Sequence[str],
    architecture: str | None,
    changes: dict | None,
    crop_size: int | None,
    **head,
) -> Initialization:
    config = AutoConfig.from_pretrained(name)
    if getattr(config.backbone_config, "model_type", None) != HiViTConfig.model_type:
        raise ValueError(f"{name} is no UPerNet with a HiViT inside: choose another model.")
    known = [config.id2label[number] for number in range(config.num_labels)]
    if known != list(names):
        raise ValueError(
            f"The segmentation model {name} has the {len(known)} classes {', '.join(known[:5])} ..., not the "
            f"{len(names)} of this dataset: give the same --class_names, or begin with a HiViT."
        )
    if architecture is not None:
        check_architecture(config.backbone_config, architecture, name)
    _check_heads(config, name, head)
    stages = {key: getattr(config.backbone_config, key) for key in PYRAMID}
    config.backbone_config = pyramid_config(config.backbone_config, **stages | (changes or {}))
    model, notes = load_fitting(UperNetForSemanticSegmentation, name, config)
    if crop_size is not None:
        resize_pyramid(model.backbone, crop_size)
    mean, std = normalization(name, config.backbone_config.num_channels)
    return Initialization(model, mean, std, notes)


def _check_heads(config: UperNetConfig, name: str, given: dict):
    has = {"head_channels": config.hidden_size, "auxiliary_weight": 0.0, "auxiliary_channels": 0}
    if config.use_auxiliary_head:
        has |= {"auxiliary_weight": config.auxiliary_loss_weight, "auxiliary_channels": config.auxiliary_channels}
    for key, value in given.items():
        if value != has[key]:
            raise ValueError(
                f"The segmentation model {name} has {key} {has[key]}, not {value}: leave out --{key}, or begin with a "
                "HiViT."
            )


def resize_pyramid(backbone: HiViTBackbone, crop_size: int):
    """Interpolates position embedding and relative position biases to crops. ValueError if patches do not fill them."""
    patch_size = backbone.config.patch_size
    if crop_size % patch_size:
        raise ValueError(
            f"crop_size must be a multiple of the patch size {patch_size}, got {crop_size}: take "
            f"{nearest_multiples(crop_size, patch_size)}."
        )
    resize_for(backbone, crop_size)
