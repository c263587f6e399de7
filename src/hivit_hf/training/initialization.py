# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Where the weights of a training come from: folders, repositories of the Hub, random initialization."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..configuration_hivit import ARCHITECTURES, HiViTConfig
from ..image_processing import IMAGENET_MEAN, IMAGENET_STD, find_processor, first_line, pixel_statistics
from ..modeling_hivit import (
    HiViTAttention,
    HiViTBackbone,
    HiViTDecoder,
    HiViTPreTrainedModel,
    resize_table,
    sin_cos_position_embeddings,
)
from .arguments import ImageArguments
from .command_line import one_sentence


_SIZES = ("hidden_size", "depths", "early_blocks_per_depth", "num_attention_heads")


@dataclass(frozen=True)
class Initialization:
    """
    What a training begins with.

    Args:
        model: with its weights.
        image_mean, image_std: of each channel, which the weights were trained with.
        notes: what a user should know, a sentence each.
    """

    model: PreTrainedModel
    image_mean: list[float]
    image_std: list[float]
    notes: list[str]

    def statistics(self, data_args: ImageArguments, num_channels: int) -> tuple[list[float], list[float]]:
        """Mean and std of each channel: those of the command line, or those of the weights. Raises ValueError."""
        mean, std = data_args.image_mean or self.image_mean, data_args.image_std or self.image_std
        if not len(mean) == len(std) == num_channels:
            raise ValueError(f"image_mean and image_std need {num_channels} numbers, got {mean} and {std}.")
        return mean, std


def read_config(name: str) -> HiViTConfig:
    """The configuration of a HiViT. ValueError if there is none at that place, or of another kind of model."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"There is no folder {name}. Check the path.")
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type", HiViTConfig.model_type)
        if kind == HiViTConfig.model_type:
            config = AutoConfig.from_pretrained(name)
            if not all(isinstance(architecture, str) for architecture in config.architectures or []):
                raise ValueError(f"architectures must be names, got {config.architectures}.")
            return config
    except Exception as error:  # of a config.json that is damaged, or not of these types
        reason = one_sentence(error) if isinstance(error, StrictDataclassError) else first_line(error)
        if not isinstance(error, (OSError, ValueError, StrictDataclassError)):  # it holds no keys, or strange values
            reason = f"its config.json is damaged ({reason.rstrip('.')}). Get it again."
        raise ValueError(f"There is no model at {name}: {reason}") from error
    raise ValueError(f"{name} is a {kind}, not a HiViT: choose another model.")


def normalization(name: str, num_channels: int) -> tuple[list[float], list[float]]:
    """
    Mean and standard deviation of a folder's image processor; those of ImageNet if it has none.

    Raises:
        ValueError: if it has one that cannot be used.
    """
    with silent_transformers():
        processor = find_processor(name)
    if processor is not None:
        return pixel_statistics(processor, num_channels)
    return default_statistics(num_channels)


def default_statistics(num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of ImageNet, or 0.5 where there are not three channels."""
    if num_channels == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [0.5] * num_channels, [0.5] * num_channels


def initialize_relative_position_biases(model: nn.Module):
    """Relative tables drawn from a truncated normal, as the original's supervised training begins."""
    for module in model.modules():
        if isinstance(module, HiViTAttention) and module.relative_position_bias_table is not None:
            nn.init.trunc_normal_(module.relative_position_bias_table, std=model.config.initializer_range)


@torch.no_grad()
def resize_for(model: HiViTPreTrainedModel, image_size: int):
    """
    Interpolates position embedding and relative tables in place to the grid of images of `image_size` px; a decoder
    gets the sines and cosines of that grid.

    Raises:
        ValueError: if that is no multiple of the patch size.
    """
    config, before = model.config, model.config.grid_size
    config.image_size = image_size
    config.check()
    grid = config.grid_size
    if grid == before:
        return
    if model.hivit.position_embeddings is not None:
        resized = resize_table(model.hivit.position_embeddings[0], before, grid)
        model.hivit.position_embeddings = nn.Parameter(resized[None].contiguous())
    for module in model.modules():
        if isinstance(module, HiViTAttention) and module.relative_position_bias_table is not None:
            size = tuple(2 * length - 1 for length in grid)
            resized = resize_table(module.relative_position_bias_table, module.table_size, size)
            module.relative_position_bias_table = nn.Parameter(resized.contiguous())
            module.table_size = size
        elif isinstance(module, HiViTDecoder):
            positions = sin_cos_position_embeddings(grid, config.decoder_hidden_size)
            module.position_embeddings = nn.Parameter(positions.to(module.position_embeddings))
            module.grid_size = grid


def check_architecture(config: HiViTConfig, architecture: str, name: str, changed: Collection[str] = ()):
    """Whether a network has the sizes of an architecture, but for those that a recipe changes. Raises ValueError."""
    wanted = HiViTConfig.from_architecture(architecture)

    def fits(other: str) -> bool:
        known = HiViTConfig.from_architecture(other)
        return all(getattr(known, key) == getattr(config, key) for key in _SIZES)

    for key in _SIZES:
        if key not in changed and getattr(config, key) != getattr(wanted, key):
            raise ValueError(
                f"The recipe is for {architecture}, whose {key} is {getattr(wanted, key)}, but that of {name} is "
                f"{getattr(config, key)}: choose a recipe for its size, or set --architecture to "
                f"{next(filter(fits, ARCHITECTURES), 'what it is in a recipe of your own')}."
            )


@contextmanager
def silent_transformers() -> Iterator[None]:
    """transformers reports each key that is not used or not there; the notes say what matters of it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def reading_weights(name: str) -> Iterator[None]:
    """As `silent_transformers`; what the readers of damaged weights raise becomes a ValueError."""
    with silent_transformers():
        try:
            yield
        except (ValueError, ImportError, StrictDataclassError):  # of the configuration, or of what is not installed
            raise
        except Exception as error:
            raise ValueError(
                f"The weights of {name} cannot be read: {first_line(error)} Get them again, or save "
                "them as safetensors."
            ) from error


RELATIVE_POSITION_BIAS = "relative_position_bias_table"

# what the published detectors and segmenters read (paper, section 4.3)
PYRAMID = {
    "add_pooled_stage": True,
    "apply_layernorm": True,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def pyramid_config(config: HiViTConfig, **changes) -> HiViTConfig:
    """
    The configuration of a network as a backbone with four normalized feature maps, strides 4 to 32 for patches of
    16 px, without what belonged to a head.

    Args:
        changes: keywords of the configuration, `drop_path_rate` for example.
    """
    return encoder_config(config, **PYRAMID | changes)


def encoder_config(config: HiViTConfig, **changes) -> HiViTConfig:
    """
    The configuration of a network without what belonged to a head or said which feature maps are read.

    Args:
        changes: keywords of the configuration, `drop_path_rate` for example.
    """
    heads = ("model_type", "architectures", "auto_map", "id2label", "label2id", "problem_type")
    heads += ("out_indices", "transformers_version", "dtype", "_name_or_path", *PYRAMID)
    values = {name: value for name, value in config.to_diff_dict().items() if name not in heads}
    return HiViTConfig(**values | changes)


def initialize_backbone(
    name: str | None,
    architecture: str | None = None,
    overrides: dict | None = None,
    out_features: Sequence[str] | None = None,
) -> Initialization:
    """
    A backbone of four normalized feature maps with the weights of a folder; its norms are new, and a decoder or
    classifier is left out.

    Args:
        name: a folder, or a repository of the Hub; random weights of `architecture` if not given.
        architecture: what the network must be, if given.
        overrides: keywords of the configuration that do not change the shapes of weights.
        out_features: the stages that are returned, all four if not given.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, or weights do not fit.
    """
    overrides = dict(overrides or {})
    for key in (*PYRAMID, "out_indices"):
        if key in overrides:
            raise ValueError(
                f"--config_overrides sets {key}, but what reads the feature maps decides that: leave it out."
            )
    if out_features is not None:
        overrides["out_features"] = list(out_features)
    if name is None:
        config = pyramid_config(HiViTConfig.from_architecture(architecture), **overrides)
        return Initialization(HiViTBackbone(config), *default_statistics(config.num_channels), [])
    config = read_config(name)
    if architecture is not None:
        check_architecture(config, architecture, name)
    config = pyramid_config(config, **overrides)
    backbone, notes = load_fitting(HiViTBackbone, name, config, ("norms.",))
    return Initialization(backbone, *normalization(name, config.num_channels), notes)


def load_fitting(
    kind: type[PreTrainedModel], name: str, config: PreTrainedConfig, fresh: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, list[str]]:
    """As `load_weights`, with what a user should know of the weights that are missing, a sentence each."""
    model, missing = load_weights(kind, name, config, fresh)
    return model, tables_note(name, missing)


def tables_note(name: str, missing: Collection[str]) -> list[str]:
    """A sentence about the relative tables among the weights that a folder does not have, if there are any."""
    tables = [key for key in missing if key.endswith(RELATIVE_POSITION_BIAS)]
    return [f"Not in {name}, so they start at zero: {len(tables)} relative position tables."] if tables else []


def load_weights(
    kind: type[PreTrainedModel], name: str, config: PreTrainedConfig, fresh: tuple[str, ...] = ()
) -> tuple[PreTrainedModel, set[str]]:
    """
    A model in float32 with the weights of a folder, and the names of those that are missing there.

    Raises:
        ValueError: if they cannot be read, or do not fit as `missing_weights` says.
    """
    with reading_weights(name):
        model, loading = kind.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    return model, missing_weights(name, loading, fresh)


def missing_weights(name: str, loading: dict, fresh: tuple[str, ...]) -> set[str]:
    """
    The weights that a model does not have from a folder: relative tables, and those that `fresh` begins.

    Args:
        name: of the folder, for the message.
        loading: as `from_pretrained` reports it.
        fresh: what the names of weights begin with that may be missing or of another shape.

    Raises:
        ValueError: if other weights of the network are missing, left over or of another shape.
    """
    mismatched = {key for key, *_ in loading["mismatched_keys"]}
    missing = {*loading["missing_keys"], *mismatched}
    misfits = mismatched | {key for key in missing if not key.endswith(RELATIVE_POSITION_BIAS)}
    misfits = [key for key in misfits if not key.startswith(fresh)]
    misfits += [
        key for key in loading["unexpected_keys"] if ".stages." in key and not key.endswith(RELATIVE_POSITION_BIAS)
    ]
    refuse_misfits(name, misfits)
    return missing


def refuse_misfits(name: str, misfits: Collection[str]):
    """ValueError if there are weights of a folder that do not fit, by their names."""
    if misfits:
        raise ValueError(
            f"The weights of {name} do not fit the network: {sorted(misfits)[0]} and {len(misfits) - 1} more are "
            "missing, left over or of another shape. Leave the sizes in --config_overrides as they are, or choose "
            "another model."
        )
