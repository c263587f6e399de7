# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Detectors on HiViT's pyramid: torchvision's Faster and Mask R-CNN, and Deformable DETR of transformers."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from transformers import (
    AutoBackbone,
    AutoConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput

from ..modeling_hivit import HiViTBackbone
from ..training.initialization import DenseStart


DETECTORS = ("mask_rcnn", "faster_rcnn", "deformable_detr")
_DETR_LEVELS = ["stage2", "stage3", "stage4"]  # strides 8, 16 and 32, as published; it adds one of 64 by itself


@strict
class HiViTRCNNConfig(PreTrainedConfig):
    r"""
    Configuration of `HiViTRCNN`. The defaults are the published detector.

    Args:
        backbone_config (`HiViTConfig`):
            Configuration of the backbone.
        predicts_masks (`bool`, *optional*, defaults to `True`):
            Mask R-CNN, or Faster R-CNN.
        fpn_channels (`int`, *optional*, defaults to 256):
            Channels of all levels of the feature pyramid network.
        box_head_channels (`int`, *optional*, defaults to 1024):
            Width of the two layers that classify a box.
        mask_head_channels (`int`, *optional*, defaults to 256):
            Channels of the four convolutions that draw a mask.
        anchor_strides (`int`, *optional*, defaults to 8):
            Side of the anchors of a level, in pixels of that level: 32 px where the stride is 4.
        canonical_size (`int`, *optional*):
            Side in px of the boxes whose features come from `stage3`; those of boxes half as large come from `stage2`.
            The size of the pre-training's images if unset, as in the feature pyramid network's paper.
        min_size (`int`, *optional*, defaults to 800):
            Shorter side in px that images are resized to, unless the longer one is then more than `max_size`.
        max_size (`int`, *optional*, defaults to 1333):
            Longest side in px.
        image_mean, image_std (`list[float]`, *optional*):
            Of each channel, of values in [0, 1]; ImageNet's if unset.
        max_proposals (`int`, *optional*, defaults to 1000):
            Proposals of a image that are looked at, twice as many when training.
        boxes_per_image (`int`, *optional*, defaults to 512):
            Proposals of a image that the heads learn from.
        score_threshold (`float`, *optional*, defaults to 0.05):
            Detections with a lower score are not returned.
        max_detections (`int`, *optional*, defaults to 100):
            Detections that are returned for a image at most.
    """

    model_type = "hivit_rcnn"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    predicts_masks: bool = True
    fpn_channels: int = 256
    box_head_channels: int = 1024
    mask_head_channels: int = 256
    anchor_strides: int = 8
    canonical_size: int | None = None
    min_size: int = 800
    max_size: int = 1333
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    max_proposals: int = 1000
    boxes_per_image: int = 512
    score_threshold: float = 0.05
    max_detections: int = 100

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)
        sizes = ["fpn_channels", "box_head_channels", "mask_head_channels", "anchor_strides", "min_size", "max_size"]
        for name in [*sizes, "max_proposals", "boxes_per_image", "max_detections", "canonical_size"]:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} must not exceed max_size {self.max_size}.")


@dataclass
class HiViTRCNNOutput(ModelOutput):
    """
    Output of `HiViTRCNN`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): the sum of `losses`.
        losses (`dict`, *optional*): of the proposals and of the heads, by name.
        detections (`list[dict]`, *optional*): for each image `boxes` `(n, 4)` as left, top, right, bottom in px,
            `labels` `(n,)` from 1 on, `scores` `(n,)`, and `masks` `(n, 1, H, W)` in [0, 1] if there are any.
    """

    loss: torch.Tensor | None = None
    losses: dict | None = None
    detections: list | None = None


class PyramidFPN(nn.Module):
    """HiViT's pyramid and a feature pyramid network (arXiv 1612.03144), as torchvision's detectors want a backbone."""

    def __init__(self, backbone: HiViTBackbone, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.pyramid = backbone
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels, LastLevelMaxPool())

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """(B, channels, H, W) -> five maps of (B, out_channels, ...), each half as large as the one before."""
        maps = self.pyramid(images).feature_maps
        return self.fpn(OrderedDict((str(level), feature_map) for level, feature_map in enumerate(maps)))


_DRAWS = {
    "fpn": partial(initialization.kaiming_uniform_, a=1),
    "proposals": partial(initialization.normal_, std=0.01),
    "boxes": partial(initialization.kaiming_uniform_, a=5**0.5),
    "masks": partial(initialization.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
}


def _mark(part: nn.Module, draw: str):
    """Names how the layers of a part are drawn."""
    for layer in part.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.draw = draw


class HiViTRCNN(PreTrainedModel):
    """
    torchvision's Mask R-CNN or Faster R-CNN on the pyramid of HiViT: `stage1`, `stage2`, `stage3` and `stage3`
    max-pooled, a LayerNorm each, FPN.

    Images may have any size: they are normalized, resized to `config.min_size` and padded to what HiViT needs. When
    training they are not resized.
    """

    config: HiViTRCNNConfig
    base_model_prefix = "rcnn"
    main_input_name = "images"
    supports_gradient_checkpointing = True

    def __init__(self, config: HiViTRCNNConfig):
        super().__init__(config)
        backbone = AutoBackbone.from_config(config.backbone_config)
        unit = config.backbone_config.patch_size
        strides = [unit // 4 * 2**level for level in range(5)]
        ratios = (0.5, 1.0, 2.0)
        canonical = config.canonical_size or math.prod(config.backbone_config.grid_size) ** 0.5 * unit
        rois = {"featmap_names": [str(level) for level in range(4)], "sampling_ratio": 2}
        rois |= {"canonical_scale": round(canonical), "canonical_level": round(math.log2(strides[2]))}
        classes, channels = config.num_labels + 1, config.fpn_channels  # 0 is background
        keywords = {
            "rpn_anchor_generator": AnchorGenerator([(config.anchor_strides * s,) for s in strides], [ratios] * 5),
            "rpn_head": RPNHead(channels, len(ratios)),
            "box_roi_pool": MultiScaleRoIAlign(output_size=7, **rois),
            "box_head": TwoMLPHead(channels * 7**2, config.box_head_channels),
            "box_predictor": FastRCNNPredictor(config.box_head_channels, classes),
            "rpn_pre_nms_top_n_train": 2 * config.max_proposals,
            "rpn_pre_nms_top_n_test": config.max_proposals,
            "rpn_post_nms_top_n_train": 2 * config.max_proposals,
            "rpn_post_nms_top_n_test": config.max_proposals,
            "box_batch_size_per_image": config.boxes_per_image,
            "box_score_thresh": config.score_threshold,
            "box_detections_per_img": config.max_detections,
            "min_size": config.min_size,
            "max_size": config.max_size,
            "image_mean": config.image_mean,
            "image_std": config.image_std,
            "size_divisible": 2 * unit,  # so that max-pooling comes out even
            "_skip_resize": True,  # when training: large-scale jitter has chosen the size
        }
        if config.predicts_masks:
            width = config.mask_head_channels
            keywords |= {
                "mask_roi_pool": MultiScaleRoIAlign(output_size=14, **rois),
                "mask_head": MaskRCNNHeads(channels, [width] * 4, 1),
                "mask_predictor": MaskRCNNPredictor(width, width, classes),
            }
        self.rcnn = (MaskRCNN if config.predicts_masks else FasterRCNN)(PyramidFPN(backbone, channels), **keywords)
        heads = self.rcnn.roi_heads
        _mark(self.rcnn.backbone.fpn, "fpn")
        _mark(self.rcnn.rpn, "proposals")
        _mark(nn.ModuleList([heads.box_head, heads.box_predictor]), "boxes")
        if config.predicts_masks:
            _mark(nn.ModuleList([heads.mask_head, heads.mask_predictor]), "masks")
        self.post_init()

    @property
    def pyramid(self) -> HiViTBackbone:
        """The backbone."""
        return self.rcnn.backbone.pyramid

    def _init_weights(self, module: nn.Module):
        """As torchvision draws them: loading leaves out what it does when it makes its layers."""
        if draw := getattr(module, "draw", None):
            _DRAWS[draw](module.weight)
            initialization.zeros_(module.bias)

    def forward(self, images: Sequence[torch.Tensor], targets: Sequence[dict] | None = None) -> HiViTRCNNOutput:
        """
        Args:
            images: images `(channels, H, W)`, values in [0, 1], each of its own size.
            targets: when training, for each image `boxes` `(n, 4)` as left, top, right, bottom in px, `labels` `(n,)`
                from 1 on, and `masks` `(n, H, W)` if they are predicted.

        Raises:
            ValueError: when training without targets.
        """
        if not self.training:
            return HiViTRCNNOutput(detections=self.rcnn(list(images)))
        if targets is None:
            raise ValueError("A detector in training mode needs targets: give them, or call model.eval() to detect.")
        losses = self.rcnn(list(images), list(targets))
        return HiViTRCNNOutput(loss=sum(losses.values()), losses=losses)


def build_detector(detector: str, start: DenseStart, names: Sequence[str], changes: dict | None = None):
    """
    A detector on a pyramid; all but the backbone is new.

    Args:
        detector: one of `DETECTORS`.
        start: the pyramid, with `out_features_of(detector)`, and the normalization of its images. What is frozen of
            it stays frozen.
        names: of the classes, without background.
        changes: keywords of the detector's configuration.

    Returns:
        `HiViTRCNN` or `DeformableDetrForObjectDetection`.

    Raises:
        ValueError: for keywords and values that the configuration does not take.
    """
    is_detr = detector == "deformable_detr"
    config_class = DeformableDetrConfig if is_detr else HiViTRCNNConfig
    changes = _head_changes(config_class, changes or {})
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    keywords = {"backbone_config": start.backbone.config, **labels}
    if is_detr:
        keywords |= {"with_box_refine": True}
    else:
        keywords |= {"predicts_masks": detector == "mask_rcnn", "image_mean": start.mean, "image_std": start.std}
    try:
        config = config_class(**keywords | changes)
    except (TypeError, StrictDataclassError) as error:
        sentence = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"--head does not fit: {sentence.rstrip('.')}.") from error
    if is_detr:
        _check_detr(config)
    model = DeformableDetrForObjectDetection(config) if is_detr else HiViTRCNN(config)
    backbone = pyramid_of(model)
    backbone.load_state_dict(start.backbone.state_dict())
    for own, given in zip(backbone.parameters(), start.backbone.parameters()):
        own.requires_grad_(given.requires_grad)
    return model


def _head_changes(config_class: type[PreTrainedConfig], changes: dict) -> dict:
    """Changes of fields that the detector has of its own, whole numbers as the fractions that they may stand for."""
    own = config_class.__annotations__
    unknown = sorted(set(changes) - set(own))
    if unknown:
        raise ValueError(f"--head sets {', '.join(unknown)}, which {config_class.__name__} does not have.")
    fractions = [name for name, kind in own.items() if kind in (float, "float") and type(changes.get(name)) is int]
    return changes | {name: float(changes[name]) for name in fractions}


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
    name: str, detector: str, names: Sequence[str], head: dict | None = None, sizes: tuple[int, int] | None = None
):
    """
    A trained detector, as it is.

    Args:
        name: a folder, or a repository of the Hub.
        detector: one of `DETECTORS` that it must be.
        names: the classes that it must have, without background.
        head: keywords of its configuration that it must have.
        sizes: shorter and longest side in px that an R-CNN then resizes images to.

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
    for key, value in _head_changes(type(config), head or {}).items():
        if getattr(config, key) != value:
            raise ValueError(
                f"The detector {name} has {key} {getattr(config, key)}, not {value}: leave it out of --head."
            )
    if detector == "deformable_detr":
        return DeformableDetrForObjectDetection.from_pretrained(name, config=config, dtype=torch.float32)
    if sizes is not None:
        config.min_size, config.max_size = sizes
    return HiViTRCNN.from_pretrained(name, config=config, dtype=torch.float32)


def is_detector(name: str) -> bool:
    """Whether a folder or repository is a detector, rather than a network to begin with."""
    try:
        return AutoConfig.from_pretrained(name).model_type in (HiViTRCNNConfig.model_type, "deformable_detr")
    except (OSError, ValueError, KeyError):
        return False  # `pyramid_start` says what it is


def pyramid_of(model: HiViTRCNN | DeformableDetrForObjectDetection) -> HiViTBackbone:
    """The backbone of a detector."""
    return model.pyramid if isinstance(model, HiViTRCNN) else model.model.backbone.model


def out_features_of(detector: str) -> list[str] | None:
    """The stages that a detector reads; None for all four."""
    return _DETR_LEVELS if detector == "deformable_detr" else None


class RCNNBatches:
    """From images to what `HiViTRCNN` takes, and from its output to detections."""

    def __call__(self, items: Sequence[dict], training: bool) -> dict:
        """Items of `CocoImages` -> `images`, and `targets` when training."""
        inputs = {"images": [item["image"].float() / 255 for item in items]}
        if training:
            kept = [name for name in ("boxes", "labels", "masks") if name in items[0]]
            inputs["targets"] = [{name: torch.as_tensor(item[name]) for name in kept} for item in items]
        return inputs

    def detections(self, output: HiViTRCNNOutput, sizes: Sequence[tuple[int, int]]) -> list[dict]:
        """For each image `boxes`, `labels`, `scores`, and boolean `masks` (n, H, W) if there are any."""
        found = [dict(detections) for detections in output.detections]
        for detections in found:
            if "masks" in detections:
                detections["masks"] = detections["masks"][:, 0] >= 0.5
        return found


class DetrBatches:
    """
    From images to what Deformable DETR takes, and from its output to detections.

    Args:
        processor: what `detr_processor` makes.
        crop_px: side of the images when training.
    """

    def __init__(self, processor: DeformableDetrImageProcessor, crop_px: int):
        self.processor, self.crop_px = processor, crop_px

    def __call__(self, items: Sequence[dict], training: bool) -> dict:
        """Items of `CocoImages` -> `pixel_values`, `pixel_mask`, and `labels` when training."""
        images = [torch.as_tensor(item["image"]) for item in items]
        if not training:
            return dict(self.processor(images=images, return_tensors="pt"))
        annotations = [{"image_id": item["image_id"], "annotations": _as_coco(item)} for item in items]
        square = {"height": self.crop_px, "width": self.crop_px}
        batch = self.processor(
            images=images, annotations=annotations, do_resize=False, pad_size=square, return_tensors="pt"
        )
        return {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"], "labels": batch["labels"]}

    def detections(self, output, sizes: Sequence[tuple[int, int]]) -> list[dict]:
        """For each image `boxes`, `labels` from 1 on, and `scores`."""
        found = self.processor.post_process_object_detection(output, threshold=0.0, target_sizes=list(sizes))
        return [{**detections, "labels": detections["labels"] + 1} for detections in found]


def _as_coco(item: dict) -> list[dict]:
    """The objects of an item as COCO's annotations, which the processor reads."""
    boxes = torch.as_tensor(item["boxes"])
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {"bbox": box, "category_id": label - 1, "area": box[2] * box[3], "iscrowd": 0}
        for box, label in zip(sides.tolist(), item["labels"].tolist())
    ]


def detr_processor(
    patch_size: int, min_size: int, max_size: int, mean: Sequence[float], std: Sequence[float]
) -> DeformableDetrImageProcessor:
    """The image processor of Deformable DETR, which pads to a square that HiViT's units fill: its pipelines need it."""
    side = -(-max_size // (2 * patch_size)) * 2 * patch_size
    return DeformableDetrImageProcessor(
        size={"shortest_edge": min_size, "longest_edge": max_size},
        pad_size={"height": side, "width": side},
        do_pad=True,
        image_mean=list(mean),
        image_std=list(std),
    )


AutoConfig.register(HiViTRCNNConfig.model_type, HiViTRCNNConfig, exist_ok=True)
