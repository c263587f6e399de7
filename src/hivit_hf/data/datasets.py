# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Datasets of the `datasets` library: opening, splits, image columns, and items and batches for `Trainer`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from timm.data import Mixup
from tqdm.auto import tqdm

from .decoding import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    UnreadableImageError,
    image_of,
    open_image,
    orientation,
    upright,
)
from .seeding import seed_of, seeded


def open_splits(name: str, config: str | None = None, revision: str | None = None) -> DatasetDict:
    """
    All splits of a dataset of the Hub, of a saved dataset, or of a folder of images (a folder per class) or Parquet.

    Raises:
        ValueError: if there is no such dataset, or it cannot be read.
    """
    folder = Path(name)
    if not folder.exists() and name.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder {name}. Check the path.")
    if folder.is_file():
        raise ValueError(f"{name} is a file: give the folder that it is in.")
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = load_from_disk(name)
        elif folder.is_dir() and not any(folder.rglob("*.parquet")) and _has_images(folder):
            loaded = load_dataset("imagefolder", data_dir=str(folder))
        else:
            loaded = load_dataset(name, config, revision=revision)
    except DatasetNotFoundError as error:
        raise ValueError(f"There is no dataset {name}, here or on the Hub: check the name.") from error
    except Exception as error:  # the many readers raise many things
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, IndexError) or "corresponds to no data" in reason:
            raise ValueError(f"The dataset {name} has a split without samples: choose another one.") from error
        raise ValueError(f"The dataset {name} cannot be read: {reason}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def choose_split(splits: DatasetDict, name: str, flag: str) -> Dataset:
    """A split by its name. ValueError names those that exist, if there is none of it or it is empty."""
    if name not in splits:
        raise ValueError(f"There is no split {name!r}: the dataset has {', '.join(splits)}. Choose with --{flag}.")
    if not len(splits[name]):
        raise ValueError(f"The split {name!r} is empty: choose another with --{flag}.")
    return splits[name]


def train_and_eval(
    splits: DatasetDict, train_split: str, eval_split: str | None, eval_fraction: float | None, seed: int
) -> tuple[Dataset, Dataset]:
    """
    What is learned from and what is evaluated with: two splits, or one of which a share is held out.

    Raises:
        ValueError: if a split does not exist, or nothing is left of one.
    """
    train = choose_split(splits, train_split, "train_split")
    if eval_fraction is not None:
        if not 1 <= round(len(train) * eval_fraction) < len(train):
            raise ValueError(f"eval_fraction {eval_fraction} of {len(train)} images leaves one side empty.")
        parts = train.train_test_split(test_size=eval_fraction, seed=seed)
        return parts["train"], parts["test"]
    return train, evaluation_split(splits, eval_split)


def evaluation_split(splits: DatasetDict, given: str | None = None) -> Dataset:
    """The split to evaluate with: the given one, or 'validation', 'val' or 'test'. ValueError if there is none."""
    found = given or next((name for name in ("validation", "val", "test") if name in splits), None)
    if found is None:
        raise ValueError(
            f"There is nothing to evaluate with: the dataset has {', '.join(splits)}. Give --eval_split, or hold out a "
            "share with --eval_fraction 0.1."
        )
    return choose_split(splits, found, "eval_split")


def image_column(dataset: Dataset, given: str | None = None) -> str:
    """The column with the images. ValueError if it does not exist or cannot be told."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = given or (images[0] if len(images) == 1 else "image" if "image" in dataset.features else None)
    if column not in dataset.features:
        what = f"There is no column {given!r}" if given else "There is no single column of images"
        raise ValueError(f"{what}; the columns are {', '.join(dataset.features)}. Name one with --image_column.")
    feature = dataset.features[column]
    is_bytes = isinstance(feature, Value) and "binary" in feature.dtype
    if not (isinstance(feature, (Image, dict)) or is_bytes):
        raise ValueError(f"{column!r} holds {feature}, not images. Name another column with --image_column.")
    return column


class LabeledImages(torch.utils.data.Dataset):
    """
    Images of a dataset with their targets, as items for `Trainer`.

    What becomes of a image depends on the seed, the epoch and its row alone, not on processes, workers, resumptions.

    Args:
        dataset: one split.
        column: where its images are.
        transform: from an upright PIL image to pixels (channels, H, W).
        targets: one per row; None for images without.
        num_channels: 1, 3 or 4.
        seed: of the randomness of `transform`; None if it has none.
        name: of the split, for messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        column: str,
        transform: Callable,
        targets: torch.Tensor | None = None,
        num_channels: int = 3,
        seed: int | None = None,
        name: str = "train",
    ):
        is_feature = isinstance(dataset.features[column], Image)
        dataset = dataset.select_columns([column])
        self.dataset = dataset.cast_column(column, Image(decode=False)) if is_feature else dataset
        self.column, self.transform, self.targets, self.num_channels = column, transform, targets, num_channels
        self.seed, self.name, self.epoch = seed, name, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, row: int):
        """The upright PIL image of a row. Raises UnreadableImageError, which names the row."""
        return self.image_and_orientation(row)[0]

    def image_and_orientation(self, row: int) -> tuple:
        """As `image`, and how its file lies (EXIF, 1 is upright). Raises as it does."""
        try:
            data, path = image_of(self.dataset[row], self.column)
            image = open_image(data, MAX_PIXELS)
            return upright(image, self.num_channels), orientation(image)
        except UnreadableImageError as error:
            value = self.dataset[row][self.column]
            path = value.get("path") if isinstance(value, dict) else None
            named = f" ({path})" if path else ""
            raise UnreadableImageError(
                f"Image {row} of {self.name}{named} cannot be read, {error}: repair it or leave it out."
            ) from error

    def check(self, row: int):
        """Raises ValueError, which names the row, if it cannot be learned from."""
        self.image(row)

    def __getitem__(self, row: int) -> dict:
        image = self.image(row)
        item = {} if self.targets is None else {"labels": self.targets[row]}
        if self.seed is None:
            return item | {"pixel_values": self.transform(image)}
        seed = seed_of(self.seed, self.epoch, row)
        with seeded(seed):
            return item | {"pixel_values": self.transform(image), "seed": seed}


def check_images(images: LabeledImages, limit: int):
    """
    Decodes up to `limit` images, spread evenly, so that bad ones are found before training.

    Raises:
        ValueError: which cannot be read.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)).tolist()
    bad = []
    for row in tqdm(rows, desc=f"checking {images.name}", unit="image", delay=2):
        try:
            images.check(row)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f" {len(bad) - 1} more of {len(rows)} are bad too." if len(bad) > 1 else ""
        raise ValueError(bad[0] + more)


class Batches:
    """
    Makes batches of items. While training, the targets of one-label problems may be mixed and smoothed into
    probabilities (B, classes), whose rows add up to one; the mixing depends on the items' seeds alone.

    Args:
        num_classes: of the model.
        mixup, cutmix: alphas, 0 for none; as timm's `Mixup` in batch mode.
        probability: share of the batches that are mixed.
        switch_probability: share of the mixed batches that are cut rather than blended.
        label_smoothing: share of the target that is spread over all classes.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, None, probability, switch_probability, "batch", True, label_smoothing, num_classes
            )

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Raises ValueError for an odd number of items that shall be mixed: they are mixed in pairs."""
        batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
        if "labels" not in items[0]:
            return batch
        labels = torch.stack([item["labels"] for item in items])
        if "seed" in items[0]:
            if self.mix is not None:
                if len(items) % 2:
                    raise ValueError(
                        f"mixup and cutmix mix images in pairs, got a batch of {len(items)}: make it even."
                    )
                with seeded(seed_of(*(item["seed"] for item in items))):
                    batch["pixel_values"], labels = self.mix(batch["pixel_values"], labels)
            elif self.label_smoothing:
                one_hot = torch.nn.functional.one_hot(labels, self.num_classes)
                labels = one_hot * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return batch | {"labels": labels}


def sample_rows(length: int, limit: int | None, seed: int) -> list[int]:
    """All rows, or `limit` of them at random, ascending."""
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:limit].tolist())
