"""
Scenes: digits of scikit-learn on crops of its two photographs, with exact boxes, masks and segmentation maps.

A scene depends on the seed, its split and its number alone. Digits and photographs are split as well: training scenes
have the digits of the demonstration's training split on the left halves of the photographs, test scenes have held-out
digits on the right halves.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_sample_images
from torchvision.ops import masks_to_boxes

from digits.data import CLASS_NAMES, digits_dataset


SPLITS = ("train", "test")
ALL_DIGITS = tuple(range(10))
DIGIT_PX = (28, 36)  # smallest and largest side of a digit
MAX_DIGITS = 5
_DIMMED = 0.35  # photographs, so that no sky is as bright as ink
_TRIES = 50  # to find a place for a digit


@dataclass(frozen=True)
class Scene:
    """
    An image and its objects.

    Args:
        name: `train_00007`, for example.
        image: (H, W, 3), uint8.
        masks: (digits, H, W), True where a digit is; they do not overlap.
        digits: (digits,), 0 to 9.
        kinds: the digits that may occur, in ascending order.
    """

    name: str
    image: np.ndarray
    masks: np.ndarray
    digits: np.ndarray
    kinds: tuple[int, ...] = ALL_DIGITS

    @property
    def classes(self) -> np.ndarray:
        """(digits,), positions in `kinds`."""
        return np.searchsorted(self.kinds, self.digits)

    @property
    def boxes(self) -> np.ndarray:
        """(digits, 4) as left, top, width, height in px: the smallest that hold the masks."""
        left, top, right, bottom = masks_to_boxes(torch.from_numpy(self.masks)).long().numpy().T  # of pixels inside
        return np.stack([left, top, right + 1 - left, bottom + 1 - top], axis=1)

    @property
    def segmentation_map(self) -> np.ndarray:
        """(H, W), uint8: 0 is background, 1 the first of `kinds`, as in `map_names`."""
        return ((self.classes[:, None, None] + 1) * self.masks).sum(axis=0).astype(np.uint8)


def map_names(kinds: Sequence[int] = ALL_DIGITS) -> list[str]:
    """The classes of segmentation maps, in the order of their numbers. ValueError for digits that do not exist."""
    if not len(kinds) or not set(kinds) <= set(ALL_DIGITS):
        raise ValueError(f"Scenes are of the digits 0 to 9, got {' '.join(map(str, kinds)) or 'none'}.")
    return ["background", *(CLASS_NAMES[digit] for digit in sorted(set(kinds)))]


def scenes(
    split: str, number: int, height_px: int = 96, width_px: int = 96, seed: int = 0, kinds: Sequence[int] = ALL_DIGITS
) -> Iterator[Scene]:
    """
    The first `number` scenes of `train` or `test`.

    Args:
        seed: other seeds give other scenes.
        kinds: the digits that may occur.

    Raises:
        ValueError: if there is no such split or digit, or no room for one.
    """
    map_names(kinds)
    kinds = tuple(sorted(set(kinds)))
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r} of scenes: choose from {', '.join(SPLITS)}.")
    if number < 1:
        raise ValueError(f"There must be at least 1 scene, got {number}.")
    if seed < 0:
        raise ValueError(f"The seed of scenes must be 0 or more, got {seed}.")
    largest = min(photo.shape[0] for photo in _photographs(split)), min(p.shape[1] for p in _photographs(split))
    for name, length, most in (("height", height_px, largest[0]), ("width", width_px, largest[1])):
        if not DIGIT_PX[1] <= length <= most:
            raise ValueError(f"The {name} of scenes must be {DIGIT_PX[1]} to {most} px, got {length}.")
    return (_compose(split, index, height_px, width_px, seed, kinds) for index in range(number))


def _compose(split: str, index: int, height_px: int, width_px: int, seed: int, kinds: tuple[int, ...]) -> Scene:
    generator = np.random.default_rng([seed, SPLITS.index(split), index])
    images, labels = _digits(split, kinds)
    photographs = _photographs(split)
    photo = photographs[generator.integers(len(photographs))]
    top, left = (generator.integers(length - size + 1) for length, size in zip(photo.shape, (height_px, width_px)))
    canvas = _DIMMED * photo[top : top + height_px, left : left + width_px].astype(np.float64)
    masks, digits, taken = [], [], np.zeros((height_px, width_px), dtype=bool)
    for _ in range(generator.integers(2, MAX_DIGITS + 1)):
        which, side = generator.integers(len(labels)), int(generator.integers(DIGIT_PX[0], DIGIT_PX[1] + 1))
        place = _free_place(generator, taken, side)
        if place is None:
            continue
        taken[place] = True
        scan = PILImage.fromarray(images[which]).resize((side, side), PILImage.Resampling.BICUBIC)
        ink = np.asarray(scan)[:, :, None] / 255
        canvas[place] = canvas[place] * (1 - ink) + generator.uniform(220, 255, size=3) * ink
        mask = np.zeros_like(taken)
        mask[place] = ink[:, :, 0] >= 0.5
        masks.append(mask)
        digits.append(labels[which])
    image = np.round(canvas).astype(np.uint8)
    return Scene(f"{split}_{index:05}", image, np.stack(masks), np.array(digits), kinds)


def _free_place(generator: np.random.Generator, taken: np.ndarray, side: int) -> tuple[slice, slice] | None:
    for _ in range(_TRIES):
        top, left = (generator.integers(length - side + 1) for length in taken.shape)
        place = slice(top, top + side), slice(left, left + side)
        if not taken[place].any():
            return place
    return None


@cache
def _digits(split: str, kinds: tuple[int, ...]) -> tuple[list[np.ndarray], list[int]]:
    """The scans of these digits, (8, 8) uint8 each, and their numbers."""
    dataset = digits_dataset()[split]
    chosen = [(np.asarray(image), label) for image, label in zip(dataset["image"], dataset["label"]) if label in kinds]
    return [image for image, _ in chosen], [label for _, label in chosen]


@cache
def _photographs(split: str) -> list[np.ndarray]:
    """One half of each photograph: (H, W, 3), uint8."""
    halves = (slice(None, 320), slice(320, None))
    return [np.asarray(photo)[:, halves[SPLITS.index(split)]] for photo in load_sample_images().images]


# -- as `datasets` and as COCO files --------------------------------------------------------------------------------


def scenes_dataset(number: dict[str, int], **keywords) -> DatasetDict:
    """
    Scenes as a dataset; `number` of them by split, and keywords of `scenes`.

    Columns: `image_id`; `image`; `annotation`, the segmentation map as an image of one channel; `objects`, lists of
    `bbox` (left, top, width, height in px), `area` (px) and `category`.
    """
    names = map_names(keywords.get("kinds", ALL_DIGITS))[1:]
    objects = {"bbox": List(List(Value("float32"), length=4)), "area": List(Value("int64"))}
    objects["category"] = List(ClassLabel(names=names))
    features = Features({"image_id": Value("string"), "image": Image(), "annotation": Image(), "objects": objects})
    return DatasetDict(
        {
            split: Dataset.from_list([_row(scene) for scene in scenes(split, count, **keywords)], features=features)
            for split, count in number.items()
        }
    )


def _row(scene: Scene) -> dict:
    objects = {"bbox": scene.boxes, "area": scene.masks.sum(axis=(1, 2)), "category": scene.classes}
    return {"image_id": scene.name, "image": scene.image, "annotation": scene.segmentation_map, "objects": objects}


def write_coco(folder: Path, number: dict[str, int], **keywords):
    """
    Scenes in COCO's format: images in `folder/SPLIT`, and `folder/annotations/instances_SPLIT.json` with boxes and
    with masks as uncompressed run lengths, which are exact. Categories are numbered from 1, as in segmentation maps.
    Arguments are as of `scenes_dataset`.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    names = map_names(keywords.get("kinds", ALL_DIGITS))
    categories = [{"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(names) if i]
    for split, count in number.items():
        (folder / split).mkdir(exist_ok=True)
        images, annotations = [], []
        for image_id, scene in enumerate(scenes(split, count, **keywords), start=1):
            PILImage.fromarray(scene.image).save(folder / split / f"{scene.name}.png")
            height, width = scene.image.shape[:2]
            images.append({"id": image_id, "file_name": f"{scene.name}.png", "height": height, "width": width})
            for box, mask, kind in zip(scene.boxes.tolist(), scene.masks, scene.classes.tolist()):
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": kind + 1}
                area = {"bbox": box, "area": int(mask.sum()), "iscrowd": 0}
                annotations.append(annotation | area | {"segmentation": run_lengths(mask)})
        record = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(record) + "\n")


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (H, W) as COCO's uncompressed run lengths: column by column, beginning with the pixels outside."""
    pixels = mask.T.ravel()
    borders = np.flatnonzero(np.diff(pixels, prepend=False)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *borders, len(pixels)]).tolist()}
