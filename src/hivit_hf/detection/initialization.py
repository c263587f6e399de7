# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of detectors: a trained detector, or new heads on a pre-training, any other HiViT, random weights."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DeformableDetrConfig, DeformableDetrForObjectDetection, PreTrainedConfig

from ..modeling_hivit import HiViTBackbone
from ..training.dense import check_crop_size, check_trained, model_type_of
from ..training.initialization import (
    Initialization,
    check_architecture,
    initialize_backbone,
    normalization,
    reading_weights,
)
from .arguments import DetectionDataArguments, DetectionModelArguments
from .modeling import DetrBatches, HiViTRCNN, HiViTRCNNConfig, RCNNBatches, detr_processor


_DETR_LEVELS = ["stage2", "stage3", "stage4"]  # strides 8, 16 and 32, as published; it adds one of 64 by itself


def initialize_detector(
    model_args: DetectionModelArguments, data_args: DetectionDataArguments, names: Sequence[str], do_train: bool = True
) -> Initialization:
    """
    The detector that the arguments ask for, with the normalization of its images. Notes on its weights are printed.

    Args:
        model_args: which weights and which detector.
        data_args: normalization and sizes of the images.
        names: of the classes, without background.
        do_train: whether it is trained; if not, it must be a detector already.

    Raises:
        ValueError: for weights that are no HiViT, or another detector or network than the arguments ask for, and for
            overrides that do not fit.
    """
    name, detector, changes = model_args.model_name_or_path, model_args.detector, model_args.detector_changes()
    sizes = {"min_size": data_args.eval_min_size, "max_size": data_args.eval_max_size}
    sizes = {} if detector == "deformable_detr" else sizes
    if name is not None and model_type_of(name) in (HiViTRCNNConfig.model_type, "deformable_detr"):
        made = _load_detector(model_args, data_args, names, sizes)
    elif not do_train:
        raise ValueError(f"{name} is no detector: train one first, without --do_train false.")
    else:
        overrides = model_args.overrides() | {"drop_path_rate": model_args.drop_path_rate}
        initialization = initialize_backbone(name, model_args.architecture, overrides, out_features_of(detector))
        mean, std = initialization.statistics(data_args, initialization.model.config.num_channels)
        initialization = replace(initialization, image_mean=mean, image_std=std)
        made = replace(initialization, model=build_detector(detector, initialization, names, changes | sizes))
    for note in made.notes:
        PartialState().print(note)
    if model_args.freeze_backbone:
        backbone_of(made.model).hivit.requires_grad_(False)
    return made


def build_detector(
    detector: str, initialization: Initialization, names: Sequence[str], changes: dict | None = None
) -> HiViTRCNN | DeformableDetrForObjectDetection:
    """
    A detector with new heads on a backbone.

    Args:
        detector: one of `DETECTORS`.
        initialization: the backbone, with `out_features_of(detector)`, and the normalization of its images.
        names: of the classes, without background.
        changes: keywords of the detector's configuration.

    Raises:
        ValueError: for keywords and values that the configuration does not take.
    """
    is_detr = detector == "deformable_detr"
    config_class = DeformableDetrConfig if is_detr else HiViTRCNNConfig
    changes = _own_fields(config_class, changes or {})
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    keywords = {"backbone_config": initialization.model.config, **labels}
    if is_detr:
        keywords |= {"with_box_refine": True}
    else:
        keywords |= {"predicts_masks": detector == "mask_rcnn"}
        keywords |= {"image_mean": initialization.image_mean, "image_std": initialization.image_std}
    try:
        config = config_class(**keywords | changes)
    except (TypeError, StrictDataclassError) as error:
        sentence = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"--detector_overrides does not fit: {sentence.rstrip('.')}.") from error
    if is_detr:
        _check_detr(config)
    model = DeformableDetrForObjectDetection(config) if is_detr else HiViTRCNN(config)
    backbone_of(model).load_state_dict(initialization.model.state_dict())
    return model


def _own_fields(config_class: type[PreTrainedConfig], changes: dict) -> dict:
    """Changes of fields that the detector has of its own, with integers as floats where these are meant."""
    own = config_class.__annotations__
    unknown = sorted(set(changes) - set(own))
    if unknown:
        raise ValueError(
            f"--detector_overrides sets {', '.join(unknown)}, which {config_class.__name__} does not have."
        )
    floats = [name for name, kind in own.items() if kind in (float, "float") and type(changes.get(name)) is int]
    return changes | {name: float(changes[name]) for name in floats}


def _check_detr(config: DeformableDetrConfig):
    """What transformers would only stumble over later."""
    least = {"num_queries": 1, "decoder_layers": 2, "encoder_layers": 1, "num_feature_levels": len(_DETR_LEVELS)}
    for name, number in least.items():
        if getattr(config, name) < number:
            raise ValueError(f"Deformable DETR needs {name} of at least {number}, got {getattr(config, name)}.")
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        heads = getattr(config, name)
        if heads < 1 or config.d_model % (2 * heads):  # half of the channels are of the position's height
            raise ValueError(f"d_model {config.d_model} must be a multiple of twice the {name}, {heads}.")


def _load_detector(
    model_args: DetectionModelArguments, data_args: DetectionDataArguments, names: Sequence[str], sizes: dict[str, int]
) -> Initialization:
    """A trained detector, which must be what the arguments say; `sizes` in px are changed of an R-CNN."""
    name = model_args.model_name_or_path
    config = AutoConfig.from_pretrained(name)
    found = config.model_type
    if isinstance(config, HiViTRCNNConfig):
        found = "mask_rcnn" if config.predicts_masks else "faster_rcnn"
    if found != model_args.detector:
        raise ValueError(
            f"{name} is a {found}, not a {model_args.detector}: give --detector {found}, or another folder."
        )
    check_trained(config, name, names, "take annotations of the same categories")
    backbone, overrides = config.backbone_config, model_args.overrides()
    if model_args.architecture is not None:
        check_architecture(backbone, model_args.architecture, name, overrides)
    if isinstance(config, HiViTRCNNConfig):
        mean, std = config.image_mean, config.image_std
    else:
        mean, std = normalization(name, backbone.num_channels)
    statistics = SimpleNamespace(image_mean=mean, image_std=std)
    given_statistics = {key: getattr(data_args, key) or own for key, own in vars(statistics).items()}
    for source, known, given in (
        ("--detector_overrides", config, _own_fields(type(config), model_args.detector_changes())),
        ("--config_overrides", backbone, overrides),
        ("the flags", statistics, given_statistics),
    ):
        for key, value in given.items():
            own = getattr(known, key, None)
            if own != value:
                raise ValueError(f"The detector {name} has {key} {own}, not {value}: leave it out of {source}.")
    config.update(sizes)
    model_class = HiViTRCNN if isinstance(config, HiViTRCNNConfig) else DeformableDetrForObjectDetection
    with reading_weights(name):
        model = model_class.from_pretrained(name, config=config, dtype=torch.float32)
    return Initialization(model, mean, std, [])


def backbone_of(model: HiViTRCNN | DeformableDetrForObjectDetection) -> HiViTBackbone:
    """The backbone of a detector."""
    return model.pyramid if isinstance(model, HiViTRCNN) else model.model.backbone.model


def out_features_of(detector: str) -> list[str] | None:
    """The stages that a detector reads; None for all four."""
    return _DETR_LEVELS if detector == "deformable_detr" else None


def make_batches(initialization: Initialization, data_args: DetectionDataArguments) -> RCNNBatches | DetrBatches:
    """Inputs and detections of a detector. Raises ValueError for Deformable DETR and crops that patches do not fill."""
    if isinstance(initialization.model, HiViTRCNN):
        return RCNNBatches()
    patch_size = backbone_of(initialization.model).config.patch_size
    check_crop_size(data_args.crop_size, patch_size)
    sizes = (data_args.eval_min_size, data_args.eval_max_size)
    processor = detr_processor(patch_size, *sizes, initialization.image_mean, initialization.image_std)
    return DetrBatches(processor, data_args.crop_size)
