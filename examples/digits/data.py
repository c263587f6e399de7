"""Handwritten digits of scikit-learn: 1,797 real scans of 8x8 px, as datasets and Parquet files."""

from pathlib import Path

import numpy as np
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


def few_labels(train: Dataset, per_class: int, seed: int) -> Dataset:
    """
    `per_class` randomly chosen examples of each class.

    Raises:
        ValueError: if a class has fewer.
    """
    labels, generator, chosen = np.array(train["label"]), np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise ValueError(f"Class {label} has {len(rows)} examples, asked for {per_class}: ask for fewer.")
        chosen += generator.permutation(rows)[:per_class].tolist()
    return train.select(sorted(chosen))


def write_parquet(splits: DatasetDict, folder: Path) -> Path:
    """Writes each split as a Parquet file, as training scripts read them; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    return folder


def save_samples(images: Dataset, folder: Path):
    """Writes the first image of each digit as `digit_N.png`, of 8x8 px as it was scanned."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = list(images["label"])
    for digit, name in enumerate(CLASS_NAMES):
        images[labels.index(digit)]["image"].save(folder / f"digit_{name}.png")


def digits_processor() -> BitImageProcessor:
    """Image processor of the digits: three channels (pipelines convert to RGB), 32x32 px, values in [-1, 1]."""
    return BitImageProcessor(
        size={"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
