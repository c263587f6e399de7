# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""DeepSpeed's ZeRO in stages 1 and 2, with the numbers of a recipe."""

from collections.abc import Callable
from unittest.mock import patch

from accelerate import Accelerator

from .arguments import PretrainRecipe


def configure_deepspeed(accelerator: Accelerator, recipe: PretrainRecipe):
    """
    Gives DeepSpeed what a recipe says, before the model is prepared.

    Weights stay in float32 and operations are cast, as with DDP; DeepSpeed's own bf16 would round the weights as well.

    Raises:
        ValueError: for a configuration that is not of the recipe, and for what has not been shown to be exact.
    """
    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage not in (1, 2):
        raise ValueError(f"zero_stage must be 1 or 2, got {plugin.zero_stage}: FSDP2 cuts the weights as well.")
    zero = plugin.deepspeed_config["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device != "none":
            raise ValueError(f"{name}_device must be none, got {device}: the optimizer is AdamW on the device itself.")
    if recipe.mixed_precision == "fp16" or plugin.deepspeed_config.get("fp16", {}).get("enabled") is True:
        raise ValueError("mixed_precision must be bf16 or no with DeepSpeed, got fp16.")
    if recipe.compile:
        raise ValueError("compile is not for DeepSpeed: leave it out, or use DDP or FSDP2.")
    wanted = {
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation_steps(accelerator.num_processes),
        "gradient_clipping": recipe.clip_norm or 0.0,
    }
    for name, value in wanted.items():
        given = plugin.get_value(name, "auto")
        if given not in ("auto", value):
            raise ValueError(f"{name} is {given} for DeepSpeed, but {value} by the recipe: leave it out there.")
    accelerator.gradient_accumulation_steps = wanted["gradient_accumulation_steps"]
    cast = {"enabled": recipe.mixed_precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    plugin.deepspeed_config |= {**wanted, "bf16": {"enabled": False}, "torch_autocast": cast}


def save_deepspeed(accelerator: Accelerator, folder: str):
    """
    `accelerator.save_state`, where a process that cannot write a file still meets the others wherever DeepSpeed waits
    for all of them; otherwise they would wait for good.

    Raises:
        Exception: the first error of this process, at the end.
    """
    engine, problems = accelerator.deepspeed_engine_wrapped.engine, []

    def noted(do: Callable) -> Callable:
        def attempt(*arguments, **options):
            try:
                return do(*arguments, **options)
            except Exception as error:  # each library reports a full disk in its own way
                problems.append(error)

        return attempt

    writer = engine.checkpoint_engine
    with (
        patch.object(writer, "makedirs", noted(writer.makedirs)),
        patch.object(writer, "save", noted(writer.save)),
        patch.object(engine, "_copy_recovery_script", lambda _folder: None),  # not needed here
    ):
        accelerator.save_state(folder, save_latest=False)  # the name of the newest is in a file of our own
    if problems:
        raise problems[0]
