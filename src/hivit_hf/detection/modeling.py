# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Detectors on HiViT: torchvision's Faster and Mask R-CNN as a model of transformers; inputs and detections of these and
of transformers' Deformable DETR.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from transformers import (
    AutoBackbone,
    AutoConfig,
    DeformableDetrImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput

from ..modeling_hivit import HiViTBackbone


DETECTORS = ("mask_rcnn", "faster_rcnn", "deformable_detr")


@strict
class HiViTRCNNConfig(PreTrainedConfig):
    """
    Configuration of `HiViTRCNN`. The defaults are the published detector.

    Args:
        backbone_config: configuration of the backbone.
        predicts_masks: Mask R-CNN, or Faster R-CNN.
        fpn_channels: channels of all levels of the feature pyramid network.
        box_head_channels: width of the two layers that classify a box.
        mask_head_channels: channels of the four convolutions that predict a mask.
        anchor_strides: side of the anchors of a level, in pixels of that level: 32 px where the stride is 4.
        canonical_size: side in px of the boxes whose features come from `stage3`; those of boxes half as large come
            from `stage2`. The size of the pre-training's images if unset, as in the feature pyramid network's paper.
        min_size: shorter side in px that images are resized to, unless the longer one is then more than `max_size`.
        max_size: longest side in px.
        image_mean, image_std: of each channel, of values in [0, 1]; ImageNet's if unset.
        max_proposals: number of proposals per image, twice as many in training.
        boxes_per_image: number of proposals per image that the heads are trained on.
        score_threshold: detections with a lower score are not returned.
        max_detections: largest number of detections per image.
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
        loss: the sum of `losses`.
        losses: of the proposals and of the heads, by name.
        detections: for each image `boxes` (n, 4) as left, top, right, bottom in px, `labels` (n,) from 1 on, `scores`
            (n,), and `masks` (n, 1, H, W) in [0, 1] if there are any.
    """

    loss: torch.Tensor | None = None
    losses: dict | None = None
    detections: list | None = None


class PyramidFPN(nn.Module):
    """HiViT and a feature pyramid network (arXiv 1612.03144), as torchvision's detectors want a backbone."""

    def __init__(self, backbone: HiViTBackbone, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.pyramid = backbone
        self.fpn = FeaturePyramidNetwork(backbone.channels, out_channels, LastLevelMaxPool())

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """(B, channels, H, W) -> five maps of (B, out_channels, ...), each half as large as the one before."""
        maps = self.pyramid(images).feature_maps
        return self.fpn(OrderedDict((str(level), feature_map) for level, feature_map in enumerate(maps)))


_INITIALIZATIONS = {
    "fpn": partial(initialization.kaiming_uniform_, a=1),
    "proposals": partial(initialization.normal_, std=0.01),
    "boxes": partial(initialization.kaiming_uniform_, a=5**0.5),
    "masks": partial(initialization.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
}


def _mark(part: nn.Module, name: str):
    """Names the initialization of the layers of a part."""
    for layer in part.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.initialization = name


class HiViTRCNN(PreTrainedModel):
    """
    torchvision's Mask R-CNN or Faster R-CNN on the feature maps of HiViT: `stage1`, `stage2`, `stage3` and `stage3`
    max-pooled, a LayerNorm each, and a feature pyramid network (FPN).

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
        """As torchvision does when it makes its layers, which loading leaves out."""
        if name := getattr(module, "initialization", None):
            _INITIALIZATIONS[name](module.weight)
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


class RCNNBatches:
    """From images to what `HiViTRCNN` takes, and from its output to detections."""

    processor = None  # the model normalizes and resizes by itself

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
        processor: of `detr_processor`.
        crop_size: side of the training images in px.
    """

    def __init__(self, processor: DeformableDetrImageProcessor, crop_size: int):
        self.processor, self.crop_size = processor, crop_size

    def __call__(self, items: Sequence[dict], training: bool) -> dict:
        """Items of `CocoImages` -> `pixel_values`, `pixel_mask`, and `labels` when training."""
        images = [torch.as_tensor(item["image"]) for item in items]
        if not training:
            return dict(self.processor(images=images, return_tensors="pt"))
        annotations = [{"image_id": item["image_id"], "annotations": _as_coco(item)} for item in items]
        square = {"height": self.crop_size, "width": self.crop_size}
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
    boxes = box_convert(torch.as_tensor(item["boxes"]), "xyxy", "xywh")
    return [
        {"bbox": box, "category_id": label - 1, "area": box[2] * box[3], "iscrowd": 0}
        for box, label in zip(boxes.tolist(), item["labels"].tolist())
    ]


def detr_processor(
    patch_size: int, min_size: int, max_size: int, mean: Sequence[float], std: Sequence[float]
) -> DeformableDetrImageProcessor:
    """The image processor of Deformable DETR for HiViT: it pads to a square of whole patches in evaluation."""
    side = -(-max_size // (2 * patch_size)) * 2 * patch_size
    return DeformableDetrImageProcessor(
        size={"shortest_edge": min_size, "longest_edge": max_size},
        pad_size={"height": side, "width": side},
        do_pad=True,
        image_mean=list(mean),
        image_std=list(std),
    )


AutoConfig.register(HiViTRCNNConfig.model_type, HiViTRCNNConfig, exist_ok=True)
