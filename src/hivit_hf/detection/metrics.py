# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""COCO's average precision (AP) of boxes and masks, by pycocotools."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout

import numpy as np
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from .data import CocoAnnotations


BOX, MASK = "box", "mask"
_COCO_NAMES = {BOX: ("bbox", "segmentation"), MASK: ("segm", "bbox")}  # of the kind, and what it leaves out of results
_METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six numbers of COCOeval


def as_results(image_id: int, detections: dict, category_ids: Sequence[int]) -> list[dict]:
    """The detections of an image (`boxes`, `labels` from 1 on, `scores`, and `masks` if any) as COCO's results."""
    boxes = box_convert(detections["boxes"].float().cpu(), "xyxy", "xywh")
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), detections["labels"].tolist(), detections["scores"].float().tolist()
        )
    ]
    for result, mask in zip(results, detections.get("masks", [])):
        encoded = run_lengths.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        result["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return results


def average_precision(
    results: Sequence[dict], annotations: CocoAnnotations, image_ids: Sequence[int], kinds: Sequence[str] = (BOX,)
) -> dict[str, float]:
    """
    COCO's average precision over the IoU thresholds 0.5, 0.55, ... 0.95.

    Args:
        results: of `as_results`, of all images.
        annotations: the ground truth.
        image_ids: the images that were evaluated.
        kinds: `box`, `mask`.

    Returns:
        In [0, 1], for each kind `box_ap`, `box_ap50`, `box_ap75`, and by the size of the objects `box_ap_small` (up to
        32x32 px), `box_ap_medium` and `box_ap_large` (from 96x96 px) if there are any.
    """
    metrics = {}
    for kind in kinds:
        if not results:
            metrics |= {f"{kind}_{name}": 0.0 for name in _METRICS[:3]}
            continue
        coco_name, other = _COCO_NAMES[kind]
        with redirect_stdout(io.StringIO()):
            # pycocotools takes areas from boxes where there are any
            found = annotations.coco.loadRes([{k: v for k, v in one.items() if k != other} for one in results])
            evaluation = COCOeval(annotations.coco, found, coco_name)
            evaluation.params.imgIds = sorted(image_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = zip(_METRICS, evaluation.stats[:6].tolist())
        metrics |= {f"{kind}_{name}": value for name, value in values if value >= 0}
    return metrics
