# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of detectors: a trained detector, or new heads on a pre-training, any other HiViT, random weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, DeformableDetrConfig, DeformableDetrForObjectDetection, PreTrainedConfig

from ..configuration_hivit import nearest_multiples
from ..modeling_hivit import HiViTBackbone
from ..training.initialization import Initialization, check_architecture, initialize_backbone, normalization
from .arguments import DetectionDataArguments, DetectionModelArguments
from .modeling import DetrBatches, HiViTRCNN, HiViTRCNNConfig, RCNNBatches, detr_processor


_DETR_LEVELS = ["stage2", "stage3", "stage4"]  # strides 8, 16 and 32, as published; it adds one of 64 by itself


def initialize_detector(
    model_args: DetectionModelArguments,
    data_args: DetectionDataArguments,
    names: Sequence[str],
    do_train: bool = True,
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
    if name is not None and is_detector(name):
        model = load_detector(name, detector, names, changes, sizes)
        made = Initialization(model, *_check_trained(model, model_args, data_args), [])
    elif not do_train:
        raise ValueError(f"{name} is no detector: train one first, without --do_train false.")
    else:
        overrides = model_args.overrides() | {"drop_path_rate": model_args.drop_path_rate}
        start = initialize_backbone(name, model_args.architecture, overrides, out_features_of(detector))
        mean, std = start.statistics(data_args, start.model.config.num_channels)
        start = replace(start, image_mean=mean, image_std=std)
        model = build_detector(detector, start, names, changes | (sizes if detector != "deformable_detr" else {}))
        made = replace(start, model=model)
    for note in made.notes:
        PartialState().print(note)
    if model_args.freeze_backbone:
        backbone_of(made.model).hivit.requires_grad_(False)
    return made


def _check_trained(
    model: HiViTRCNN | DeformableDetrForObjectDetection,
    model_args: DetectionModelArguments,
    data_args: DetectionDataArguments,
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of a trained detector, which must be what the arguments say."""
    name, config, overrides = model_args.model_name_or_path, backbone_of(model).config, model_args.overrides()
    if isinstance(model, HiViTRCNN):
        mean, std = model.config.image_mean, model.config.image_std
    else:
        mean, std = normalization(name, config.num_channels)
    if model_args.architecture is not None:
        check_architecture(config, model_args.architecture, name, overrides)
    wanted = {f"{key} in --config_overrides": (getattr(config, key, None), value) for key, value in overrides.items()}
    wanted["--image_mean"] = (mean, data_args.image_mean or mean)
    wanted["--image_std"] = (std, data_args.image_std or std)
    for what, (own, value) in wanted.items():
        if own != value:
            raise ValueError(f"The detector {name} has {own}, not {what} {value}: leave that out.")
    return mean, std


def build_detector(
    detector: str, start: Initialization, names: Sequence[str], changes: dict | None = None
) -> HiViTRCNN | DeformableDetrForObjectDetection:
    """
    A detector with new heads on a backbone.

    Args:
        detector: one of `DETECTORS`.
        start: the backbone, with `out_features_of(detector)`, and the normalization of its images. What is frozen of
            it stays frozen.
        names: of the classes, without background.
        changes: keywords of the detector's configuration.

    Raises:
        ValueError: for keywords and values that the configuration does not take.
    """
    is_detr = detector == "deformable_detr"
    config_class = DeformableDetrConfig if is_detr else HiViTRCNNConfig
    changes = _own_fields(config_class, changes or {})
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    keywords = {"backbone_config": start.model.config, **labels}
    if is_detr:
        keywords |= {"with_box_refine": True}
    else:
        keywords |= {
            "predicts_masks": detector == "mask_rcnn",
            "image_mean": start.image_mean,
            "image_std": start.image_std,
        }
    try:
        config = config_class(**keywords | changes)
    except (TypeError, StrictDataclassError) as error:
        sentence = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"--detector_overrides does not fit: {sentence.rstrip('.')}.") from error
    if is_detr:
        _check_detr(config)
    model = DeformableDetrForObjectDetection(config) if is_detr else HiViTRCNN(config)
    backbone = backbone_of(model)
    backbone.load_state_dict(start.model.state_dict())
    for own, given in zip(backbone.parameters(), start.model.parameters()):
        own.requires_grad_(given.requires_grad)
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


def load_detector(
    name: str, detector: str, names: Sequence[str], changes: dict | None = None, sizes: dict[str, int] | None = None
) -> HiViTRCNN | DeformableDetrForObjectDetection:
    """
    A trained detector, as it is.

    Args:
        name: a folder, or a repository of the Hub.
        detector: one of `DETECTORS` that it must be.
        names: the classes that it must have, without background.
        changes: keywords of its configuration that it must have.
        sizes: `min_size` and `max_size` in px that an R-CNN resizes images to from now on.

    Raises:
        ValueError: if it is another detector, has other classes, or other numbers.
    """
    config = AutoConfig.from_pretrained(name)
    found = config.model_type
    if isinstance(config, HiViTRCNNConfig):
        found = "mask_rcnn" if config.predicts_masks else "faster_rcnn"
    if found != detector:
        raise ValueError(f"{name} is a {found}, not a {detector}: give --detector {found}, or another folder.")
    known = [config.id2label[number] for number in range(config.num_labels)]
    if known != list(names):
        raise ValueError(
            f"The detector {name} has the {len(known)} classes {', '.join(known[:5])} ..., not the {len(names)} of the "
            f"annotations, {', '.join(names[:5])} ...: take annotations of the same categories."
        )
    for key, value in _own_fields(type(config), changes or {}).items():
        if getattr(config, key) != value:
            raise ValueError(
                f"The detector {name} has {key} {getattr(config, key)}, not {value}: leave it out of "
                "--detector_overrides."
            )
    if detector == "deformable_detr":
        return DeformableDetrForObjectDetection.from_pretrained(name, config=config, dtype=torch.float32)
    config.update(sizes or {})
    return HiViTRCNN.from_pretrained(name, config=config, dtype=torch.float32)


def is_detector(name: str) -> bool:
    """Whether a folder or repository is a detector, rather than a network to begin with."""
    try:
        return AutoConfig.from_pretrained(name).model_type in (HiViTRCNNConfig.model_type, "deformable_detr")
    except (OSError, ValueError, KeyError):
        return False  # `initialize_backbone` says what it is


def backbone_of(model: HiViTRCNN | DeformableDetrForObjectDetection) -> HiViTBackbone:
    """The backbone of a detector."""
    return model.pyramid if isinstance(model, HiViTRCNN) else model.model.backbone.model


def out_features_of(detector: str) -> list[str] | None:
    """The stages that a detector reads; None for all four."""
    return _DETR_LEVELS if detector == "deformable_detr" else None


def make_batches(start: Initialization, data_args: DetectionDataArguments) -> RCNNBatches | DetrBatches:
    """Inputs and detections of a detector. Raises ValueError for Deformable DETR and crops that patches do not fill."""
    if isinstance(start.model, HiViTRCNN):
        return RCNNBatches()
    crop, patch = data_args.crop_size, backbone_of(start.model).config.patch_size
    if crop % patch:
        nearest = nearest_multiples(crop, patch)
        raise ValueError(f"crop_size must be a multiple of the patch size {patch}, got {crop}: take {nearest}.")
    sizes = (data_args.eval_min_size, data_args.eval_max_size)
    return DetrBatches(detr_processor(patch, *sizes, start.image_mean, start.image_std), crop)
