"""Average precision."""

import pytest
import torch

from hivit_hf.detection.data import CocoImages, read_coco
from hivit_hf.detection.metrics import as_results, average_precision
from support.detection import annotations_of


def test_average_precision_of_perfect_shifted_and_missing_detections(scenes):
    coco = read_coco(annotations_of(scenes, "test"), scenes / "test")
    images = CocoImages(coco, coco.images, True)
    ids = [image["id"] for image in coco.images]

    def results(change):
        found = []
        for row in range(len(images)):
            item = images[row]
            shown = {"boxes": item["boxes"].clone(), "labels": item["labels"], "scores": torch.ones(len(item["boxes"]))}
            found += as_results(item["image_id"], change({**shown, "masks": item["masks"] > 0}), coco.category_ids)
        return found

    def shift(detections):
        width = detections["boxes"][:, 2] - detections["boxes"][:, 0]
        detections["boxes"][:, [0, 2]] += width[:, None] / 4  # overlap 3/5
        return detections

    perfect = average_precision(results(lambda d: d), coco, ids, ("box", "mask"))
    assert perfect["box_ap"] == perfect["mask_ap"] == pytest.approx(1.0)
    shifted = average_precision(results(shift), coco, ids, ("box", "mask"))
    assert shifted["box_ap50"] > 0.99 and shifted["box_ap75"] < 0.01 and shifted["mask_ap"] == pytest.approx(1.0)
    assert 0.2 < shifted["box_ap"] < 0.4  # thresholds 0.5, 0.55 and perhaps 0.6 of ten
    half = average_precision([r for r in results(lambda d: d) if r["image_id"] in ids[:2]], coco, ids)
    only = average_precision([r for r in results(lambda d: d) if r["image_id"] in ids[:2]], coco, ids[:2])
    assert half["box_ap"] < 0.9 and only["box_ap"] == pytest.approx(1.0)
    assert average_precision([], coco, ids)["box_ap"] == 0.0
    wrong = average_precision(results(lambda d: d | {"labels": d["labels"] % 10 + 1}), coco, ids)
    assert wrong["box_ap"] < 0.5
