# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the pyramid that detectors and segmenters read."""

from huggingface_hub.dataclasses import strict

from .configuration_hivit import HiViTConfig


@strict
class HiViTPyramidConfig(HiViTConfig):
    """
    A `HiViTConfig` with one stage more: `stage4`, the last stage max-pooled to half its resolution. All four stages are
    returned if `out_features` and `out_indices` are not given. The arguments are those of `HiViTConfig`.

    Example:

    ```python
    >>> from transformers import UperNetConfig, UperNetForSemanticSegmentation

    >>> from hivit_hf import HiViTPyramidConfig

    >>> backbone = HiViTPyramidConfig.from_architecture("tiny")
    >>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=150))
    ```"""

    model_type = "hivit_pyramid"

    def __post_init__(self, **kwargs):
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_features"] = self.stage_names[1:]
        super().__post_init__(**kwargs)

    @classmethod
    def from_hivit(cls, config: HiViTConfig, **changes) -> "HiViTPyramidConfig":
        """
        The pyramid of a network: all its numbers, without what belonged to a head or to another choice of stages.

        Args:
            config: of the network.
            changes: keywords of the configuration, `drop_path_rate` for example.
        """
        own = ("model_type", "architectures", "auto_map", "id2label", "label2id", "problem_type")
        own += ("out_features", "out_indices", "transformers_version", "dtype", "_name_or_path")
        values = {name: value for name, value in config.to_diff_dict().items() if name not in own}
        return cls(**{**values, **changes})

    @property
    def stage_names(self) -> list[str]:
        return [*super().stage_names, "stage4"]


__all__ = ["HiViTPyramidConfig"]
