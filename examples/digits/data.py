"""Handwritten digits of scikit-learn: 1,797 real scans of 8x8 px, as datasets and as batches of pixels."""

import math
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import BitImageProcessor


IMAGE_SIZE_PX = 32
CLASS_NAMES = [str(digit) for digit in range(10)]
SPLIT_SEED = 0


def digits_dataset() -> DatasetDict:
    """The scans as images with labels, in a fixed stratified split: 75 % `train`, 25 % `test` (the hold-out)."""
    digits = load_digits()
    gray = np.round(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(gray)), test_size=0.25, random_state=SPLIT_SEED, stratify=digits.target
    )
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": list(gray[rows]), "label": digits.target[rows]}, features=features)
            for name, rows in [("train", np.sort(train)), ("test", np.sort(test))]
        }
    )


def save_samples(images: Dataset, folder: Path):
    """Writes the first image of each digit as `digit_N.png`, of 8x8 px as it was scanned."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(images["label"])
    for digit, name in enumerate(CLASS_NAMES):
        images[labels.index(digit)]["image"].save(folder / f"digit_{name}.png")


def digits_processor() -> BitImageProcessor:
    """What turns a image into pixels: three channels (pipelines convert to RGB), 32x32 px, values in [-1, 1]."""
    return BitImageProcessor(
        size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def few_labels(labels: torch.Tensor, per_class: int, seed: int) -> torch.Tensor:
    """
    Positions of `per_class` randomly chosen examples of each class, ascending.

    Raises:
        ValueError: if a class has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        positions = (labels == label).nonzero().flatten()
        if len(positions) < per_class:
            raise ValueError(f"Class {label} has {len(positions)} examples, asked for {per_class}: ask for fewer.")
        chosen.append(positions[torch.randperm(len(positions), generator=generator)[:per_class]])
    return torch.cat(chosen).sort().values


def augment(pixel_values: torch.Tensor, shift_px: float = 2.0, rotation_degrees: float = 8.0, scaling: float = 0.06):
    """
    Moves, turns and scales each image of a batch by its own random amounts; what comes in from outside is black.

    Args:
        pixel_values: (B, channels, H, W), of which -1 is black.
        shift_px: at most this far, along each axis.
        rotation_degrees: at most this much, either way.
        scaling: at most by this share, larger or smaller.
    """
    batch, _, height, width = pixel_values.shape
    shift_x, shift_y, turn, zoom = 2 * torch.rand(4, batch) - 1
    angle, zoom = turn * math.radians(rotation_degrees), 1 + zoom * scaling
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    rows = [cosine, -sine, 2 * shift_px / width * shift_x, sine, cosine, 2 * shift_px / height * shift_y]
    grid = torch.nn.functional.affine_grid(
        torch.stack(rows, dim=1).unflatten(1, (2, 3)), list(pixel_values.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(pixel_values + 1, grid, align_corners=False) - 1


class DigitPixels(torch.utils.data.Dataset):
    """
    Processed images with their labels, made into batches at once, which is much faster for images this small.

    Args:
        pixel_values: (number of images, 3, H, W).
        labels: (number of images,).
        augmented: whether each look at a image is a new variation of it.
    """

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor, augmented: bool = False):
        self.pixel_values, self.labels, self.augmented = pixel_values, labels, augmented

    @classmethod
    def from_dataset(cls, dataset: Dataset, processor: BitImageProcessor) -> "DigitPixels":
        pixel_values = processor(list(dataset["image"]), return_tensors="pt")["pixel_values"]
        return cls(pixel_values, torch.tensor(dataset["label"]))

    def subset(self, positions: torch.Tensor) -> "DigitPixels":
        return DigitPixels(self.pixel_values[positions], self.labels[positions], self.augmented)

    def with_augmentation(self) -> "DigitPixels":
        return DigitPixels(self.pixel_values, self.labels, augmented=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch: the data loader prefers this method over `__getitem__`."""
        pixel_values = self.pixel_values[positions]
        return {
            "pixel_values": augment(pixel_values) if self.augmented else pixel_values,
            "labels": self.labels[positions],
        }

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return {name: values[0] for name, values in self.__getitems__([position]).items()}


def as_it_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator for `DigitPixels`, whose batches are ready."""
    return batch
