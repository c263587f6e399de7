# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images with boxes and masks in COCO's format (arXiv 1405.0312): read, checked, jittered, and judged by AP."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as run_lengths
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm.auto import tqdm

from ..data.decoding import MAX_PIXELS, UnreadableImageError, open_image, upright
from ..data.seeding import seed_of, seeded


_SMALLEST_OVERLAP = 0.5  # of a box with the box around its mask,
_NEAR_PX = 2.0  # unless their sides are as near as this: the masks of thin objects are whole pixels
_NUMBER, _TEXT = (int, "a number from 0 on"), (str, "a text")
_ENTRIES = {
    "images": {"id": _NUMBER, "file_name": _TEXT, "height": _NUMBER, "width": _NUMBER},
    "annotations": {},
    "categories": {"id": _NUMBER, "name": _TEXT},
}


@dataclass(frozen=True)
class CocoAnnotations:
    """
    An annotation file, checked.

    Args:
        path: of the file.
        folder: where its images are.
        images: as in the file: `id`, `file_name`, `height`, `width`.
        objects: for each image's id its annotations, as in the file.
        category_ids: as in the file, ascending; label n of a detector is `category_ids[n - 1]`.
        names: of the categories, in that order.
        left_out: one sentence for each annotation that was left out.
    """

    path: Path
    folder: Path
    images: list[dict]
    objects: dict[int, list[dict]]
    category_ids: list[int]
    names: list[str]
    left_out: list[str]

    def with_objects(self) -> list[dict]:
        """The images with anything to learn; crowds do not count."""
        return [image for image in self.images if any(not o["iscrowd"] for o in self.objects[image["id"]])]


def read_coco(
    path: str | Path, folder: str | Path | None = None, with_masks: bool = True, leave_out_bad: bool = False
) -> CocoAnnotations:
    """
    Reads and checks an annotation file.

    Args:
        path: the JSON file.
        folder: where the images are; that of the file if not given.
        with_masks: whether each object must have a mask.
        leave_out_bad: whether annotations that cannot be right are left out, rather than refused.

    Raises:
        ValueError: if it cannot be read, lacks something, or an annotation cannot be right; the sentence has its id and
            the image's.
    """
    path = Path(path)
    content = _load(path)
    folder = path.parent if folder is None else Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with the images of {path}: check the path.")
    images, categories = content["images"], sorted(content["categories"], key=lambda category: category["id"])
    _check_images(path, folder, images, categories)
    by_id, ids = {image["id"]: image for image in images}, {category["id"] for category in categories}
    objects, left_out = {image["id"]: [] for image in images}, []
    for annotation in tqdm(content["annotations"], desc=f"checking {path.name}", unit="annotation", delay=2):
        fault = _fault(annotation, by_id, ids, with_masks)
        if fault is None:
            objects[annotation["image_id"]].append({"iscrowd": 0, **annotation})
            continue
        image = _of(by_id, annotation.get("image_id"))
        of = f"image {annotation.get('image_id')}" + (f" ({image['file_name']})" if image else "")
        sentence = f"Annotation {annotation.get('id')} of {of} in {path} {fault}"
        if not leave_out_bad:
            raise ValueError(f"{sentence}: correct it, or leave such ones out with --bad_annotations leave_out.")
        left_out.append(f"{sentence}.")
    names = [category["name"] for category in categories]
    read = CocoAnnotations(path, folder, images, objects, sorted(ids), names, left_out)
    if not read.with_objects():
        raise ValueError(f"No image of {path} has an annotation: there is nothing to learn or to find.")
    return read


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"The annotations {path} cannot be read: {error}") from error
    for key, needed in _ENTRIES.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} is not in COCO's format: it has no list of {key!r}.")
        for entry in entries:
            for name, (kind, wanted) in needed.items():
                value = entry.get(name)
                if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
                    what = f"is {value!r}, not {wanted}" if name in entry else "is missing"
                    raise ValueError(f"{path} is not in COCO's format: {name!r} {what} in one of {key!r}: {entry}.")
    return content


def _check_images(path: Path, folder: Path, images: list[dict], categories: list[dict]):
    for what, entries in (("images", images), ("categories", categories)):
        ids = [entry["id"] for entry in entries]
        if not ids:
            raise ValueError(f"{path} has no {what}: choose another file.")
        if len(set(ids)) < len(ids):
            double = next(number for number in ids if ids.count(number) > 1)
            raise ValueError(f"{path} has two {what} with the id {double}: give each its own.")
    names = [category["name"] for category in categories]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path} has two categories with the name {double!r}: give each its own.")
    there = {file.name for file in folder.iterdir()}
    for image in images:
        name = image["file_name"]
        if name not in there and not (folder / name).is_file():
            raise ValueError(f"Image {image['id']} of {path} is not there: {folder / name}. Check --*_images.")


def _of(images: dict[int, dict], number) -> dict:
    """The image with an id; nothing if there is none, or it is no id at all."""
    return images.get(number, {}) if isinstance(number, int) else {}


def _fault(annotation: dict, images: dict[int, dict], categories: set[int], with_masks: bool) -> str | None:
    """What is wrong with an annotation, or None."""
    image = _of(images, annotation.get("image_id"))
    if not image:
        return "is of a image that the file does not have"
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in categories:
        return f"has category {category!r}, which is not among the {len(categories)} of the file"
    try:
        left, top, width, height = (float(number) for number in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        return f"must have a bbox of four numbers (left, top, width, height), got {annotation.get('bbox')}"
    if not all(np.isfinite((left, top, width, height))):
        return f"has a bbox that is not finite: {annotation['bbox']}"
    if not (width > 0 and height > 0):
        return f"has a box of no area: {annotation['bbox']}"
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if crowd not in (0, 1) or isinstance(crowd, str):
        return f"has iscrowd {crowd!r}, which must be 0 or 1"
    if area is not None and not (isinstance(area, (int, float)) and np.isfinite(area) and area >= 0):
        return f"has an area of {area!r}, which must be a number from 0 on, or left out"
    if left >= image["width"] or top >= image["height"] or left + width <= 0 or top + height <= 0:
        return f"has a box outside its image of {image['width']}x{image['height']} px: {annotation['bbox']}"
    return _mask_fault(annotation, image) if with_masks else None


def _mask_fault(annotation: dict, image: dict) -> str | None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return "has no mask, which Mask R-CNN learns (--detector faster_rcnn does not)"
    size = [image["height"], image["width"]]
    fault = _runs_fault(segmentation, size) if isinstance(segmentation, dict) else _polygon_fault(segmentation, size)
    if fault is not None:
        return fault
    try:
        encoded = encode(segmentation, *size)
        area, around = run_lengths.area(encoded), run_lengths.toBbox(encoded)
    except Exception as error:  # the library raises many things
        return f"has a mask that cannot be read ({error})"
    if not area:
        return "has an empty mask"
    overlap = run_lengths.iou([around.tolist()], [annotation["bbox"]], [0]).item()
    corners = [
        np.array([left, top, left + width, top + height]) for left, top, width, height in (around, annotation["bbox"])
    ]
    if overlap < _SMALLEST_OVERLAP and np.abs(corners[0] - corners[1]).max() > _NEAR_PX:
        box = [round(number, 1) for number in around.tolist()]
        return f"has a mask that does not match its box: it lies in {box}, the box is {annotation['bbox']}"
    return None


def _runs_fault(segmentation: dict, size: list[int]) -> str | None:
    if segmentation.get("size") != size:
        return f"has a mask of {segmentation.get('size')} (height, width), but its image is {size}"
    counts = segmentation.get("counts")
    if not isinstance(counts, list):
        return None if isinstance(counts, (str, bytes)) else f"has a mask whose counts are {counts!r}"
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return "has a mask with runs that are no numbers from 0 on"
    if sum(counts) != size[0] * size[1]:
        return f"has a mask whose runs add up to {sum(counts)} px, but its image has {size[0] * size[1]}"
    return None


def _polygon_fault(segmentation, size: list[int]) -> str | None:
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        return "has a mask that is neither a list of polygons nor run lengths"
    for polygon in segmentation:
        if len(polygon) < 6:
            return "has a mask with a polygon of fewer than three points"
        if len(polygon) % 2:
            return f"has a mask with a polygon of {len(polygon)} numbers, which are no pairs"
        try:
            points = np.array(polygon, dtype=float).reshape(-1, 2)
        except (TypeError, ValueError):
            return "has a mask with a polygon that is not of numbers"
        # pycocotools draws what is far away point by point, and fails without a word if there is no memory for it
        far = np.abs(points - np.array(size[::-1]) / 2) > 1.5 * np.array(size[::-1])
        if not np.isfinite(points).all() or far.any():
            return f"has a mask with a polygon that leaves its image of {size[1]}x{size[0]} px by more than its size"
    return None


def encode(segmentation: list | dict, height: int, width: int) -> dict:
    """Polygons or run lengths of COCO as compressed run lengths."""
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    encoded = run_lengths.frPyObjects(segmentation, height, width)
    return run_lengths.merge(encoded) if isinstance(encoded, list) else encoded


class CocoImages(Dataset):
    """
    Images of an annotation file with boxes and labels, and with masks if they are learned.

    What is drawn at random for a image depends on the seed, the epoch and the image alone.

    Args:
        coco: the annotations.
        images: those of its images that are read.
        with_masks: whether masks are read.
        transform: of `image`, `boxes`, `labels` and `masks`, as torchvision's v2; none if not given.
        seed: of the transform.
        name: of the split, for messages.
        num_channels: of the network.
    """

    def __init__(
        self,
        coco: CocoAnnotations,
        images: Sequence[dict],
        with_masks: bool,
        transform: Callable | None = None,
        seed: int = 0,
        name: str = "train",
        num_channels: int = 3,
    ):
        self.coco, self.images, self.with_masks, self.transform = coco, list(images), with_masks, transform
        self.seed, self.name, self.num_channels, self.epoch = seed, name, num_channels, 0
        self._labels = {category: number for number, category in enumerate(coco.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int):
        """The upright PIL image of a row. Raises UnreadableImageError, which names it."""
        entry = self.images[row]
        path = self.coco.folder / entry["file_name"]
        try:
            image = upright(open_image(path.read_bytes(), MAX_PIXELS), self.num_channels)
        except (UnreadableImageError, OSError) as error:
            raise UnreadableImageError(
                f"Image {entry['id']} of {self.name} ({path}) cannot be read, {error}: repair it or leave it out."
            ) from error
        if image.size != (entry["width"], entry["height"]):
            raise UnreadableImageError(
                f"Image {entry['id']} of {self.name} ({path}) has {image.width}x{image.height} px, but its "
                f"annotations are for {entry['width']}x{entry['height']}: repair it or leave it out."
            )
        return image

    def check(self, row: int):
        """Decodes a row's image and masks. Raises ValueError, which names it."""
        self.image(row)
        self._targets(self.images[row])

    def __getitem__(self, row: int) -> dict:
        """`image` uint8, `boxes` (n, 4) as left, top, right, bottom, `labels` (n,), `masks` (n, H, W), `image_id`."""
        image = self.images[row]
        item = {"image": tv_tensors.Image(v2.functional.pil_to_tensor(self.image(row)))}
        item |= self._targets(image)
        if self.transform is not None:
            with seeded(seed_of(self.seed, self.epoch, image["id"])):
                item = self.transform(item)
        return item | {"image_id": image["id"]}

    def _targets(self, image: dict) -> dict:
        objects = [o for o in self.coco.objects[image["id"]] if not o["iscrowd"]]
        size = (image["height"], image["width"])
        corners = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
        labels = torch.tensor([self._labels[o["category_id"]] for o in objects], dtype=torch.long)
        targets = {"boxes": v2.functional.clamp_bounding_boxes(boxes), "labels": labels}
        if self.with_masks:
            try:
                masks = [run_lengths.decode(encode(o["segmentation"], *size)) for o in objects]
            except Exception as error:  # the library raises many things
                raise ValueError(
                    f"A mask of image {image['id']} of {self.name} cannot be read ({error}): correct it."
                ) from error
            stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
            targets["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return targets


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, with masks scaled about the middles of their pixels, as images and boxes are."""

    def transform(self, inpt, params):
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        exact = v2.InterpolationMode.NEAREST_EXACT
        return tv_tensors.Mask(v2.functional.resize_image(inpt.as_subclass(torch.Tensor), params["size"], exact))


class LargeScaleJitter:
    """
    The published augmentation of detectors (arXiv 2012.07177): a image is scaled at random, relative to what fits the
    square that is then cut out or filled up, and flipped.

    Args:
        crop_px: side of the square in px.
        scales: smallest and largest scale.
        flip_probability: of a horizontal flip.
        mean: of each channel, which fills up what a small image leaves.
    """

    def __init__(self, crop_px: int, scales: Sequence[float], flip_probability: float, mean: Sequence[float]):
        fill = {tv_tensors.Image: [255 * value for value in mean], "others": 0}
        self.transform = v2.Compose(
            [
                _ScaleJitter((crop_px, crop_px), tuple(scales), antialias=True),
                v2.RandomCrop(crop_px, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(flip_probability),
            ]
        )

    def __call__(self, item: dict) -> dict:
        item = self.transform(item)
        boxes = item["boxes"]
        if "masks" in item:  # what is cut off belongs to a box no more
            boxes = tv_tensors.wrap(boxes_of(item["masks"], boxes), like=boxes)
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = (sides >= 1).all(dim=1)
        return item | {"boxes": boxes[kept]} | {name: item[name][kept] for name in ("labels", "masks") if name in item}


def boxes_of(masks: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The smallest boxes that hold the masks (n, H, W): (n, 4) as left, top, right, bottom; empty where they are."""
    boxes = torch.zeros_like(otherwise)
    for number, mask in enumerate(masks):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            corners = columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1
            boxes[number] = boxes.new_tensor(corners)
    return boxes
