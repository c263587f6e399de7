# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What detectors and segmenters share: the pyramid that they begin with, and evaluations of pictures of many sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..configuration_hivit import HiViTConfig
from ..configuration_pyramid import HiViTPyramidConfig
from ..hub import IMAGENET_MEAN, IMAGENET_STD
from ..modeling_pyramid import HiViTPyramid
from .classifier import check_architecture, normalization, read_config, silent_transformers
from .finetune import ClassifierTrainer


_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class DenseStart:
    """
    What a dense model begins with.

    Args:
        backbone: the pyramid.
        mean, std: of each channel, as the start has learnt from.
        notes: what a user should know, a sentence each.
    """

    backbone: HiViTPyramid
    mean: list[float]
    std: list[float]
    notes: list[str]


def pyramid_start(
    name: str | None,
    architecture: str | None = None,
    changes: dict | None = None,
    out_features: Sequence[str] | None = None,
) -> DenseStart:
    """
    A pyramid with the weights of a folder; its norms are new, and the decoder or classifier is left aside.

    Args:
        name: a folder, or a repository of the Hub; random weights of `architecture` if not given.
        architecture: what the network must be, if given.
        changes: keywords of the configuration that do not change the shapes of weights.
        out_features: the stages that are returned, all four if not given.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, or weights do not fit.
    """
    changes, notes = dict(changes or {}), []
    for key in ("out_features", "out_indices"):
        if key in changes:
            raise ValueError(f"--model sets {key}, but what reads the pyramid decides that: leave it out.")
    if out_features is not None:
        changes["out_features"] = list(out_features)
    if name is None:
        config = HiViTPyramidConfig.from_hivit(HiViTConfig.from_architecture(architecture), **changes)
        channels = config.num_channels
        mean, std = (list(values) if channels == 3 else [0.5] * channels for values in (IMAGENET_MEAN, IMAGENET_STD))
        return DenseStart(HiViTPyramid(config), mean, std, notes)
    config = read_config(name)
    if architecture is not None:
        check_architecture(config, architecture, name)
    config = HiViTPyramidConfig.from_hivit(config, **changes)
    backbone, found = load_fitting(HiViTPyramid, name, config, ("norms.",))
    mean, std = normalization(name, config.num_channels)
    return DenseStart(backbone, mean, std, notes + found)


def load_fitting(
    kind: type[PreTrainedModel], name: str, config: PreTrainedConfig, fresh: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, list[str]]:
    """
    A model with the weights of a folder, all of which must fit. Relative tables may be missing.

    Args:
        kind: of the model.
        name: a folder, or a repository of the Hub.
        config: of the model.
        fresh: what the names of weights begin with that may be missing.

    Returns:
        The model in float32, and what a user should know, a sentence each.

    Raises:
        ValueError: if weights of the network are missing, left over or of another shape.
    """
    with silent_transformers():
        model, loading = kind.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    misfits = [key for key, *_ in loading["mismatched_keys"]]
    tables = [key for key in loading["missing_keys"] if key.endswith(_TABLE)]
    misfits += [key for key in loading["missing_keys"] if key not in tables and not key.startswith(fresh)]
    misfits += [key for key in loading["unexpected_keys"] if ".stages." in key and not key.endswith(_TABLE)]
    if misfits:
        raise ValueError(
            f"The weights of {name} do not fit the network: {sorted(misfits)[0]} and {len(misfits) - 1} more are "
            "missing, left over or of another shape. Leave the sizes in --model as they are, or choose another start."
        )
    return model, [f"Not in {name}, so they start at zero: {len(tables)} relative position tables."] if tables else []


class DenseTrainer(ClassifierTrainer):
    """
    `ClassifierTrainer` for pictures of many sizes: evaluations have lists of items, and no picture twice.

    Raises:
        ValueError: under FSDP and ZeRO stage 3, which wait for a forward pass of every process.
    """

    def __init__(self, recipe, config, **keywords):
        super().__init__(recipe, config, **keywords)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "Evaluations give each process pictures of its own, but FSDP and ZeRO stage 3 want the same number of "
                "forward passes from all: start with torchrun, or with DeepSpeed up to stage 2."
            )

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Each process has a share of the pictures; these may differ in number, and one may have none."""
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            Subset(dataset, range(args.process_index, len(dataset), args.world_size)),
            batch_size=args.per_device_eval_batch_size,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
        )
