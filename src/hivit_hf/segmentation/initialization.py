# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of UPerNet on a HiViT: a pre-training, a classifier, a segmentation model, random weights."""

from collections.abc import Sequence

from accelerate import PartialState
from transformers import AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

from ..modeling_hivit import HiViTBackbone
from ..training.dense import check_crop_size, check_trained, model_type_of
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
    name = model_args.model_name_or_path
    if not do_train and model_type_of(name) != UperNetConfig.model_type:
        read_config(name)
        raise ValueError(
            f"{name} is no segmentation model, so --do_train false would evaluate untrained heads: train one first, or "
            "give the folder of one."
        )
    changes = model_args.overrides() | {"drop_path_rate": model_args.drop_path_rate}
    made = load_segmenter(
        name, data_args.class_names, model_args.architecture, changes, data_args.crop_size, **model_args.heads()
    )
    for note in made.notes:
        PartialState().print(note)
    if model_args.freeze_backbone:
        made.model.backbone.hivit.requires_grad_(False)
    return made


def new_segmenter(
    initialization: Initialization,
    names: Sequence[str],
    head_channels: int = 512,
    auxiliary_channels: int = 256,
    auxiliary_weight: float = 0.4,
) -> Initialization:
    """
    UPerNet (arXiv 1807.10221) with new heads on a backbone: strides 4, 8, 16 and 32 for patches of 16 px.

    Args:
        initialization: the backbone, which becomes a part of the model.
        names: of the classes.
        head_channels: width of the decoder.
        auxiliary_channels: width of the auxiliary head, on stage 3.
        auxiliary_weight: of its loss; 0 for no such head.
    """
    config = UperNetConfig(
        backbone_config=initialization.model.config,
        hidden_size=head_channels,
        use_auxiliary_head=auxiliary_weight > 0,
        auxiliary_loss_weight=float(auxiliary_weight),
        auxiliary_channels=auxiliary_channels,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(initialization.model.state_dict())
    return Initialization(model, initialization.image_mean, initialization.image_std, initialization.notes)


def load_segmenter(
    name: str | None,
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
        name: where; random weights of `architecture` if not given.
        names: of the classes.
        architecture, changes: as in `initialize_backbone`.
        crop_size: side of the images in px that position embedding and relative position biases are interpolated to.
        head: as in `new_segmenter`; what is given must be what a segmentation model has.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, weights, classes or heads do not fit,
            or patches do not fill a crop.
    """
    if name is not None and model_type_of(name) == UperNetConfig.model_type:
        made = _load_whole(name, names, architecture, changes, **head)
        _resize(made.model.backbone, crop_size)
        return made
    initialization = initialize_backbone(name, architecture, changes)
    _resize(initialization.model, crop_size)
    return new_segmenter(initialization, names, **head)


def _resize(backbone: HiViTBackbone, crop_size: int | None):
    if crop_size is not None:
        check_crop_size(crop_size, backbone.config.patch_size)
        resize_for(backbone, crop_size)


def _load_whole(
    name: str, names: Sequence[str], architecture: str | None, changes: dict | None, **head
) -> Initialization:
    config = AutoConfig.from_pretrained(name)
    check_trained(config, name, names, "give the same --class_names, or begin with a HiViT")
    if architecture is not None:
        check_architecture(config.backbone_config, architecture, name)
    _check_heads(config, name, head)
    stages = {key: getattr(config.backbone_config, key) for key in PYRAMID}
    config.backbone_config = pyramid_config(config.backbone_config, **stages | (changes or {}))
    model, notes = load_fitting(UperNetForSemanticSegmentation, name, config)
    return Initialization(model, *normalization(name, config.backbone_config.num_channels), notes)


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
