# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What detection and segmentation share: evaluation of images of many sizes, one process per image."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch.utils.data import DataLoader, Dataset, Subset

from .arguments import REFUSED, HiViTTrainingArguments
from .command_line import MAY_CHANGE, argument, nonnegative
from .trainer import HiViTTrainer


@dataclass
class DenseTrainingArguments(HiViTTrainingArguments):
    """`HiViTTrainingArguments` of a dense task."""

    num_overlays: Annotated[int, nonnegative, MAY_CHANGE] = argument(
        4, "Number of validation images to draw with predictions; 0 for none."
    )

    REFUSED: ClassVar[dict[str, str]] = REFUSED | {
        "label_smoothing_factor": "the model computes its own loss",
        "eval_accumulation_steps": "evaluations keep no predictions on the device",
    }


class DenseTrainer(HiViTTrainer):
    """
    `HiViTTrainer` for images of many sizes: evaluations have lists of items, and no image twice. With
    `--gradient_checkpointing`, the activations of the HiViT inside the model are recomputed.

    Args:
        args: the arguments.
        keywords: of `Trainer`.
    """

    args: DenseTrainingArguments

    def __init__(self, args: DenseTrainingArguments, **keywords):
        super().__init__(args, **keywords)
        self.model.supports_gradient_checkpointing = True  # of its backbone; transformers asks the model around it

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Each process has a fraction of the images; these may differ in number, and one may have none."""
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(dataset, range(args.process_index, len(dataset), args.world_size)),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )
