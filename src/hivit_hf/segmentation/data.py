# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images with segmentation maps: reading and checking them, random crops for training, the datasets of a run."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from torchvision.transforms import v2

from ..data.datasets import (
    ImageDataset,
    check_column,
    check_images,
    evaluation_split,
    open_splits,
    sample_rows,
    train_and_eval,
)
from ..data.decoding import MAX_PIXELS, UnreadableImageError, image_of, open_image, orientation
from ..data.seeding import seed_of, seeded
from .arguments import SegmentationDataArguments
from .metrics import IGNORE_INDEX


_ID_COLUMNS = ("image_id", "id", "file_name", "filename", "name", "__key__")
_CROP_TRIES = 10  # as mmsegmentation


class SegmentationDataset(ImageDataset):
    """
    Images with their segmentation maps, as items for `Trainer`: `pixel_values` (channels, H, W) and `labels` (H, W).

    Args:
        dataset: one split.
        column: of its images.
        label_column: of its segmentation maps, images of one channel.
        transform: from an image and its segmentation map to `pixel_values` and `labels`.
        num_labels: of the model.
        do_reduce_labels: whether 0 means not labeled and classes are counted from 1 in the files, as in ADE20K.
        num_channels, seed, name: as in `ImageDataset`.
    """

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        label_column: str,
        transform: "TrainingCrop | WholeImage",
        num_labels: int,
        do_reduce_labels: bool = False,
        num_channels: int = 3,
        seed: int | None = None,
        name: str = "train",
    ):
        super().__init__(dataset, column, transform, None, num_channels, seed, name)
        self.label_column, self.num_labels, self.do_reduce_labels = label_column, num_labels, do_reduce_labels
        maps = dataset.select_columns([label_column])
        is_feature = isinstance(dataset.features[label_column], Image)
        self.maps = maps.cast_column(label_column, Image(decode=False)) if is_feature else maps
        found = [name for name in _ID_COLUMNS if name in dataset.features and name not in (column, label_column)]
        self.ids = dataset.select_columns(found[:1]) if found else None

    def called(self, row: int) -> str:
        """The name of a sample in messages: its row, and its id if it has one, or its file."""
        if self.ids is not None:
            known = next(iter(self.ids[row].values()))
        else:
            value = self.dataset[row][self.column]
            known = value.get("path") if isinstance(value, dict) else None
        return f"sample {row} of {self.name}" + (f" ({known})" if known is not None else "")

    def sample(self, row: int) -> tuple[PILImage.Image, np.ndarray]:
        """
        The image and its segmentation map (H, W), int64, where `IGNORE_INDEX` is not labeled. Both are rotated as their
        EXIF orientation says.

        Raises:
            ValueError: if either cannot be read or they do not fit; it names the sample.
        """
        (image, image_orientation), who = self.image_and_orientation(row), self.called(row)
        try:
            data, _ = image_of(self.maps[row], self.label_column)
            labels = open_image(data, MAX_PIXELS)
            labels.load()
            map_orientation = orientation(labels)
        except (UnreadableImageError, OSError, SyntaxError) as error:
            raise UnreadableImageError(
                f"The map of {who} cannot be read, {error}: repair it or leave it out."
            ) from error
        if map_orientation != image_orientation:
            raise ValueError(
                f"The EXIF orientation of {who} is {image_orientation} and that of its map {map_orientation}: save "
                "both upright, or leave the sample out."
            )
        labels = ImageOps.exif_transpose(labels)
        numbers = np.asarray(labels)
        if numbers.ndim != 2:
            raise ValueError(
                f"The map of {who} has {len(labels.getbands())} channels ({labels.mode}), but class numbers are one: "
                "save it as a gray or palette image."
            )
        if labels.size != image.size:
            raise ValueError(
                f"The map of {who} is {labels.width}x{labels.height} px and its image {image.width}x"
                f"{image.height}: they must match. Correct the sample or leave it out."
            )
        return image, self._checked(numbers.astype(np.int64), who)

    def _checked(self, numbers: np.ndarray, who: str) -> np.ndarray:
        labeled = numbers != IGNORE_INDEX
        if self.do_reduce_labels:
            labeled &= numbers != 0
            numbers = numbers - 1
        classes = np.unique(numbers[labeled])
        if not len(classes):
            raise ValueError(f"The map of {who} has no labeled pixel: leave the sample out.")
        if classes[-1] >= self.num_labels or classes[0] < 0:
            wrong = classes[-1] if classes[-1] >= self.num_labels else classes[0]
            first = int(self.do_reduce_labels)
            raise ValueError(
                f"The map of {who} has the class {wrong + first}, but there are {self.num_labels} classes, {first} to "
                f"{self.num_labels - 1 + first} ({IGNORE_INDEX} is not labeled): correct it, or name all classes with "
                "--class_names."
            )
        return np.where(labeled, numbers, IGNORE_INDEX)

    def check(self, row: int):
        self.sample(row)

    def __getitem__(self, row: int) -> dict:
        image, numbers = self.sample(row)
        if self.seed is None:
            pixel_values, labels = self.transform(image, numbers)
        else:
            with seeded(seed_of(self.seed, self.epoch, row)):
                pixel_values, labels = self.transform(image, numbers)
        return {"pixel_values": pixel_values, "labels": labels}


class WholeImage:
    """Transform of evaluations: the image at its size, normalized, and its segmentation map."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = list(mean), list(std)

    def __call__(self, image: PILImage.Image, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = v2.functional.to_dtype(v2.functional.pil_to_tensor(image), torch.float32, scale=True)
        return v2.functional.normalize(pixels, self.mean, self.std), torch.from_numpy(numbers)


class TrainingCrop(WholeImage):
    """
    The published augmentation for segmentation: a random scale, a random square crop that no class dominates, a flip,
    and photometric distortion. Padding has the mean color and is not labeled.

    Args:
        crop_size: side of the square in px.
        mean, std: of each channel, of values in [0, 1].
        scale_range: of the shorter side, relative to `crop_size`.
        max_class_fraction: of the labeled pixels that one class may cover; the last of ten tries is taken anyway.
        flip_probability: of a horizontal flip.
        photometric: whether brightness, contrast, saturation and hue are distorted; images of 3 channels only.
    """

    def __init__(
        self,
        crop_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        scale_range: Sequence[float] = (0.5, 2.0),
        max_class_fraction: float = 0.75,
        flip_probability: float = 0.5,
        photometric: bool = True,
    ):
        super().__init__(mean, std)
        self.crop_size, self.scale_range = crop_size, tuple(scale_range)
        self.max_class_fraction, self.flip_probability = max_class_fraction, flip_probability
        self.distort = v2.RandomPhotometricDistort() if photometric else None

    def __call__(self, image: PILImage.Image, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        factor = random.uniform(*self.scale_range) * self.crop_size / min(image.size)
        scaled = _scaled_map(numbers, factor)
        if (scaled == IGNORE_INDEX).all():  # the few labeled pixels fell between those that were kept
            scaled = _scaled_map(numbers, max(factor, 1.0))
        top, left = self._place(scaled)
        labels = scaled[top : top + self.crop_size, left : left + self.crop_size]
        # only what is needed of the image is resized
        down, across = (before / after for before, after in zip(numbers.shape, scaled.shape))
        box = (left * across, top * down, (left + labels.shape[1]) * across, (top + labels.shape[0]) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        image = image.resize(labels.shape[::-1], PILImage.Resampling.BILINEAR, box=box)
        if random.random() < self.flip_probability:
            image, labels = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1].copy()
        if self.distort is not None and image.mode == "RGB":
            image = self.distort(image)
        pixel_values, labels = super().__call__(image, np.ascontiguousarray(labels))
        missing = (0, self.crop_size - labels.shape[1], 0, self.crop_size - labels.shape[0])
        pad = torch.nn.functional.pad
        return pad(pixel_values, missing), pad(labels, missing, value=IGNORE_INDEX)

    def _place(self, numbers: np.ndarray) -> tuple[int, int]:
        """Top and left of a square with labeled pixels, and with not too much of one class if that can be found."""
        limits = [max(length - self.crop_size, 0) for length in numbers.shape]
        found = None
        for _ in range(_CROP_TRIES):
            top, left = (random.randint(0, limit) for limit in limits)
            square = numbers[top : top + self.crop_size, left : left + self.crop_size]
            _, counts = np.unique(square[square != IGNORE_INDEX], return_counts=True)
            if len(counts):
                found = top, left
                if counts.max() <= self.max_class_fraction * counts.sum():
                    break
        if found is None:
            pixels = np.argwhere(numbers != IGNORE_INDEX)
            pixel = pixels[random.randrange(len(pixels))]
            found = tuple(int(np.clip(p - self.crop_size // 2, 0, limit)) for p, limit in zip(pixel, limits))
        return found


def _scaled_map(numbers: np.ndarray, factor: float) -> np.ndarray:
    size = [max(round(length * factor), 1) for length in numbers.shape[::-1]]
    image = PILImage.fromarray(numbers.astype(np.int32))
    return np.asarray(image.resize(size, PILImage.Resampling.NEAREST)).astype(np.int64)


def choose_splits(data_args: SegmentationDataArguments, do_train: bool, seed: int) -> dict[str, Dataset]:
    """
    The splits to train ("train") and to evaluate on ("eval"); an evaluation alone needs no training split.

    Raises:
        ValueError: if there is no such dataset, split or column.
    """
    opened = open_splits(**data_args.location())
    if do_train or data_args.train_val_split is not None:
        names = (data_args.train_split_name, data_args.eval_split_name, data_args.train_val_split)
        splits = dict(zip(("train", "eval"), train_and_eval(opened, *names, seed)))
    else:
        splits = {"eval": evaluation_split(opened, data_args.eval_split_name)}
    for name, split in splits.items():
        check_column(split, data_args.image_column_name, name, "image_column_name")
        check_column(split, data_args.label_column_name, name, "label_column_name")
    return splits


def make_datasets(
    splits: Mapping[str, Dataset],
    data_args: SegmentationDataArguments,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> dict[str, SegmentationDataset]:
    """
    Random crops of the split "train", and whole images of the split "eval".

    Raises:
        ValueError: for samples that cannot be read or do not fit.
    """
    crop = TrainingCrop(
        data_args.crop_size,
        mean,
        std,
        data_args.scale_range,
        data_args.max_class_fraction,
        data_args.flip_probability,
        data_args.photometric,
    )
    transforms = {"train": crop, "eval": WholeImage(mean, std)}
    limits = {"train": data_args.max_train_samples, "eval": data_args.max_eval_samples}
    made = {}
    for name, split in splits.items():
        made[name] = SegmentationDataset(
            split.select(sample_rows(len(split), limits[name], seed)),
            data_args.image_column_name,
            data_args.label_column_name,
            transforms[name],
            len(data_args.class_names),
            data_args.do_reduce_labels,
            len(mean),
            seed if name == "train" else None,
            name,
        )
        check_images(made[name], data_args.check_images)
    return made
