# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Detection data: COCO annotation files (arXiv 1405.0312), checked, and their images with boxes and masks, jittered.

pycocotools indexes the annotations and decodes masks, torchvision transforms images, boxes and masks together. Its
`CocoDetection` with `wrap_dataset_for_transforms_v2` is not used: boxes of whole numbers stay whole numbers there,
which scaling truncates, images without objects have no targets, crowds are objects, EXIF orientations are ignored.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import v2
from tqdm.auto import tqdm

from ..data.datasets import check_images, sample_rows
from ..data.decoding import MAX_PIXELS, UnreadableImageError, open_image, upright
from ..data.seeding import seed_of, seeded
from .arguments import DetectionDataArguments


_SMALLEST_OVERLAP = 0.5  # IoU of a box with the box around its mask,
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
    A COCO annotation file, checked.

    Args:
        path: of the file.
        folder: of its images.
        coco: pycocotools' index. Annotations are numbered from 1 on, and have `iscrowd` and `area`.
        left_out: one sentence for each annotation that was left out.
    """

    path: Path
    folder: Path
    coco: COCO
    left_out: list[str]

    @property
    def images(self) -> list[dict]:
        """As in the file: `id`, `file_name`, `height`, `width`."""
        return self.coco.dataset["images"]

    @property
    def category_ids(self) -> list[int]:
        """As in the file, ascending; label n of a detector is `category_ids[n - 1]`."""
        return sorted(self.coco.cats)

    @property
    def names(self) -> list[str]:
        """Names of the categories, in the order of their ids."""
        return [self.coco.cats[number]["name"] for number in self.category_ids]

    def objects(self, image_id: int) -> list[dict]:
        """The annotations of an image without crowds."""
        return [entry for entry in self.coco.imgToAnns[image_id] if not entry["iscrowd"]]

    def with_objects(self) -> list[dict]:
        """The images with objects to train on."""
        return [image for image in self.images if self.objects(image["id"])]


def read_coco(
    path: str | Path, folder: str | Path | None = None, with_masks: bool = True, leave_out_bad: bool = False
) -> CocoAnnotations:
    """
    Reads and checks an annotation file.

    Args:
        path: the JSON file.
        folder: of the images; that of the file if not given.
        with_masks: whether each object must have a mask.
        leave_out_bad: whether annotations that cannot be right are left out, rather than refused.

    Raises:
        ValueError: if it cannot be read, lacks something, or an annotation cannot be right; the sentence names it and
            its image.
    """
    path = Path(path)
    content = _load(path)
    folder = path.parent if folder is None else Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with the images of {path}: check the path.")
    _check_images(path, folder, content["images"], content["categories"])
    checked, left_out = [], []
    coco = _index({"info": {}, **content, "annotations": checked})
    for annotation in tqdm(content["annotations"], desc=f"checking {path.name}", unit="annotation", delay=2):
        fault = _fault(annotation, coco, with_masks)
        if fault is None:
            box = [float(number) for number in annotation["bbox"]]
            own = {"id": len(checked) + 1, "bbox": box, "area": annotation.get("area") or box[2] * box[3]}
            checked.append({"iscrowd": 0, **annotation, **own})
            continue
        image = _image_of(annotation, coco)
        of = f"image {annotation.get('image_id')}" + (f" ({image['file_name']})" if image else "")
        sentence = f"Annotation {annotation.get('id')} of {of} in {path} {fault}"
        if not leave_out_bad:
            raise ValueError(f"{sentence}: correct it, or leave such ones out with --bad_annotations leave_out.")
        left_out.append(f"{sentence}.")
    read = CocoAnnotations(path, folder, _index(coco.dataset), left_out)
    if not read.with_objects():
        raise ValueError(f"No image of {path} has an annotation: there is nothing to train on or to find.")
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


def _index(content: dict) -> COCO:
    """pycocotools' index, without what it prints. It takes an annotation with the id 0 for none."""
    coco = COCO()
    coco.dataset = content
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _check_images(path: Path, folder: Path, images: list[dict], categories: list[dict]):
    unique = (("images", images, "id"), ("categories", categories, "id"), ("categories", categories, "name"))
    for what, entries, key in unique:
        if not entries:
            raise ValueError(f"{path} has no {what}: choose another file.")
        twice = [value for value, times in Counter(entry[key] for entry in entries).items() if times > 1]
        if twice:
            raise ValueError(f"{path} has two {what} with the {key} {twice[0]!r}: give each its own.")
    there = {file.name for file in folder.iterdir()}
    for image in images:
        name = image["file_name"]
        if name not in there and not (folder / name).is_file():
            raise ValueError(f"Image {image['id']} of {path} is not there: {folder / name}. Check --*_image_dir.")


def _image_of(annotation: dict, coco: COCO) -> dict:
    """The image of an annotation; nothing if there is none with its id, or that is no id at all."""
    number = annotation.get("image_id")
    return coco.imgs.get(number, {}) if isinstance(number, int) else {}


def _fault(annotation: dict, coco: COCO, with_masks: bool) -> str | None:
    """What is wrong with an annotation, or None."""
    image = _image_of(annotation, coco)
    if not image:
        return "is of an image that the file does not have"
    category = annotation.get("category_id")
    if not isinstance(category, int) or category not in coco.cats:
        return f"has category {category!r}, which is not among the {len(coco.cats)} of the file"
    try:
        left, top, width, height = annotation["bbox"]
        finite = all(map(math.isfinite, annotation["bbox"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return f"must have a bbox of four numbers (left, top, width, height), got {annotation.get('bbox')}"
    if not finite:
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
    return _mask_fault(annotation, coco) if with_masks else None


def _mask_fault(annotation: dict, coco: COCO) -> str | None:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        return "has no mask, which Mask R-CNN is trained on (--detector faster_rcnn is not)"
    image = coco.imgs[annotation["image_id"]]
    size = [image["height"], image["width"]]
    fault = _runs_fault(segmentation, size) if isinstance(segmentation, dict) else _polygon_fault(segmentation, size)
    if fault is not None:
        return fault
    try:
        encoded = coco.annToRLE(annotation)
        area, around = run_lengths.area(encoded), run_lengths.toBbox(encoded)
    except Exception as error:  # the library raises many things
        return f"has a mask that cannot be read ({error})"
    if not area:
        return "has an empty mask"
    around = around.tolist()
    if run_lengths.iou([around], [annotation["bbox"]], [0]).item() >= _SMALLEST_OVERLAP:
        return None
    sides = box_convert(torch.tensor([around, annotation["bbox"]], dtype=torch.float64), "xywh", "xyxy")
    if (sides[0] - sides[1]).abs().max() > _NEAR_PX:
        box = [round(number, 1) for number in around]
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


class CocoImages(Dataset):
    """
    Images of an annotation file with boxes and labels, and with masks if they are trained on.

    The random augmentation of an image depends on the seed, the epoch and the image alone.

    Args:
        annotations: of the images.
        images: those entries of `annotations.images` that are read.
        with_masks: whether masks are read.
        transform: of `image`, `boxes`, `labels` and `masks`, as torchvision's v2; none if not given.
        seed: of the transform.
        name: of the split, for messages.
        num_channels: of the network.
    """

    def __init__(
        self,
        annotations: CocoAnnotations,
        images: Sequence[dict],
        with_masks: bool,
        transform: Callable | None = None,
        seed: int = 0,
        name: str = "train",
        num_channels: int = 3,
    ):
        self.annotations, self.images, self.with_masks = annotations, list(images), with_masks
        self.transform, self.seed, self.name, self.num_channels, self.epoch = transform, seed, name, num_channels, 0
        self._labels = {category: number for number, category in enumerate(annotations.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Image.Image:
        """The upright image of a row. Raises UnreadableImageError, which names it."""
        entry = self.images[row]
        path = self.annotations.folder / entry["file_name"]
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
        entry = self.images[row]
        item = {"image": tv_tensors.Image(v2.functional.pil_to_tensor(self.image(row))), **self._targets(entry)}
        if self.transform is not None:
            with seeded(seed_of(self.seed, self.epoch, entry["id"])):
                item = self.transform(item)
        return item | {"image_id": entry["id"]}

    def _targets(self, entry: dict) -> dict:
        objects, size = self.annotations.objects(entry["id"]), (entry["height"], entry["width"])
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = tv_tensors.BoundingBoxes(box_convert(boxes, "xywh", "xyxy"), format="XYXY", canvas_size=size)
        labels = torch.tensor([self._labels[one["category_id"]] for one in objects], dtype=torch.long)
        targets = {"boxes": v2.functional.clamp_bounding_boxes(boxes), "labels": labels}
        if self.with_masks:
            try:
                masks = [self.annotations.coco.annToMask(one) for one in objects]
            except Exception as error:  # the library raises many things
                raise ValueError(
                    f"A mask of image {entry['id']} of {self.name} cannot be read ({error}): correct it."
                ) from error
            stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
            targets["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return targets


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, with masks scaled about the centers of their pixels, as images and boxes are."""

    def transform(self, inpt, params):
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        exact = v2.InterpolationMode.NEAREST_EXACT
        return tv_tensors.Mask(v2.functional.resize_image(inpt.as_subclass(torch.Tensor), params["size"], exact))


class _BoxesOfMasks(v2.Transform):
    """Boxes that hold the masks again, of which parts were cut off; empty where nothing is left."""

    def forward(self, item: dict) -> dict:
        if "masks" not in item:
            return item
        masks = item["masks"].as_subclass(torch.Tensor).bool()
        boxes, left = torch.zeros(len(masks), 4), masks.flatten(1).any(dim=1)
        boxes[left] = masks_to_boxes(masks[left]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # the last pixel is inside
        return item | {"boxes": tv_tensors.wrap(boxes, like=item["boxes"])}


def large_scale_jitter(
    crop_size: int, scales: Sequence[float], flip_probability: float, mean: Sequence[float]
) -> v2.Compose:
    """
    The published augmentation of detectors (arXiv 2012.07177): an image is scaled at random, relative to what fits the
    square that is then cropped or padded, and flipped. Objects of less than a pixel are left out.

    Args:
        crop_size: side of the square in px.
        scales: smallest and largest scale.
        flip_probability: of a horizontal flip.
        mean: of each channel, which pads small images.
    """
    fill = {tv_tensors.Image: [255 * value for value in mean], "others": 0}
    return v2.Compose(
        [
            _ScaleJitter((crop_size, crop_size), tuple(scales), antialias=True),
            v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(flip_probability),
            _BoxesOfMasks(),
            v2.SanitizeBoundingBoxes(),
        ]
    )


def read_annotations(
    data_args: DetectionDataArguments, with_masks: bool, do_train: bool = True
) -> tuple[CocoAnnotations | None, CocoAnnotations]:
    """
    The annotations to train on, if there are any, and those to evaluate on; says what was left out.

    Raises:
        ValueError: as `read_coco`, and for files whose categories differ.
    """
    evaluation = _read(data_args.eval_annotations, data_args.eval_image_dir, data_args, with_masks)
    if not do_train:
        return None, evaluation
    train = _read(data_args.train_annotations, data_args.train_image_dir, data_args, with_masks)
    known = dict(zip(train.category_ids, train.names))
    for number, name in zip(evaluation.category_ids, evaluation.names):
        if known.get(number) != name:
            raise ValueError(
                f"Category {number} is {name!r} in {evaluation.path}, but {known.get(number)!r} in {train.path}: both "
                "must have the same ids and names."
            )
    if len(evaluation.names) != len(train.names):
        lacking = sorted(set(train.names) - set(evaluation.names))[0]
        raise ValueError(f"{evaluation.path} lacks the category {lacking!r} of {train.path}: list it there too.")
    return train, evaluation


def _read(path: str, folder: str | None, data_args: DetectionDataArguments, with_masks: bool) -> CocoAnnotations:
    read = read_coco(path, folder, with_masks, data_args.bad_annotations == "leave_out")
    if read.left_out:
        PartialState().print(f"{len(read.left_out)} annotations of {path} were left out. The first: {read.left_out[0]}")
    return read


def make_datasets(
    annotations: tuple[CocoAnnotations | None, CocoAnnotations],
    data_args: DetectionDataArguments,
    with_masks: bool,
    mean: Sequence[float],
    seed: int,
) -> tuple[CocoImages | None, CocoImages]:
    """
    Jittered images to train on, without those that have no objects, and whole images to evaluate on.

    Args:
        annotations: of `read_annotations`.
        mean: of each channel, which pads jittered images.
        seed: of the jitter, and of what `max_train_samples` and `max_eval_samples` choose.

    Raises:
        ValueError: for images that cannot be read.
    """
    (train, evaluation), channels = annotations, len(mean)
    images = _sample(evaluation.images, data_args.max_eval_samples, seed)
    datasets = [None, CocoImages(evaluation, images, with_masks, None, seed, "eval", channels)]
    if train is not None:
        images = train.with_objects()
        if len(images) < len(train.images):
            first = next(image for image in train.images if image not in images)
            PartialState().print(
                f"{len(train.images) - len(images)} of {len(train.images)} training images have no annotation and are "
                f"left out, as is published; the first is {first['id']} ({first['file_name']})."
            )
        jitter = large_scale_jitter(data_args.crop_size, data_args.jitter_scale, data_args.flip_probability, mean)
        images = _sample(images, data_args.max_train_samples, seed)
        datasets[0] = CocoImages(train, images, with_masks, jitter, seed, "train", channels)
    for dataset in datasets:
        if dataset is not None:
            check_images(dataset, data_args.check_images)
    return tuple(datasets)


def _sample(images: list[dict], limit: int | None, seed: int) -> list[dict]:
    return [images[row] for row in sample_rows(len(images), limit, seed)]
