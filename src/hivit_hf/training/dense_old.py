# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What detectors and segmenters share: the pyramid that they begin with, and evaluations of images of many sizes."""

from torch.utils.data import DataLoader, Dataset, Subset
from transformers.integrations import is_deepspeed_zero3_enabled

from ..classification.run_old import ClassifierTrainer


class DenseTrainer(ClassifierTrainer):
    """
    `ClassifierTrainer` for images of many sizes: evaluations have lists of items, and no image twice.

    Raises:
        ValueError: under FSDP and ZeRO stage 3, which wait for a forward pass of every process.
    """

    def __init__(self, recipe, config, **keywords):
        super().__init__(recipe, config, **keywords)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "Evaluations give each process images of its own, but FSDP and ZeRO stage 3 want the same number of "
                "forward passes from all: start with torchrun, or with DeepSpeed up to stage 2."
            )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Each process has a share of the images; these may differ in number, and one may have none."""
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(dataset, range(args.process_index, len(dataset), args.world_size)),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )
