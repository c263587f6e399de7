# Copyright 2026 The HiViT for Transformers authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
HiViT: a hierarchical vision transformer for masked image modeling (arXiv 2205.14949).

An image is cut into units, the paper's word for patches of 16x16 px that are masked or kept as a whole. A unit is
embedded as 4x4 tokens, which MLPs and merges turn into 2x2 and then 1 (stages 1 and 2); units attend to each other in
the main stage alone (stage 3). So masked units are never computed, as in the masked autoencoders of plain ViTs, and the
features are still hierarchical.

Shapes, everywhere in this file:
    B batch · N units · V visible units (V = N when nothing is masked) · C channels of the main stage
    stem, stage1 (B, V, 4, 4, C/4) -> stage2 (B, V, 2, 2, C/2) -> stage3 (B, V, C)
Units are in raster order, and so are the tokens inside a unit, as (row, column).
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_hivit import HiViTConfig, nearest_multiples


logger = logging.get_logger(__name__)


@dataclass
class HiViTModelOutput(BaseModelOutputWithPooling):
    """
    Output of `HiViTModel`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, V, C)`):
            Output of the main stage, not normalized, in raster order of the visible units.
        pooler_output (`torch.Tensor` of shape `(B, C)`, *optional*):
            Normalized mean over the units, if the model was made with a pooling layer.
        hidden_states (`tuple(torch.Tensor)`, *optional*):
            The embedding, then the output of each layer: `(B, V, 4, 4, C/4)`, `(B, V, 2, 2, C/2)`, `(B, V, C)`.
        attentions (`tuple(torch.Tensor)`, *optional*):
            Attention probabilities of each main stage layer, `(B, heads, V, V)`; eager attention only, and of
            the layers without windows.
        stage_hidden_states (`tuple(torch.Tensor)`, *optional*):
            The embedding and the output of each stage, before the merge that follows it.
    """

    stage_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class HiViTMaskedImageModelingOutput(ModelOutput):
    """
    Output of `HiViTForMaskedImageModeling`.

    Args:
        loss (`torch.Tensor` of shape `()`):
            Mean squared error over the masked units, float32; 0 if nothing is masked.
        reconstruction (`torch.Tensor` of shape `(B, num_channels, H, W)`):
            `logits` put back in place. Still in target space: see `HiViTForMaskedImageModeling.reconstruct`.
        logits (`torch.Tensor` of shape `(B, N, patch_size * patch_size * num_channels)`):
            Predicted pixels of each unit, as (row, column, channel).
        bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`):
            The mask that was used. True = masked.
        hidden_states (`tuple(torch.Tensor)`, *optional*): of the encoder, as in `HiViTModelOutput`.
        attentions (`tuple(torch.Tensor)`, *optional*): of the encoder, as in `HiViTModelOutput`.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    bool_masked_pos: torch.BoolTensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# -- units and positions --------------------------------------------------------------------------------------------


def cut_into_units(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """A view of the image as units: (B, channels, H, W) -> (B, rows, columns, channels, patch_size, patch_size)."""
    units = pixel_values.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return units.permute(0, 2, 4, 1, 3, 5)


def image_to_pixels(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The pixels of each unit, as (row, column, channel): (B, channels, H, W) -> (B, N, p * p * channels)."""
    return cut_into_units(pixel_values, patch_size).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def pixels_to_image(pixels: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `image_to_pixels`: (B, N, p * p * channels) -> (B, channels, H, W)."""
    units = pixels.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return units.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def pad_to_units(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Images with zeros at the right and below, up to whole units: (B, channels, H, W), H and W rounded up."""
    height, width = pixel_values.shape[2:]
    return nn.functional.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))


def units_to_map(tokens: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """
    Features of units as a map: the `last_hidden_state` of `HiViTModel`, one of its `hidden_states` or
    `stage_hidden_states`, or what a layer gave.

    Args:
        tokens (`torch.Tensor` of shape `(B, N, t, t, channels)` or `(B, N, channels)`): all units in raster order.
        grid (`tuple[int, int]`, *optional*): rows and columns of units, `(H / patch_size, W / patch_size)`; a square if
            not given.

    Returns:
        `torch.Tensor` of shape `(B, channels, rows * t, columns * t)`.

    Raises:
        ValueError: if the number of units is not that of the grid.
    """
    num_units = tokens.shape[1]
    if grid is None:
        grid = (math.isqrt(num_units),) * 2
    if math.prod(grid) != num_units:
        raise ValueError(
            f"A map of {grid[0]}x{grid[1]} units needs {math.prod(grid)} of them, got {num_units}: give grid as (rows, "
            "columns) of the image, and mask nothing."
        )
    if tokens.ndim == 3:
        tokens = tokens[:, :, None, None]
    tokens = tokens.unflatten(1, grid).permute(0, 5, 1, 3, 2, 4)
    return tokens.flatten(4, 5).flatten(2, 3)


def visible_indices(bool_masked_pos: torch.BoolTensor, num_visible_units: int) -> torch.LongTensor:
    """Positions of the visible units in raster order: (B, N) -> (B, V)."""
    num_units = bool_masked_pos.shape[1]
    # unlike a stable sort, one without equal numbers can be exported to ONNX
    order = bool_masked_pos.bool() * num_units + torch.arange(num_units, device=bool_masked_pos.device)
    return order.argsort(dim=1)[:, :num_visible_units]


def check_per_unit(name: str, values: torch.Tensor, shape: tuple[int, int]):
    """ValueError if what a user gave is not a tensor with one value per unit, (batch, units)."""
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != shape:
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
        raise ValueError(f"{name} must be a tensor (batch, units) = {shape}, one value per unit, got {got}.")


def resize_table(table: torch.Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> torch.Tensor:
    """Bicubic interpolation of a table over a grid: (rows * columns, channels) -> the same for `new_size`."""
    # while a network is exported for any size, a comparison would bind it to the size of the example
    if all(isinstance(length, int) for length in new_size) and size == new_size:
        return table
    image = table.to(torch.promote_types(table.dtype, torch.float32)).t().unflatten(1, size).unsqueeze(0)
    image = nn.functional.interpolate(image, size=new_size, mode="bicubic", align_corners=False)
    return image.squeeze(0).flatten(1).t().to(table.dtype)


def sin_cos_position_embeddings(grid: tuple[int, int], channels: int) -> torch.Tensor:
    """
    Fixed position embedding (1, N, channels), float64: the first half of the channels encodes the column, the second
    the row, each as sines, then cosines (`get_2d_sincos_pos_embed` of the original).
    """
    rows, columns = (torch.arange(length, dtype=torch.float64) for length in grid)
    frequencies = 10000 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    waves = [
        positions[:, None] * frequencies
        for positions in (columns.repeat(len(rows)), rows.repeat_interleave(len(columns)))
    ]
    return torch.cat([wave for angle in waves for wave in (angle.sin(), angle.cos())], dim=1).unsqueeze(0)


def relative_position_index(
    grid: tuple[int, int], device: torch.device, table_grid: tuple[int, int] | None = None
) -> torch.LongTensor:
    """
    Row of a relative table for each pair (query, key) of a grid: (N, N). The table is made for a grid of this size, or
    for a larger one, and has (2 * its rows - 1) * (2 * its columns - 1) entries.
    """
    (rows, columns), (table_rows, table_columns) = grid, table_grid or grid
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns).flatten()
    column = torch.arange(columns, device=device).expand(rows, columns).flatten()
    row_offset = row[:, None] - row[None, :] + table_rows - 1
    column_offset = column[:, None] - column[None, :] + table_columns - 1
    return row_offset * (2 * table_columns - 1) + column_offset


# -- layers ---------------------------------------------------------------------------------------------------------


class HiViTEmbeddings(nn.Module):
    """The visible units as 4x4 tokens: (B, channels, H, W) -> (B, V, 4, 4, C/4). What is masked is never read."""

    def __init__(self, config: HiViTConfig):
        super().__init__()
        self.patch_size = config.patch_size
        channels, token_size = config.stage_channels[0], config.patch_size // 4
        self.projection = nn.Conv2d(config.num_channels, channels, kernel_size=token_size, stride=token_size)
        self.norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor, visible: torch.LongTensor | None = None) -> torch.Tensor:
        units = cut_into_units(pixel_values.to(self.projection.weight.dtype), self.patch_size)
        if visible is None:
            units = units.flatten(1, 2)
        else:
            columns = units.shape[2]
            batch = torch.arange(units.shape[0], device=units.device)[:, None]
            units = units[batch, visible // columns, visible % columns]
        tokens = self.projection(units.flatten(0, 1)).permute(0, 2, 3, 1)  # (B * V, 4, 4, C/4)
        return self.norm(tokens).unflatten(0, units.shape[:2])


def in_three_dimensions(layers: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
    """Applies what works on the last dimension to (B, ..., channels) as (B, tokens, channels): int8 takes no more."""
    return layers(hidden_states.flatten(1, -2)).unflatten(1, hidden_states.shape[1:-1])


class HiViTMerge(nn.Module):
    """Joins 2x2 neighbors, in the order (0,0), (1,0), (0,1), (1,1) of (row, column), and doubles the channels."""

    def __init__(self, config: HiViTConfig, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (B, V, 2t, 2t, c) -> (B, V, t, row, t, column, c) -> (B, V, t, t, column, row, c) -> (B, V, t, t, 4c)
        hidden_states = hidden_states.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        hidden_states = hidden_states.permute(0, 1, 2, 4, 5, 3, 6).flatten(4)
        return in_three_dimensions(self.reduction, self.norm(hidden_states))


class HiViTDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the branch of a whole sample while training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = hidden_states.new_empty((hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1))
        return hidden_states * (keep.bernoulli_(1 - self.rate) / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class HiViTMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: HiViTConfig, channels: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(channels, int(channels * ratio))
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(int(channels * ratio), channels)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: (B, heads, V, d) each -> (B, V, heads, d), and the probabilities (B, heads, V, V)."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    # softmax accumulates in float32 for every dtype: a float32 copy of the scores would change nothing but the cost
    probabilities = nn.functional.softmax(scores, dim=-1)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities.to(value.dtype), value).transpose(1, 2), probabilities


# once, as these cannot be traced
CPU_CAPABILITY = torch.backends.cpu.get_cpu_capability()
CPU_MULTIPLIES_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()


def effective_attention(implementation: str, query: torch.Tensor, training: bool) -> str:
    """
    The attention that runs where `config._attn_implementation` is `implementation`: `eager` in place of `sdpa` in
    bfloat16 and float16 on CPUs where PyTorch's fused kernel is the slower one (benchmarks/results/attention*.json).
    With AVX-512, it is in training, and on processors that multiply bfloat16 in inference too. Without AVX-512, it is
    the faster one by far.

    Raises:
        ValueError: for `flex_attention` on CPUs without AVX-512, where PyTorch's is wrong for some numbers of units.
    """
    if query.device.type != "cpu":
        return implementation
    if implementation == "flex_attention" and CPU_CAPABILITY != "AVX512":
        raise ValueError(
            f"flex_attention is not correct on CPUs without AVX-512, this one has {CPU_CAPABILITY}: load the model "
            'with attn_implementation="sdpa" or "eager", or use a GPU.'
        )
    half = query.dtype in (torch.bfloat16, torch.float16)
    slow_sdpa = half and CPU_CAPABILITY == "AVX512" and (training or CPU_MULTIPLIES_BFLOAT16)
    return "eager" if implementation == "sdpa" and slow_sdpa else implementation


class HiViTAttention(nn.Module):
    """
    Attention over units, with a learned bias per head and relative position if `use_relative_position_bias`; over all
    of them, or inside windows of `window_size` units.
    """

    def __init__(
        self,
        config: HiViTConfig,
        channels: int,
        num_heads: int,
        use_relative_position_bias: bool,
        window_size: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.window_size = window_size
        self.scaling = (channels // num_heads) ** -0.5
        self.dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.proj_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.relative_position_bias_table = None
        if use_relative_position_bias:
            self.table_size = tuple(2 * length - 1 for length in config.grid_size)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(self.table_size), num_heads))

    def position_bias(self, index: torch.LongTensor, grid: tuple[int, int]) -> torch.Tensor:
        """The bias of each head for the pairs in `index`: (V, V) or (B, V, V) -> (1 or B, heads, V, V)."""
        table = resize_table(self.relative_position_bias_table, self.table_size, tuple(2 * n - 1 for n in grid))
        bias = table.t().contiguous().index_select(1, index.flatten()).unflatten(1, index.shape)
        return bias.unsqueeze(0) if index.ndim == 2 else bias.transpose(0, 1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_index: torch.LongTensor | None = None,
        grid: tuple[int, int] | None = None,
        window_padding: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states)
        if self.window_size is None:
            output, probabilities = self.attend(qkv, position_index, grid, **kwargs)
        else:
            padding = None if window_padding is None else self.qkv(window_padding)
            output, probabilities = self.attend_in_windows(qkv, grid, padding, **kwargs), None
        return self.proj_dropout(self.proj(output)), probabilities

    def attend(
        self,
        qkv: torch.Tensor,
        position_index: torch.LongTensor | None,
        grid: tuple[int, int] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All units among each other: (B, V, 3 * channels) -> (B, V, channels), and the probabilities if eager."""
        # (B, V, 3 * channels) -> three of (B, heads, V, d), which are views
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        implementation = effective_attention(self.config._attn_implementation, query, self.training)
        bias = None
        if self.relative_position_bias_table is not None:
            if "flash" in implementation:
                raise ValueError(
                    f"{implementation} cannot add the relative position bias of this model: "
                    'load it with attn_implementation="sdpa", "eager" or "flex_attention".'
                )
            bias = self.position_bias(position_index, grid).to(query.dtype)
        if implementation == "flex_attention" and bias is not None:  # its additive mask has one head only
            kwargs, bias = {**kwargs, "position_bias": bias.expand(query.shape[0], -1, -1, -1)}, None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        output, probabilities = attention(
            self, query, key, value, bias, dropout=dropout, scaling=self.scaling, **kwargs
        )
        if probabilities is None and kwargs.get("output_attentions"):
            logger.warning_once(
                f"output_attentions=True, but {implementation} gives no attentions, so none are returned: load the "
                'model with attn_implementation="eager", or call set_attn_implementation("eager").'
            )
        if torch.compiler.is_exporting():  # SDPA is taken apart later, and what it gives then has other strides
            output = output.clone(memory_format=torch.contiguous_format)
        return output.flatten(2), probabilities

    def attend_in_windows(
        self,
        qkv: torch.Tensor,
        grid: tuple[int, int],
        padding: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Units of a window among each other: (B, N, 3 * channels) -> (B, N, channels). What is left at the right and the
        lower edge are smaller windows, unless there is `padding` (3 * channels,) to fill them up with.
        """
        (rows, columns), size = grid, self.window_size
        tokens = qkv.unflatten(1, grid)
        if padding is not None:
            filled = padding.to(qkv.dtype).expand(len(qkv), rows + -rows % size, columns + -columns % size, -1).clone()
            filled[:, :rows, :columns] = tokens
            tokens = filled
        bands = [
            torch.cat([self._attend_alike(part, **kwargs) for part in self._split(band, dim=2)], dim=2)
            for band in self._split(tokens, dim=1)
        ]
        return torch.cat(bands, dim=1)[:, :rows, :columns].flatten(1, 2)

    def _split(self, tokens: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The part that holds whole windows, and the rest; each if there is any."""
        rest = tokens.shape[dim] % self.window_size
        return tokens.split([length for length in (tokens.shape[dim] - rest, rest) if length], dim)

    def _attend_alike(self, tokens: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """A rectangle of windows of one size: (B, rows, columns, 3 * channels) -> (B, rows, columns, channels)."""
        height, width = (min(length, self.window_size) for length in tokens.shape[1:3])
        windows = tokens.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
        index, window = None, (self.window_size, self.window_size)
        if self.relative_position_bias_table is not None:
            index = relative_position_index((height, width), tokens.device, window)
        # (B, vertically, horizontally, height, width, 3 * channels) -> (all windows, height * width, 3 * channels)
        output, _ = self.attend(windows.flatten(3, 4).flatten(0, 2), index, window, **kwargs)
        output = output.unflatten(1, (height, width)).unflatten(0, windows.shape[:3])
        return output.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class HiViTMLPLayer(GradientCheckpointingLayer):
    """A layer of stages 1 and 2: one MLP block on the tokens of each unit, of any shape (B, ..., channels)."""

    def __init__(self, config: HiViTConfig, channels: int, mlp_ratio: float, drop_path_rate: float = 0.0):
        super().__init__()
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = HiViTMLP(config, channels, mlp_ratio)
        self.drop_path = HiViTDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        return hidden_states + self.drop_path(in_three_dimensions(self.mlp, self.norm2(hidden_states)))


class HiViTAttentionLayer(HiViTMLPLayer):
    """A layer of the main stage and of the decoder: attention over units, then the MLP block; (B, V, channels)."""

    def __init__(
        self,
        config: HiViTConfig,
        channels: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path_rate: float = 0.0,
        use_relative_position_bias: bool = False,
        window_size: int | None = None,
    ):
        super().__init__(config, channels, mlp_ratio, drop_path_rate)
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = HiViTAttention(config, channels, num_heads, use_relative_position_bias, window_size)
        self.attend_to_window_padding = config.attend_to_window_padding

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_index: torch.LongTensor | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # the original fills windows up with zeros before the norm, which makes its bias of them
        padding = self.norm1.bias if self.attend_to_window_padding else None
        attended, _ = self.attention(self.norm1(hidden_states), position_index, grid, padding, **kwargs)
        return super().forward(hidden_states + self.drop_path(attended))


class HiViTStage(nn.Module):
    """Layers, then the merge that leads to the next stage. Returns what the layers give and what the merge gives."""

    def __init__(self, layers: list[nn.Module], merge: nn.Module | None = None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.merge = merge

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        for layer in self.layers:
            hidden_states = layer(hidden_states, *args, **kwargs)
        return hidden_states, None if self.merge is None else self.merge(hidden_states)


class HiViTDecoder(nn.Module):
    """
    Predicts the pixels of all units from the visible ones, as the decoder of MAE (arXiv 2111.06377): (B, V, features),
    with the three stages of a unit side by side if `fuse_stages`, -> (B, N, p * p * channels).
    """

    def __init__(self, config: HiViTConfig):
        super().__init__()
        channels, eps = config.decoder_hidden_size, config.layer_norm_eps
        stage1, stage2, main = config.stage_channels[1:]
        features = 16 * stage1 + 4 * stage2 + main if config.fuse_stages else main
        self.grid_size = config.grid_size
        self.norm = nn.LayerNorm(features, eps=eps) if config.fuse_stages else nn.Identity()
        self.embed = nn.Linear(features, channels)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, channels))
        positions = sin_cos_position_embeddings(config.grid_size, channels).to(torch.get_default_dtype())
        self.position_embeddings = nn.Parameter(positions)
        layer = (config, channels, config.decoder_num_attention_heads, config.decoder_mlp_ratio)
        self.layers = nn.ModuleList(HiViTAttentionLayer(*layer) for _ in range(config.decoder_num_hidden_layers))
        self.layernorm = nn.LayerNorm(channels, eps=eps)
        self.head = nn.Linear(channels, config.patch_size**2 * config.num_channels)

    def register_parameter(self, name: str, param: nn.Parameter | None):
        """Keeps the position embedding frozen: `from_pretrained` assigns new parameters, all of them trainable."""
        super().register_parameter(name, param.requires_grad_(False) if name == "position_embeddings" else param)

    def forward(
        self,
        hidden_states: torch.Tensor,
        visible: torch.LongTensor,
        grid: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = self.embed(self.norm(hidden_states))
        batch_size, _, channels = hidden_states.shape
        tokens = self.mask_token.to(hidden_states.dtype).expand(batch_size, math.prod(grid), channels)
        hidden_states = tokens.scatter(1, visible[:, :, None].expand(-1, -1, channels), hidden_states)
        positions = self.position_embeddings
        if grid != self.grid_size:
            positions = sin_cos_position_embeddings(grid, channels).to(positions)
        hidden_states = hidden_states + positions
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.head(self.layernorm(hidden_states))


# -- layer-wise learning rate decay ---------------------------------------------------------------------------------

# Not decayed in fine-tuning, though they are matrices; pre-training decays them.
POSITION_PARAMETERS = ("position_embeddings", "relative_position_bias_table")
LAYER = re.compile(r"(?:^|\.)stages\.(\d)\.(?:layers\.(\d+)|merge)\.")


def number_of_layer_ids(config: HiViTConfig, count_early_layers: bool = True) -> int:
    """How many ids `layer_id` gives: the embedding, each counted layer, and the head."""
    return (config.num_hidden_layers if count_early_layers else config.depths[2]) + 2


def layer_id(name: str, config: HiViTConfig, count_early_layers: bool = True) -> int:
    """
    The layer of a parameter for layer-wise decay, as in one of the two numberings of the original.

    The patch and the position embedding are 0. With `count_early_layers`, as in fine-tuning for classification, every
    layer counts (1 to 28 in base), a merge has the id of the layer before it, and the rest is the head (29). Without,
    as in detection and segmentation, all before the main stage is 0, and only the main stage counts (1 to 20, head 21).

    Args:
        name: of the parameter, with or without prefixes such as that of PEFT.
        config: of the network.
        count_early_layers: which numbering.
    """
    if "decoder." not in name:
        if re.search(r"(?:^|\.)(?:embeddings\.|position_embeddings$)", name):
            return 0
        if found := LAYER.search(name):
            stage, layers = int(found[1]), config.stage_layers
            layer = layers[stage] if found[2] is None else int(found[2]) + 1
            if count_early_layers:
                return sum(layers[:stage]) + layer
            return layer if stage == 2 else 0
    return number_of_layer_ids(config, count_early_layers) - 1


# -- models ---------------------------------------------------------------------------------------------------------


class HiViTPreTrainedModel(PreTrainedModel):
    """Initialization of the weights, and what all HiViT models support."""

    config: HiViTConfig
    base_model_prefix = "hivit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the losses are means, which Trainer then divides by the accumulation steps
    _no_split_modules = ["HiViTEmbeddings", "HiViTMLPLayer", "HiViTAttentionLayer", "HiViTDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "projection"
    _can_record_outputs = {"hidden_states": HiViTMLPLayer, "attentions": HiViTAttention}
    auto_map = None  # of all classes; the package sets it, folders have it in config.json

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:  # those of FSDP and of users are not in this file, which is saved with models
            cls._auto_class = None

    def __init__(self, config: HiViTConfig, *args, **kwargs):
        config.check()
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As in transformers; what `import hivit_hf` defines is saved with its code, for `trust_remote_code=True`."""
        if self._auto_class is not None and self.auto_map is not None:
            self.config.auto_map = dict(self.auto_map)  # transformers would add the entry of this class alone
        super().save_pretrained(save_directory, *args, **kwargs)

    units_to_map = staticmethod(units_to_map)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """
        The layer of each parameter, as timm's `create_optimizer_v2(model, layer_decay=...)` asks for it.

        Args:
            coarse: whether all before the main stage is one layer, see `layer_id`.
        """
        return partial(layer_id, config=self.config, count_early_layers=not coarse)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices that timm's optimizers do not decay, as in fine-tuning."""
        return {name for name, _ in self.named_parameters() if name.endswith(POSITION_PARAMETERS)}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):  # the original keeps what PyTorch draws
            bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
        if isinstance(module, HiViTAttention) and module.relative_position_bias_table is not None:
            init.zeros_(module.relative_position_bias_table)
        elif isinstance(module, HiViTModel) and module.position_embeddings is not None:
            if module.sin_cos_init:
                positions = sin_cos_position_embeddings(self.config.grid_size, self.config.hidden_size)
                init.copy_(module.position_embeddings, positions)
            else:
                init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, HiViTDecoder):
            init.normal_(module.mask_token, std=std)
            channels = module.position_embeddings.shape[2]
            init.copy_(module.position_embeddings, sin_cos_position_embeddings(module.grid_size, channels))


class HiViTModel(HiViTPreTrainedModel):
    """
    The encoder. Never masks unless it is told which units.

    Args:
        config (`HiViTConfig`): the configuration.
        add_pooling_layer (`bool`, *optional*, defaults to `True`): whether to return `pooler_output`.
        sin_cos_init (`bool`, *optional*, defaults to `False`): whether the learned position embedding is initialized
            with sines and cosines, as in the masked autoencoder, or with random numbers.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: HiViTConfig, add_pooling_layer: bool = True, sin_cos_init: bool = False):
        super().__init__(config)
        self.sin_cos_init = sin_cos_init
        self.embeddings = HiViTEmbeddings(config)
        stage1, stage2, main = config.stage_channels[1:]
        num_layers = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(num_layers - 1, 1) for i in range(num_layers)]
        first, second = config.stage_layers[0], sum(config.stage_layers[:2])
        self.stages = nn.ModuleList(
            [
                HiViTStage(
                    [HiViTMLPLayer(config, stage1, config.early_mlp_ratio, rate) for rate in rates[:first]],
                    HiViTMerge(config, stage1),
                ),
                HiViTStage(
                    [HiViTMLPLayer(config, stage2, config.early_mlp_ratio, rate) for rate in rates[first:second]],
                    HiViTMerge(config, stage2),
                ),
                HiViTStage(
                    [
                        HiViTAttentionLayer(
                            config,
                            main,
                            config.num_attention_heads,
                            config.mlp_ratio,
                            rate,
                            config.use_relative_position_bias,
                            None if layer in config.global_attention_layers else config.window_size,
                        )
                        for layer, rate in enumerate(rates[second:])
                    ]
                ),
            ]
        )
        self.position_embeddings = None
        if config.use_absolute_position_embeddings:
            self.position_embeddings = nn.Parameter(torch.zeros(1, math.prod(config.grid_size), main))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.add_pooling_layer = add_pooling_layer
        self.layernorm = None
        if add_pooling_layer and config.pooler_layernorm:
            self.layernorm = nn.LayerNorm(main, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        num_visible_units: int | None = None,
        output_stage_hidden_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViTModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`):
                Images, with heights and widths that are multiples of `config.patch_size`.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                Units that are left out, True = masked; the same number in each row. Nothing is masked if not given.
            num_visible_units (`int`, *optional*):
                Number of visible units per row of `bool_masked_pos`, which is then not checked. If not given: a mask on
                the CPU is counted and checked, also where the images are on another device. A mask on a CUDA device
                must leave as many units visible as `config.mask_ratio` says; the device asserts it, without waiting.
                Under `torch.compile` and `torch.export` the number follows from `config.mask_ratio`, unchecked.
            output_stage_hidden_states (`bool`, *optional*, defaults to `False`):
                Whether to return the embedding and the output of each stage.

        Raises:
            ValueError: for images and masks of other shapes, and masks without a visible unit.
        """
        grid = self.check_pixel_values(pixel_values)
        visible = None
        if bool_masked_pos is None and num_visible_units is not None:
            raise ValueError(f"num_visible_units ({num_visible_units}) needs bool_masked_pos: which units they are.")
        if bool_masked_pos is not None:
            if self.config.window_size is not None:
                raise ValueError(
                    f"Windows of {self.config.window_size} units need all of them: give no mask, or set window_size "
                    "to None."
                )
            if num_visible_units is None:
                num_visible_units = self._count_visible_units(bool_masked_pos, pixel_values.shape[0], math.prod(grid))
            visible = visible_indices(bool_masked_pos, num_visible_units).to(pixel_values.device)

        stem = self.embeddings(pixel_values, visible)
        stage1, hidden_states = self.stages[0](stem)
        stage2, hidden_states = self.stages[1](hidden_states)
        hidden_states = hidden_states.flatten(2)  # (B, V, 1, 1, C) -> (B, V, C)
        # `device_map` may have put the stages on several devices
        visible = None if visible is None else visible.to(hidden_states.device)
        if self.position_embeddings is not None:
            positions = resize_table(self.position_embeddings[0], self.config.grid_size, grid)
            positions = positions.to(hidden_states.device)
            hidden_states = hidden_states + (
                positions if visible is None else nn.functional.embedding(visible, positions)
            )
        position_index = None
        if self.config.use_relative_position_bias:
            position_index = relative_position_index(grid, hidden_states.device)
            if visible is not None:
                position_index = position_index[visible[:, :, None], visible[:, None, :]]
        stage3, _ = self.stages[2](self.dropout(hidden_states), position_index, grid, **kwargs)

        pooled = stage3.mean(dim=1) if self.add_pooling_layer else None
        if self.layernorm is not None:
            pooled = self.layernorm(pooled)
        stages = (stem, stage1, stage2, stage3) if output_stage_hidden_states else None
        return HiViTModelOutput(last_hidden_state=stage3, pooler_output=pooled, stage_hidden_states=stages)

    def check_pixel_values(self, pixel_values: torch.Tensor | None) -> tuple[int, int]:
        """The grid of units, as (rows, columns), of images that the model can take. ValueError for others."""
        height, width = self.check_images(pixel_values)
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"Image height and width must be multiples of patch_size {patch_size}, got {height}x{width}. Resize to "
                f"height {nearest_multiples(height, patch_size)} and width {nearest_multiples(width, patch_size)}."
            )
        return height // patch_size, width // patch_size

    def check_images(self, pixel_values: torch.Tensor | None) -> tuple[int, int]:
        """Height and width of images of any size. ValueError for what is no batch of images."""
        channels = self.config.num_channels
        is_tensor = isinstance(pixel_values, torch.Tensor)
        if not is_tensor or pixel_values.ndim != 4 or pixel_values.shape[1] != channels or not pixel_values.shape[0]:
            got = tuple(pixel_values.shape) if is_tensor else f"a {type(pixel_values).__name__}"
            raise ValueError(
                f"pixel_values must be a tensor (batch, {channels} channels, height, width), got {got}. Convert the "
                f"images, or make the model with another num_channels."
            )
        height, width = pixel_values.shape[2:]
        if not height or not width:
            raise ValueError(f"Images must have pixels, got {height}x{width}: they are empty.")
        return height, width

    def _count_visible_units(self, bool_masked_pos: torch.BoolTensor, batch_size: int, num_units: int) -> int:
        """Number of visible units per row of a mask that a user gave. ValueError if rows differ or none is left."""
        check_per_unit("bool_masked_pos", bool_masked_pos, (batch_size, num_units))
        if torch.compiler.is_compiling():
            return self.config.num_visible_units(num_units)
        counts = (bool_masked_pos == 0).sum(dim=1)
        if bool_masked_pos.is_cuda:  # to read the counts is to wait for all that the device has still to do
            expected = self.config.num_visible_units(num_units)
            message = (
                f"bool_masked_pos must leave {expected} of {num_units} units of each row visible, by config.mask_ratio "
                f"{self.config.mask_ratio}: give num_visible_units for another number, or the mask on the CPU."
            )
            torch._assert_async((counts == expected).all(), message)
            return expected
        counts = sorted(set(counts.tolist()))
        if len(counts) > 1:
            raise ValueError(
                f"Every row of bool_masked_pos must mask the same number of units, got rows with {counts} visible. "
                "Draw the masks with one mask ratio."
            )
        if counts == [0]:
            raise ValueError(f"bool_masked_pos masks all {num_units} units: leave at least one visible (False).")
        return counts[0]


class HiViTForMaskedImageModeling(HiViTPreTrainedModel):
    """Masked autoencoder: the encoder sees the visible units only, a decoder predicts the pixels of the others."""

    def __init__(self, config: HiViTConfig):
        super().__init__(config)
        config.num_visible_units(math.prod(config.grid_size))
        self.hivit = HiViTModel(config, add_pooling_layer=False, sin_cos_init=True)
        self.decoder = HiViTDecoder(config)
        self.post_init()

    def draw_mask(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> torch.BoolTensor:
        """
        A random mask of `config.mask_ratio`, True = masked: (B, N). The units with the smallest noise are kept.

        Raises:
            ValueError: if `noise` has another shape, or no unit would stay visible.
        """
        shape = (pixel_values.shape[0], math.prod(self.hivit.check_pixel_values(pixel_values)))
        if noise is None:
            noise = torch.rand(shape, device=pixel_values.device)
        check_per_unit("noise", noise, shape)
        # the sort of ONNX is stable, but its exporter knows only the other one
        order = noise.argsort(dim=1) if torch.compiler.is_exporting() else noise.argsort(dim=1, stable=True)
        keep = order[:, : self.config.num_visible_units(shape[1])]
        return torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        noise: torch.Tensor | None = None,
        num_visible_units: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HiViTMaskedImageModelingOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`):
                Images, with heights and widths that are multiples of `config.patch_size`.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                Units to predict, True = masked; the same number in each row. Drawn with `config.mask_ratio` if not
                given.
            noise (`torch.Tensor` of shape `(B, N)`, *optional*):
                Random numbers that the mask is drawn with: the units with the smallest stay visible.
            num_visible_units (`int`, *optional*):
                Number of visible units per row of `bool_masked_pos`, as in `HiViTModel`.

        Raises:
            ValueError: for images, masks and noise of other shapes, and masks without a visible unit.
        """
        patch_size, grid = self.config.patch_size, self.hivit.check_pixel_values(pixel_values)
        if bool_masked_pos is None and num_visible_units is None:
            bool_masked_pos = self.draw_mask(pixel_values, noise)
            num_visible_units = self.config.num_visible_units(math.prod(grid))
        encoded = self.hivit(
            pixel_values,
            bool_masked_pos,
            num_visible_units=num_visible_units,
            output_stage_hidden_states=self.config.fuse_stages,
            return_dict=True,
            **kwargs,
        )
        features = encoded.last_hidden_state
        visible = visible_indices(bool_masked_pos, features.shape[1]).to(features.device)
        # what was masked indeed: a given mask may not have been checked
        bool_masked_pos = torch.ones_like(bool_masked_pos, dtype=torch.bool, device=visible.device)
        bool_masked_pos = bool_masked_pos.scatter(1, visible, False)
        if self.config.fuse_stages:
            stages = [stage.flatten(2).to(features.device) for stage in encoded.stage_hidden_states[1:]]
            features = torch.cat(stages, dim=2)
        logits = self.decoder(features, visible, grid, **kwargs)

        target = self.target(pixel_values).to(logits.device)
        error = nn.functional.mse_loss(logits.to(target.dtype), target, reduction="none").mean(dim=2)
        num_masked = bool_masked_pos.numel() - visible.numel()
        return HiViTMaskedImageModelingOutput(
            loss=(error * bool_masked_pos.to(error.device)).sum() / max(num_masked, 1),
            reconstruction=pixels_to_image(logits, patch_size, grid),
            logits=logits,
            bool_masked_pos=bool_masked_pos,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels that the decoder is trained to predict, at least float32: (B, N, p * p * num_channels)."""
        pixels = image_to_pixels(pixel_values, self.config.patch_size)
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        if not self.config.norm_pix_loss:
            return pixels
        mean, std = self._unit_statistics(pixels)
        return (pixels - mean) / std

    @staticmethod
    def _unit_statistics(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)  # unbiased, as in MAE
        return mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.BoolTensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The reconstructed image: predicted units as pixels (each with the mean and standard deviation of the true unit
        if `config.norm_pix_loss`), visible units as they were. Arguments and errors as in `forward`.

        Returns:
            `torch.Tensor` of shape `(B, num_channels, H, W)`, in the space of `pixel_values`, float32.
        """
        output = self(pixel_values, bool_masked_pos=bool_masked_pos, noise=noise, return_dict=True)
        pixels = image_to_pixels(pixel_values, self.config.patch_size).float()
        predicted = output.logits.float()
        if self.config.norm_pix_loss:
            mean, std = self._unit_statistics(pixels)
            predicted = predicted * std + mean
        pixels = torch.where(output.bool_masked_pos[:, :, None], predicted, pixels)
        return pixels_to_image(pixels, self.config.patch_size, self.hivit.check_pixel_values(pixel_values))


class HiViTForImageClassification(HiViTPreTrainedModel):
    """The encoder with a linear classifier on the pooled output; `config.problem_type` chooses the loss."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    def __init__(self, config: HiViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hivit = HiViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        num_visible_units: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`):
                Images, with heights and widths that are multiples of `config.patch_size`.
            labels (`torch.Tensor`, *optional*):
                `(B,)` class indices, `(B, num_labels)` zeros and ones for multi-label classification, or `(B,)` or
                `(B, num_labels)` numbers for regression.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                Units to leave out, True = masked; the same number in each row. They are never computed.
            num_visible_units (`int`, *optional*):
                Number of visible units per row of `bool_masked_pos`, as in `HiViTModel`.

        Raises:
            ValueError: for images and masks of other shapes.
        """
        encoded = self.hivit(pixel_values, bool_masked_pos, num_visible_units, return_dict=True, **kwargs)
        logits = self.classifier(encoded.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class HiViTBackbone(BackboneMixin, HiViTPreTrainedModel):
    """
    Feature maps for detectors and segmenters: `stem` and `stage1` (stride 4 for patches of 16 px), `stage2` (8),
    `stage3` (16), and, with `config.add_pooled_stage`, `stage4` (32), which is `stage3` max-pooled. With
    `config.apply_layernorm`, each map has a layer norm of its own. The published detectors and segmenters read `stage1`
    to `stage4`, normalized (paper, section 4.3).

    The weights of any HiViT load; layer norms that a checkpoint does not have are initialized.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\.", r"^(hivit\.)?layernorm\."]

    def __init__(self, config: HiViTConfig):
        super().__init__(config)
        self.num_features = config.stage_channels + [config.hidden_size] * config.add_pooled_stage
        self.hivit = HiViTModel(config, add_pooling_layer=False)
        self.norms = None
        if config.apply_layernorm:
            channels = self.out_feature_channels
            self.norms = nn.ModuleDict(
                {name: nn.LayerNorm(channels[name], eps=config.layer_norm_eps) for name in config.out_features}
            )
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, H, W)`):
                Images of any height and width. They are padded with zeros to whole units, at the right and below.

        Returns:
            `BackboneOutput` with `feature_maps`, one `(B, channels, ceil(H / stride), ceil(W / stride))` per
            `config.out_features`, and with `hidden_states` of all units, padding included. Where the grid of units has
            an odd length, the pooling keeps what is left at the right and the lower edge.

        Raises:
            ValueError: for images of other shapes, and for masks: a map needs all units.
        """
        size, patch_size = self.hivit.check_images(pixel_values), self.config.patch_size
        if kwargs.get("bool_masked_pos") is not None:
            raise ValueError("HiViTBackbone got bool_masked_pos, but a map needs all units: use HiViTModel to mask.")
        padded = any(length % patch_size for length in size)
        if padded:
            pixel_values = pad_to_units(pixel_values, patch_size)
        grid = self.hivit.check_pixel_values(pixel_values)
        encoded = self.hivit(pixel_values, output_stage_hidden_states=True, return_dict=True, **kwargs)
        stages = dict(zip(self.stage_names, encoded.stage_hidden_states))
        maps = []
        for name in self.out_features:
            feature_map = units_to_map(stages["stage3" if name == "stage4" else name], grid)
            if name == "stage4":
                feature_map = nn.functional.max_pool2d(feature_map, kernel_size=2, ceil_mode=True)
            elif padded:  # not stage4, every number of which covers some of the image
                stride = patch_size * grid[0] // feature_map.shape[2]
                feature_map = feature_map[:, :, : -(-size[0] // stride), : -(-size[1] // stride)]
            if self.norms is not None:
                feature_map = self.norms[name](feature_map.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(feature_map)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


__all__ = [
    "HiViTBackbone",
    "HiViTForImageClassification",
    "HiViTForMaskedImageModeling",
    "HiViTModel",
    "HiViTPreTrainedModel",
]
