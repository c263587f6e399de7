# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the scripts that evaluate trained models: dataset, image column, batch size, encoder."""

from dataclasses import dataclass
from typing import Annotated

from datasets import Dataset, DatasetDict

from ..data.datasets import ImageDataset, check_images, image_column, open_splits
from ..training.command_line import argument, check_fields, nonnegative, positive, required_argument


@dataclass(kw_only=True)
class DatasetArguments:
    """Where the images are, and the size of their batches."""

    dataset_name: str | None = argument(None, "Dataset of the Hub, folder of images or Parquet files, saved dataset.")
    dataset_config_name: str | None = argument(None, "Configuration of the Hub dataset.")
    dataset_revision: str | None = argument(None, "Commit, branch or tag of the Hub dataset.")
    train_dir: str | None = argument(None, "Folder of training images, instead of --dataset_name.")
    validation_dir: str | None = argument(None, "Folder of validation images, beside --train_dir.")
    image_column_name: str | None = argument(None, "Column of the images (the only one of its kind).")
    check_images: Annotated[int, nonnegative] = argument(1000, "Number of images decoded first, to find bad ones.")
    per_device_eval_batch_size: Annotated[int, positive] = argument(64, "Batch size of the forward passes.")

    def __post_init__(self):
        check_fields(self)

    def open_splits(self) -> DatasetDict:
        """All splits. Raises ValueError as `data.datasets.open_splits` does."""
        where = (self.dataset_name, self.dataset_config_name, self.dataset_revision)
        return open_splits(*where, self.train_dir, self.validation_dir)

    def checked_column(self, split: Dataset, name: str) -> str:
        """The image column of a split, called `name`. Raises ValueError if there is none, or for unreadable images."""
        column = image_column(split, self.image_column_name, name)
        check_images(ImageDataset(split, column, transform=None, name=name), self.check_images)
        return column


@dataclass(kw_only=True)
class EncoderArguments(DatasetArguments):
    """As `DatasetArguments`, and the encoder whose features are computed."""

    model_name_or_path: str = required_argument("Folder or Hub name of the HiViT.")
    image_size: Annotated[int | None, positive] = argument(None, "Side of the input images in px (the model's).")
    dataloader_num_workers: Annotated[int, nonnegative] = argument(4, "Number of data loading workers.")
