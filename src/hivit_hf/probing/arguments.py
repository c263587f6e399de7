# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the scripts that evaluate trained models: image column, batch size, encoder."""

from dataclasses import dataclass
from typing import Annotated

from datasets import Dataset

from ..data.datasets import ImageDataset, check_images, image_column
from ..training.arguments import MAX_WORKERS, DatasetLocation
from ..training.command_line import argument, at_most, nonnegative, positive, required_argument, side_px


@dataclass(kw_only=True)
class EvaluatedImages(DatasetLocation):
    """As `DatasetLocation`, with the column of the images and the size of their batches."""

    image_column_name: str | None = argument(None, "Column of the images (the only one of its kind).")
    check_images: Annotated[int, nonnegative] = argument(1000, "Number of images decoded first, to find bad ones.")
    per_device_eval_batch_size: Annotated[int, positive] = argument(64, "Batch size of the forward passes.")

    def checked_column(self, split: Dataset, name: str) -> str:
        """The image column of a split, called `name`. Raises ValueError if there is none, or for unreadable images."""
        column = image_column(split, self.image_column_name, name)
        check_images(ImageDataset(split, column, transform=None, name=name), self.check_images)
        return column


@dataclass(kw_only=True)
class EncodedImages(EvaluatedImages):
    """As `EvaluatedImages`, with the encoder whose features are computed."""

    model_name_or_path: str = required_argument("Folder or Hub name of the HiViT.")
    image_size: Annotated[int | None, positive, side_px] = argument(
        None, "Side of the input images in px (the model's)."
    )
    dataloader_num_workers: Annotated[int, nonnegative, at_most(MAX_WORKERS)] = argument(
        4, "Number of data loading workers."
    )
