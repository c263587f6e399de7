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
"""HiViT configuration: every number that defines the network (arXiv 2205.14949)."""

import difflib
import math
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The published networks: paper table 1, and iTPN (arXiv 2211.12735) for large.
ARCHITECTURES = {
    "tiny": {"hidden_size": 384, "depths": [1, 1, 10], "num_attention_heads": 6},
    "small": {"hidden_size": 384, "depths": [2, 2, 20], "num_attention_heads": 6},
    "base": {"hidden_size": 512, "depths": [2, 2, 20], "num_attention_heads": 8},
    "large": {"hidden_size": 768, "depths": [2, 2, 40], "num_attention_heads": 12, "early_blocks_per_depth": 1},
    "base-mae": {
        "hidden_size": 512,
        "depths": [2, 2, 20],
        "num_attention_heads": 8,
        "use_relative_position_bias": False,
    },
}

# What is larger is a mistake, at which a model would hang or fill the memory.
MAX_IMAGE_SIZE, MAX_WIDTH, MAX_LAYERS, MAX_LABELS = 32_768, 65_536, 1000, 1_000_000
_MOST = {
    **dict.fromkeys(["patch_size", "window_size", "encoder_stride"], MAX_IMAGE_SIZE),
    **dict.fromkeys(["num_channels", "hidden_size", "num_attention_heads"], MAX_WIDTH),
    **dict.fromkeys(["decoder_hidden_size", "decoder_num_attention_heads"], MAX_WIDTH),
    **dict.fromkeys(["early_mlp_ratio", "mlp_ratio", "decoder_mlp_ratio"], 1000),
    **dict.fromkeys(["early_blocks_per_depth", "decoder_num_hidden_layers"], MAX_LAYERS),
}

PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"]

# Keywords that transformers itself passes to a configuration and that are neither fields nor attributes of its base.
_TRANSFORMERS_KEYWORDS = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "quantization_config",
}
# What Trainer sets on the configuration of every model, and so writes into files.
_TRAINER_KEYWORDS = {"use_cache"}


@strict
class HiViTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of all HiViT models. The defaults are the base classifier of the paper.

    Args:
        image_size (`int` or pair `(height, width)`, *optional*, defaults to 224):
            Image size in px of the position embedding and the relative position bias. They are interpolated for others.
        patch_size (`int`, *optional*, defaults to 16):
            Side in px of a patch, which is masked or kept as a whole ("unit" in the paper) and embedded as 4x4 tokens:
            a multiple of 4.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the images.
        hidden_size (`int`, *optional*, defaults to 512):
            Channels of the main stage, C. Stages 1 and 2 have C/4 and C/2.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 20]`):
            Depth of stage 1, stage 2 and the main stage.
        early_blocks_per_depth (`int`, *optional*, defaults to 2):
            MLP blocks per depth of stages 1 and 2; iTPN counts single blocks (1).
        num_attention_heads (`int`, *optional*, defaults to 8):
            Attention heads of the main stage.
        early_mlp_ratio (`float`, *optional*, defaults to 3.0):
            Width of the MLPs of stages 1 and 2, relative to their channels.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the MLPs of the main stage, relative to `hidden_size`.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether query, key and value have a bias.
        use_absolute_position_embeddings (`bool`, *optional*, defaults to `True`):
            Whether a learned position embedding is added to the input of the main stage.
        use_relative_position_bias (`bool`, *optional*, defaults to `True`):
            Whether attention layers have a learned relative position bias. The published masked autoencoder has none.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout after the position embedding, in the MLPs and after the attention.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last layer; it grows linearly from 0 at the first.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal distribution that weights are initialized with.
        pooler_layernorm (`bool`, *optional*, defaults to `True`):
            Whether the mean over the units is normalized. mmpretrain's models do not.
        window_size (`int`, *optional*):
            Side in units of the windows that attention stays in, for large images; all units attend to each other if
            unset. The published detectors have 14.
        global_attention_layers (`list[int]`, *optional*, defaults to `[]`):
            Layers of the main stage without windows, counted from 0. The published detectors have `[4, 9, 14, 19]`.
        attend_to_window_padding (`bool`, *optional*, defaults to `False`):
            What happens to windows that an image does not fill: they are smaller, or, as in the original's detection
            code, filled up with zeros (before the norm) that the others attend to.
        mask_ratio (`float`, *optional*, defaults to 0.75):
            Fraction of patches that masked image modeling masks, in [0, 1).
        norm_pix_loss (`bool`, *optional*, defaults to `True`):
            Whether the loss compares pixels normalized per unit.
        fuse_stages (`bool`, *optional*, defaults to `True`):
            Whether the decoder of masked image modeling reads all three stages, or the last only.
        decoder_hidden_size (`int`, *optional*, defaults to 512):
            Channels of the decoder.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 6):
            Layers of the decoder.
        decoder_num_attention_heads (`int`, *optional*, defaults to 16):
            Attention heads of the decoder.
        decoder_mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the decoder's MLPs, relative to `decoder_hidden_size`.
        encoder_stride (`int`, *optional*):
            Pixels per unit side in the reconstruction, which transformers' `run_mim.py` reads and sets; `patch_size` if
            unset. It has no effect: the decoder predicts whole units.
        out_features (`list[str]`, *optional*):
            Stages that `HiViTBackbone` returns, of `"stem"`, `"stage1"`, `"stage2"`, `"stage3"` and, with
            `add_pooled_stage`, `"stage4"`, in this order. Unset: the last.
        out_indices (`list[int]`, *optional*):
            The same as positions in that list.
        add_pooled_stage (`bool`, *optional*, defaults to `False`):
            Whether `HiViTBackbone` has a fourth stage, `"stage4"`: the third, max-pooled to half its resolution. The
            published detectors and segmenters have it.
        apply_layernorm (`bool`, *optional*, defaults to `False`):
            Whether `HiViTBackbone` applies a layer norm to each feature map, with weights of its own. The published
            detectors and segmenters do.

    Raises:
        ValueError: for shapes that do not fit together and for keywords that do not exist.

    Example:

    ```python
    >>> from hivit_hf import HiViTConfig, HiViTModel

    >>> config = HiViTConfig.from_architecture("tiny", num_labels=10)
    >>> model = HiViTModel(config)
    ```"""

    model_type = "hivit"
    # names of the original code, where "stem" is more than the embedding
    attribute_map = {"stem_blocks_per_depth": "early_blocks_per_depth", "stem_mlp_ratio": "early_mlp_ratio"}

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 512
    depths: list[int] | tuple[int, ...] = (2, 2, 20)
    early_blocks_per_depth: int = 2
    num_attention_heads: int = 8
    early_mlp_ratio: float | int = 3.0
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    qkv_bias: bool = True
    use_absolute_position_embeddings: bool = True
    use_relative_position_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    layer_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    pooler_layernorm: bool = True
    window_size: int | None = None
    global_attention_layers: list[int] | tuple[int, ...] = ()
    attend_to_window_padding: bool = False
    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    fuse_stages: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 6
    decoder_num_attention_heads: int = 16
    decoder_mlp_ratio: float | int = 4.0
    encoder_stride: int | None = None
    add_pooled_stage: bool = False
    apply_layernorm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def from_architecture(cls, name: str, **overrides) -> "HiViTConfig":
        """
        The configuration of a published network.

        Args:
            name (`str`): `"tiny"`, `"small"`, `"base"`, `"large"` (iTPN-L's encoder) or `"base-mae"`.
            overrides: any keyword of the configuration, `num_labels` for example.

        Raises:
            ValueError: if there is no such architecture.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"There is no HiViT architecture named {name!r}. Choose from {', '.join(ARCHITECTURES)}.")
        return cls(**{**ARCHITECTURES[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "HiViTConfig | tuple[HiViTConfig, dict]":
        """As in transformers, which ignores keywords that it does not know; here misspelled ones are refused."""
        for name in set(kwargs) - set(cls._keywords()):
            close = difflib.get_close_matches(name, cls._keywords(), n=1, cutoff=0.7)
            if close:
                raise ValueError(f"HiViTConfig has no keyword {name!r}. Did you mean {close[0]!r}?")
        # which stages exist must be known before some are chosen
        kwargs = {name: kwargs[name] for name in sorted(kwargs, key=lambda name: name != "add_pooled_stage")}
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).check()
        return loaded

    def __post_init__(self, **kwargs):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        for name in self.attribute_map.keys() & kwargs.keys():
            setattr(self, name, kwargs.pop(name))
        self._refuse_unknown_keywords(kwargs)
        num_labels = kwargs.get("num_labels")
        if isinstance(num_labels, int) and num_labels > MAX_LABELS:
            raise ValueError(f"num_labels must be at most {MAX_LABELS}, got {num_labels}.")
        self.depths = list(self.depths)
        self.global_attention_layers = list(self.global_attention_layers)
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        if self.encoder_stride is None:
            self.encoder_stride = self.patch_size
        self._check_stages(out_features)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        if not self.out_features:
            raise ValueError(f"out_features is empty: choose from {self.stage_names}, or leave it out for the last.")
        super().__post_init__(**kwargs)
        self.check()

    # -- numbers that follow from the fields

    @property
    def stage_names(self) -> list[str]:
        return ["stem", "stage1", "stage2", "stage3"] + ["stage4"] * self.add_pooled_stage

    @property
    def stage_channels(self) -> list[int]:
        """Channels of the embedding and of the three stages."""
        return [self.hidden_size // 4, self.hidden_size // 4, self.hidden_size // 2, self.hidden_size]

    @property
    def stage_layers(self) -> list[int]:
        """Layers of each stage: MLP blocks in the first two, attention + MLP blocks in the main stage."""
        stage1, stage2, main = self.depths
        return [stage1 * self.early_blocks_per_depth, stage2 * self.early_blocks_per_depth, main]

    @property
    def num_hidden_layers(self) -> int:
        """All layers of the encoder, which is what `output_hidden_states` records."""
        return sum(self.stage_layers)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value):
        raise NotImplementedError(f"num_hidden_layers follows from depths: got {value!r}; set depths instead.")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of units in an image of `image_size`."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def num_visible_units(self, num_units: int) -> int:
        """
        Units that stay visible when `mask_ratio` of `num_units` are masked (`masking_id` in the original).

        Raises:
            ValueError: if none stays visible, or `mask_ratio` is outside [0, 1).
        """
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {self.mask_ratio}. The published value is 0.75.")
        visible = int(num_units * (1 - self.mask_ratio))
        if visible < 1:
            highest = max(math.floor(1000 * (1 - 1 / num_units) - 1) / 1000, 0)
            raise ValueError(
                f"At least one unit must stay visible: mask_ratio {self.mask_ratio} of {num_units} units leaves none. "
                f"Lower mask_ratio to {highest} or less, or use larger images."
            )
        return visible

    # -- what is refused

    def check(self):
        """
        Check that the numbers fit together; the models call it again, as later assignments are not checked.

        Raises:
            ValueError: what does not fit, what was given, and what would.
        """
        if len(self.depths) != 3 or min(self.depths, default=0) < 1:
            raise ValueError(f"depths must be three positive numbers like [2, 2, 20], got {self.depths}.")
        positive = ["patch_size", "num_channels", "hidden_size", "early_blocks_per_depth", "num_attention_heads"]
        positive += ["decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"]
        positive += ["early_mlp_ratio", "mlp_ratio", "decoder_mlp_ratio", "layer_norm_eps", "initializer_range"]
        positive += ["encoder_stride"]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}.")
        if max(self.stage_layers) > MAX_LAYERS:
            raise ValueError(
                f"depths {self.depths} make stages of {self.stage_layers} layers, where {MAX_LAYERS} are the most: "
                "lower them."
            )
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "mask_ratio"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}. Give a fraction such as 0.1.")
        if self.hidden_act not in ACT2FN:
            close = difflib.get_close_matches(self.hidden_act, ACT2FN, n=3) or ["gelu"]
            raise ValueError(f"hidden_act {self.hidden_act!r} does not exist; did you mean {' or '.join(close)}?")
        widths = {"early_mlp_ratio": self.stage_channels[0], "mlp_ratio": self.hidden_size}
        for name, channels in (widths | {"decoder_mlp_ratio": self.decoder_hidden_size}).items():
            if int(channels * getattr(self, name)) < 1:
                raise ValueError(
                    f"{name} {getattr(self, name)} of {channels} channels leaves an MLP without width: "
                    f"give {1 / channels:.3g} or more; the published values are 3 in stages 1 and 2, and 4 elsewhere."
                )
        self._check_windows()
        self._check_stages(self.out_features)
        if self.add_pooled_stage and "stage4" not in self.out_features:
            raise ValueError(
                f"add_pooled_stage=True adds 'stage4', but out_features {self.out_features} leave it out: name it "
                "there, or set add_pooled_stage=False."
            )
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type {self.problem_type!r} does not exist; choose from {PROBLEM_TYPES}.")
        if self.patch_size % 4:
            lower = max(self.patch_size // 4 * 4, 4)
            raise ValueError(
                f"patch_size must be a multiple of 4, as a unit is a 4x4 grid of tokens: got {self.patch_size}; "
                f"use {lower} or {self.patch_size // 4 * 4 + 4}."
            )
        sizes = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        if len(sizes) != 2 or any(size < 1 or size % self.patch_size for size in sizes):
            raise ValueError(
                f"image_size must be a positive multiple of patch_size {self.patch_size}, or two (height, width), "
                f"got {self.image_size}; the nearest are {[nearest_multiples(s, self.patch_size) for s in sizes]}."
            )
        if max(sizes) > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be at most {MAX_IMAGE_SIZE}, got {self.image_size}.")
        for prefix in ["", "decoder_"]:
            channels, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if channels % 4:
                raise ValueError(f"{prefix}hidden_size must be a multiple of 4, got {channels}.")
            if channels % heads:
                divisors = [h for h in range(1, channels + 1) if channels % h == 0]
                raise ValueError(
                    f"{prefix}num_attention_heads must divide {prefix}hidden_size {channels}, got {heads}; "
                    f"the nearest that does is {min(divisors, key=lambda h: abs(h - heads))}."
                )

    def _check_windows(self):
        if self.window_size is None:
            for name in ["global_attention_layers", "attend_to_window_padding"]:
                if getattr(self, name):
                    raise ValueError(f"{name} {getattr(self, name)} needs window_size: give it, or leave {name} out.")
        elif self.window_size < 1:
            raise ValueError(f"window_size must be positive, got {self.window_size}. The published value is 14.")
        outside = [layer for layer in self.global_attention_layers if not 0 <= layer < self.depths[2]]
        if outside:
            raise ValueError(
                f"global_attention_layers {outside} do not exist: the main stage has layers 0 to {self.depths[2] - 1}."
            )

    @classmethod
    def _keywords(cls) -> list[str]:
        names = [field.name for field in fields(cls) if not field.name.startswith("_")]
        return [*names, *cls.attribute_map, "out_features", "out_indices", "num_labels"]

    def _refuse_unknown_keywords(self, keywords: dict):
        """A saved file may hold what a user or another version of transformers had attached: that is kept."""
        for name in keywords:
            inherited = hasattr(PreTrainedConfig, name) and not callable(getattr(PreTrainedConfig, name))
            if inherited or name in _TRANSFORMERS_KEYWORDS:
                continue
            if self.transformers_version is not None:
                if name in _TRAINER_KEYWORDS:
                    continue
                logger.warning(f"HiViTConfig keeps {name}={keywords[name]!r} of the loaded file, but does not use it.")
                continue
            close = difflib.get_close_matches(name, self._keywords(), n=1, cutoff=0.7)
            hint = f"Did you mean {close[0]!r}?" if close else f"The keywords are {', '.join(self._keywords())}."
            if name == "num_hidden_layers":
                hint = "It follows from 'depths': set that instead."
            raise ValueError(f"HiViTConfig has no keyword {name!r} (got {name}={keywords[name]!r}). {hint}")

    def _check_stages(self, out_features: list[str] | None):
        unknown = [name for name in out_features or [] if name not in self.stage_names]
        if unknown:
            hint = "" if "stage4" not in unknown else ", or set add_pooled_stage=True for 'stage4'"
            raise ValueError(f"out_features got {unknown}, which do not exist; choose from {self.stage_names}{hint}.")


def nearest_multiples(size: int, step: int) -> str:
    """The multiples of `step` around `size`, for error messages: `"224 or 240"`."""
    lower = size // step * step
    if lower == size and size > 0:
        return str(size)
    return f"{lower} or {lower + step}" if lower > 0 else str(step)


__all__ = ["HiViTConfig"]
