# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Average precision, by pycocotools."""

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout

import numpy as np
import torch
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .data import CocoAnnotations


BOX, MASK = "box", "mask"
_COCO_NAMES = {BOX: "bbox", MASK: "segm"}
_METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six numbers of COCOeval


def as_results(image_id: int, detections: dict, category_ids: Sequence[int]) -> list[dict]:
    """A image's detections (`boxes`, `labels` from 1 on, `scores`, and `masks` if any) as COCO wants results."""
    boxes = detections["boxes"].float().cpu()
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    results = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            sides.tolist(), detections["labels"].tolist(), detections["scores"].float().tolist()
        )
    ]
    for result, mask in zip(results, detections.get("masks", [])):
        encoded = run_lengths.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        result["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return results


def average_precision(
    results: Sequence[dict], coco: CocoAnnotations, image_ids: Iterable[int], kinds: Sequence[str] = (BOX,)
) -> dict[str, float]:
    """
    COCO's average precision by pycocotools, over the overlaps 0.5, 0.55, ... 0.95.

    Args:
        results: of `as_results`, of all images.
        coco: the truth.
        image_ids: the images that were looked at.
        kinds: `box`, `mask`.

    Returns:
        In [0, 1], for each kind `box_ap`, `box_ap50`, `box_ap75`, and by the size of the objects `box_ap_small` (up to
        32x32 px), `box_ap_medium` and `box_ap_large` (from 96x96 px) if there are any.
    """
    image_ids, metrics = sorted(image_ids), {}
    with redirect_stdout(io.StringIO()):
        truth = _truth(coco, image_ids, MASK in kinds)
        found = truth.loadRes([dict(result) for result in results]) if results else None
        for kind in kinds:
            if found is None:
                metrics |= {f"{kind}_{name}": 0.0 for name in _METRICS[:3]}
                continue
            evaluation = COCOeval(truth, _bare(found, kind), _COCO_NAMES[kind])
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = dict(zip(_METRICS, evaluation.stats[:6].tolist()))
            metrics |= {f"{kind}_{name}": value for name, value in values.items() if value >= 0}
    return metrics


def _bare(found: COCO, kind: str) -> COCO:
    """pycocotools takes areas from what the first result has: boxes by boxes, masks by masks."""
    for annotation in found.dataset["annotations"]:
        if kind == BOX:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        else:
            annotation["area"] = float(run_lengths.area(annotation["segmentation"]))
    return found


def _truth(coco: CocoAnnotations, image_ids: Sequence[int], with_masks: bool) -> COCO:
    """pycocotools' object. It takes an annotation with the id 0 for none, so they are counted from 1."""
    wanted, annotations = set(image_ids), []
    images = [image for image in coco.images if image["id"] in wanted]
    for image in images:
        for annotation in coco.objects[image["id"]]:
            kept = {name: annotation[name] for name in ("image_id", "category_id", "bbox", "iscrowd")}
            kept["area"] = annotation.get("area") or annotation["bbox"][2] * annotation["bbox"][3]
            if with_masks:
                kept["segmentation"] = annotation["segmentation"]
            annotations.append({"id": len(annotations) + 1, **kept})
    truth = COCO()
    categories = [{"id": number, "name": name} for number, name in zip(coco.category_ids, coco.names)]
    truth.dataset = {"images": images, "annotations": annotations, "categories": categories}
    truth.createIndex()
    return truth
