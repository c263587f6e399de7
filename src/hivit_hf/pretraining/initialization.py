# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Initialization of pre-training: random weights, another pre-training, any other HiViT with a new decoder."""

import math
from dataclasses import replace

from transformers import set_seed

from ..configuration_hivit import HiViTConfig
from ..image_processing import IMAGENET_MEAN, IMAGENET_STD
from ..modeling_hivit import HiViTForMaskedImageModeling
from ..training.initialization import (
    PYRAMID,
    Initialization,
    check_architecture,
    encoder_config,
    load_weights,
    normalization,
    read_config,
    refuse_misfits,
    resize_for,
    tables_note,
)
from .arguments import PretrainingDataArguments, PretrainingModelArguments
from .checkpoint import Resumption


DECODER = "decoder."


def initialize_autoencoder(
    model_args: PretrainingModelArguments, seed: int, resumed: Resumption | None = None
) -> Initialization:
    """
    The masked autoencoder that a pre-training begins with, the same for the same seed. A resumption has the network
    and the normalization of its run, and does not read the model that the run began with.

    Raises:
        ValueError: if there is no HiViT, it is not of the recipe's architecture, or weights do not fit.
    """
    set_seed(seed)
    if model_args.model_name_or_path is None:
        model = HiViTForMaskedImageModeling(model_args.config())
        return Initialization(model, list(IMAGENET_MEAN), list(IMAGENET_STD), [])
    if resumed is None:
        return _load(model_args)
    model = HiViTForMaskedImageModeling(read_config(str(resumed.path)))
    arguments = resumed.manifest["arguments"]
    return Initialization(model, arguments["image_mean"], arguments["image_std"], [])


def _load(model_args: PretrainingModelArguments) -> Initialization:
    name, changes = model_args.model_name_or_path, model_args.changes()
    image_size = changes.pop("image_size", None)
    found = read_config(name)
    if model_args.architecture is not None:
        check_architecture(found, model_args.architecture, name, changes)
    config = _autoencoder_config(found, name, changes)
    image_size = image_size or _side(config, name)
    resized = encoder_config(config, image_size=image_size)
    resized.num_visible_units(math.prod(resized.grid_size))
    statistics = normalization(name, config.num_channels)

    model, missing = load_weights(HiViTForMaskedImageModeling, name, config, (DECODER,))
    decoder = {DECODER + key for key in model.decoder.state_dict()}
    if not decoder <= missing:
        # the encoder in it ignores weights of a decoder that are left over, so they are not reported
        left_over = range(config.decoder_num_hidden_layers, found.decoder_num_hidden_layers)
        refuse_misfits(name, {*(decoder & missing), *(f"decoder.layers.{layer}" for layer in left_over)})
    notes = [f"The weights are those of {name}.", *tables_note(name, missing)]
    if decoder <= missing:
        notes.append(f"Not in {name}, so it is newly initialized: the decoder.")
    elif (was := _objective(found)) != (now := _objective(config)):
        notes.append(f"{name} was trained with {was}; now it is {now}.")
    resize_for(model, image_size)
    return Initialization(model, *statistics, notes)


def _autoencoder_config(found: HiViTConfig, name: str, changes: dict) -> HiViTConfig:
    for key in (*PYRAMID, "out_indices"):
        if key in changes:
            raise ValueError(f"--config_overrides sets {key}, but pre-training has no feature maps: leave it out.")
    config = encoder_config(found, **changes)
    if config.window_size is not None:
        raise ValueError(
            f"{name} has windows of {config.window_size} units, which cannot be masked: give --config_overrides "
            '\'{"window_size": null, "global_attention_layers": [], "attend_to_window_padding": false}\'.'
        )
    return config


def _side(config: HiViTConfig, name: str) -> int:
    """The side in px of the images that a network is made for. ValueError if they are not square."""
    rows, columns = config.grid_size
    if rows != columns:
        raise ValueError(
            f"{name} sees {rows * config.patch_size}x{columns * config.patch_size} px, which is no square: give "
            "--image_size."
        )
    return rows * config.patch_size


def _objective(config: HiViTConfig) -> str:
    return f"mask_ratio {config.mask_ratio} and norm_pix_loss {config.norm_pix_loss}"


def complete(
    initialization: Initialization, model_args: PretrainingModelArguments, data_args: PretrainingDataArguments
) -> tuple[PretrainingModelArguments, PretrainingDataArguments]:
    """
    The arguments with image size and normalization of the initialization where they were left open.

    Raises:
        ValueError: for a normalization that is not of the network's channels, or divides by zero.
    """
    config = initialization.model.config
    mean, std = initialization.statistics(data_args, config.num_channels)
    return replace(model_args, image_size=config.image_size), replace(data_args, image_mean=mean, image_std=std)
