# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What detection and segmentation share: frozen backbones, trained models, evaluation of images of many sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.trainer_utils import EvalLoopOutput

from ..configuration_hivit import HiViTConfig, nearest_multiples
from .arguments import REFUSED, HiViTTrainingArguments, ModelArguments
from .command_line import argument, positive
from .trainer import HiViTTrainer


@dataclass
class DenseModelArguments(ModelArguments):
    """Which weights a model of a dense task begins with, and what of it is trained."""

    freeze_backbone: bool = argument(False, "Train the heads and the norms of the feature maps only.")

    def __post_init__(self):
        super().__post_init__()
        if self.freeze_backbone and self.drop_path_rate:
            raise ValueError(
                f"--drop_path_rate {self.drop_path_rate} is for a backbone that is trained: set it to 0, or leave out "
                "--freeze_backbone."
            )


@dataclass
class DenseTrainingArguments(HiViTTrainingArguments):
    """`HiViTTrainingArguments` of a dense task."""

    base_learning_rate: Annotated[float | None, positive] = argument(
        None, "Peak learning rate for 256 images per step, instead of --learning_rate."
    )
    REFUSED: ClassVar[dict[str, str]] = REFUSED | {
        "label_smoothing_factor": "the model computes its own loss",
        "eval_accumulation_steps": "evaluations keep no predictions on the device",
    }


def model_type_of(name: str | None) -> str | None:
    """The kind of the model in a folder or repository; None if there is none, which `read_config` says."""
    try:
        return AutoConfig.from_pretrained(name).model_type
    except Exception:  # of a config.json that is damaged
        return None


def check_trained(config: PreTrainedConfig, name: str, names: Sequence[str], remedy: str):
    """ValueError if the model at `name` has no HiViT inside, or other classes; `remedy` says what to do then."""
    if getattr(config.backbone_config, "model_type", None) != HiViTConfig.model_type:
        raise ValueError(f"{name} is a {config.model_type} without a HiViT inside: choose another model.")
    known = [config.id2label[number] for number in range(config.num_labels)]
    if known != list(names):
        raise ValueError(
            f"The model {name} has the {len(known)} classes {', '.join(known[:5])} ..., not the {len(names)} of the "
            f"data, {', '.join(names[:5])} ...: {remedy}."
        )


def check_crop_size(crop_size: int, patch_size: int):
    """ValueError if patches do not fill a crop."""
    if crop_size % patch_size:
        nearest = nearest_multiples(crop_size, patch_size)
        raise ValueError(
            f"crop_size must be a multiple of the patch size {patch_size}, got {crop_size}: take {nearest}."
        )


class DenseTrainer(HiViTTrainer):
    """
    `HiViTTrainer` for images of many sizes: evaluations have lists of items, and no image twice. With
    `--gradient_checkpointing`, the activations of the HiViT inside the model are recomputed.
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

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The metrics of `measure`, which keeps no predictions of the model on the device."""
        self.model.eval()
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        batches = tqdm(dataloader, desc=description, unit="batch", disable=hidden, leave=False)
        metrics = self.measure(batches, dataloader.dataset)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, named, len(dataloader.dataset.dataset))

    def measure(self, batches: Iterable[list], images: Subset) -> dict[str, float]:
        """
        The metrics of a task over the images of all processes; the model is in evaluation mode.

        Args:
            batches: lists of items of this process.
            images: the same, of the whole dataset.
        """
        raise NotImplementedError
