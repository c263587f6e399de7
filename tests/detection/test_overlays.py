"""Images with annotated and detected objects."""

import numpy as np
import torch

from hivit_hf.detection import overlays
from hivit_hf.detection.data import CocoImages, read_coco
from hivit_hf.detection.overlays import draw_detections
from support.detection import annotations_of


def test_drawings_have_names_and_scores_of_what_is_above_the_threshold(scenes, monkeypatch):
    annotations = read_coco(annotations_of(scenes, "test"), scenes / "test")
    item = CocoImages(annotations, annotations.images[:1], True)[0]
    scores = torch.linspace(0.9, 0.1, len(item["labels"]))
    found = [{"boxes": item["boxes"], "labels": item["labels"], "scores": scores, "masks": item["masks"] > 0}]
    texts, draw = [], overlays.draw_bounding_boxes
    monkeypatch.setattr(overlays, "draw_bounding_boxes", lambda *args, **kw: texts.append(args[2]) or draw(*args, **kw))
    sheets = [draw_detections([item], found, annotations.names, threshold) for threshold in (0.0, 0.5, 1.0)]
    names = [annotations.names[label - 1] for label in item["labels"].tolist()]
    annotated, every, _, some, _ = texts  # nothing is drawn of what has no object
    assert annotated == names and every == [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist())]
    assert some == every[: int((scores >= 0.5).sum())]
    one, other = (np.asarray(sheet.convert("L")).astype(float) for sheet in sheets[::2])
    height = len(one) // 2
    assert np.array_equal(one[:height], other[:height]) and not np.array_equal(one[height:], other[height:])


def test_sheets_of_many_images_of_many_shapes(scenes):
    annotations = read_coco(annotations_of(scenes, "train"), scenes / "train")
    images = CocoImages(annotations, annotations.images, False)
    items = [images[row] for row in range(5)]
    items[1] = {**items[1], "image": items[1]["image"][:1, :, :20]}  # gray and narrow
    items[2] = {**items[2], "image": items[2]["image"][[0, 1, 2, 0], :30]}  # four channels and wide
    found = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=int), "scores": torch.zeros(0)}] * 5
    sheet = np.asarray(draw_detections(items, found, annotations.names))
    assert sheet.shape[1] == 4 * 326 + 6 and sheet.shape[0] > 4 * 320
    assert (sheet[-300:, 400:] == 255).all() and sheet[-300:, :300].std() > 10
