# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The pyramid that detectors and segmenters read: four normalized maps, the last by max-pooling."""

import torch
from torch import nn
from transformers.modeling_outputs import BackboneOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_pyramid import HiViTPyramidConfig
from .modeling_hivit import HiViTBackbone


class HiViTPyramid(HiViTBackbone):
    """
    `stage1` (stride 4), `stage2` (8), `stage3` (16) and `stage4` (32: `stage3`, max-pooled) as maps, each after a
    LayerNorm of its own, as the published detectors and segmenters read HiViT (paper, section 4.3). The same encoder as
    in `HiViTBackbone`, so any checkpoint loads; the norms start fresh.

    Where a grid of units is odd, the pooling keeps what is left at the right and the lower edge.
    """

    config: HiViTPyramidConfig

    def __init__(self, config: HiViTPyramidConfig):
        super().__init__(config)
        self.num_features = [*config.stage_channels, config.hidden_size]
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(self.out_feature_channels[name], config.layer_norm_eps) for name in config.out_features}
        )
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`):
                Images whose height and width are multiples of `config.patch_size`.

        Returns:
            `BackboneOutput` with `feature_maps`, one `(B, channels, height, width)` per `config.out_features`.

        Raises:
            ValueError: for images of other shapes, and for masks: a map needs all units.
        """
        grid, encoded = self._encode(pixel_values, **kwargs)
        stages = dict(zip(self.stage_names, encoded.stage_hidden_states))
        maps = []
        for name in self.out_features:
            level = self._units_to_map(stages["stage3" if name == "stage4" else name], grid)
            if name == "stage4":
                level = nn.functional.max_pool2d(level, kernel_size=2, ceil_mode=True)
            maps.append(self.norms[name](level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


__all__ = ["HiViTPyramid"]
