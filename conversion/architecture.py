"""Which HiViT a state dict belongs to, told from its names and shapes alone."""

import math
from collections.abc import Mapping

import torch

from checkpoint import ConversionError
from hivit_hf.configuration_hivit import ARCHITECTURES, HiViTConfig
from key_maps import KeyMap


# iTPN-B's encoder, which the package does not name as an architecture of its own.
_ITPN_BASE = {"hidden_size": 512, "depths": [3, 3, 24], "num_attention_heads": 8, "stem_blocks_per_depth": 1}
PUBLISHED = [HiViTConfig(**arguments) for arguments in (*ARCHITECTURES.values(), _ITPN_BASE)]

ATTENTION, MLP, MERGE = "attention", "mlp", "merge"
_TABLE = "hivit.{block}.attention.relative_position_bias_table"


def block_names(stage_layers: list[int]) -> list[str]:
    """Names here of the blocks that the original numbers through, merges included: `stages.0.layers.0`, ..."""
    names = []
    for stage, layers in enumerate(stage_layers):
        names += [f"stages.{stage}.layers.{layer}" for layer in range(layers)]
        names += [f"stages.{stage}.merge"] if stage < 2 else []
    return names


class Shapes:
    """The shapes of a state dict by their names here, in which `{block}` is still open."""

    def __init__(self, key_map: KeyMap, tensors: Mapping[str, torch.Tensor]):
        self.key_map = key_map
        self.whole: dict[str, torch.Size] = {}
        self.blocks: dict[int, dict[str, torch.Size]] = {}
        for key, tensor in tensors.items():
            match = key_map.match(key)
            if match and match.name and match.block is None:
                self.whole[match.name] = tensor.shape
            elif match and match.name:
                self.blocks.setdefault(match.block, {})[match.name] = tensor.shape

    def of(self, name: str, num_dimensions: int, block: int | None = None) -> torch.Size:
        """The shape of a tensor; ConversionError if it is not there, or has another number of dimensions."""
        shape = (self.whole if block is None else self.blocks[block]).get(name)
        key = self.key_map.original_name(name.replace("{block}", "stages.0.layers.0"), lambda _: block)
        if shape is None:
            raise ConversionError(
                f"{key} is missing, so the architecture cannot be told. The file is incomplete, or no HiViT."
            )
        if len(shape) != num_dimensions or 0 in shape:
            raise ConversionError(f"{key} must have {num_dimensions} dimensions, got {list(shape)}. This is no HiViT.")
        return shape

    def kind(self, block: int) -> str:
        names = self.blocks.get(block, {})
        if any(".reduction." in name or name.startswith("hivit.{block}.norm.") for name in names):
            return MERGE
        return ATTENTION if any(".attention." in name or ".norm1." in name for name in names) else MLP

    def stage_layers(self) -> list[int]:
        """Layers of the three stages. ConversionError if the blocks are not MLPs, merge, MLPs, merge, attention."""
        kinds = [self.kind(block) for block in range(max(self.blocks, default=-1) + 1)]
        merges = [block for block, kind in enumerate(kinds) if kind == MERGE]
        if len(merges) == 2:
            parts = [kinds[: merges[0]], kinds[merges[0] + 1 : merges[1]], kinds[merges[1] + 1 :]]
            if all(parts) and [set(part) for part in parts] == [{MLP}, {MLP}, {ATTENTION}]:
                return [len(part) for part in parts]
        found = ", ".join(kinds) or "none"
        raise ConversionError(
            "The blocks of a HiViT are MLP blocks, a merge, MLP blocks, a merge and attention blocks; this file has "
            f"{found}. It is incomplete, or another network."
        )


def _square(number: int, what: str) -> int:
    side = math.isqrt(number)
    if side * side != number:
        raise ConversionError(f"{what} has {number} entries, which is no square: only square images can be told apart.")
    return side


def _grid_sides(shapes: Shapes, first_main: int) -> list[int]:
    """Sides of the grids of units that the position embedding and the relative tables were made for."""
    sides = []
    if _TABLE in shapes.blocks[first_main]:
        entries, _ = shapes.of(_TABLE, 2, first_main)
        sides.append((_square(entries, "relative_position_bias_table") + 1) // 2)
    if "hivit.position_embeddings" in shapes.whole:
        sides.append(_square(shapes.of("hivit.position_embeddings", 3)[1], "the position embedding"))
    if not sides:
        raise ConversionError(
            "The file has neither a position embedding nor relative tables: its image size is unknown."
        )
    return sides


def _ratio(shapes: Shapes, name: str, block: int | None = None) -> float:
    wide, narrow = shapes.of(name, 2, block)
    return wide / narrow


def _published(values: dict, *names: str) -> HiViTConfig | None:
    """The published network whose numbers of these names are the same."""
    candidate = HiViTConfig(**{**values, "num_attention_heads": 1, "decoder_num_attention_heads": 1})
    return next((p for p in PUBLISHED if all(getattr(p, n) == getattr(candidate, n) for n in names)), None)


def infer_config(
    key_map: KeyMap,
    tensors: Mapping[str, torch.Tensor],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    encoder_only: bool = False,
) -> HiViTConfig:
    """
    The configuration whose model has these tensors.

    The position embedding and the relative tables may have been made for different grids (a segmentation backbone): the
    configuration then takes the tables' grid.

    Args:
        num_heads: attention heads of the main stage, if neither a relative table nor a published shape tells them.
        decoder_num_heads: the same of the decoder.

    Raises:
        ConversionError: if it cannot be told, or contradicts what was given.
    """
    shapes = Shapes(key_map, tensors)
    stage_layers = shapes.stage_layers()
    first_main = stage_layers[0] + stage_layers[1] + 2
    stem_channels, num_channels, token_size, _ = shapes.of("hivit.embeddings.projection.weight", 4)
    hidden_size, patch_size = 4 * stem_channels, 4 * token_size
    fused = shapes.whole.get("decoder.embed.weight", (0, 7 * hidden_size))[-1] != hidden_size
    values = {
        "image_size": _grid_sides(shapes, first_main)[0] * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        "stem_mlp_ratio": _ratio(shapes, "hivit.{block}.mlp.fc1.weight", 0),
        "mlp_ratio": _ratio(shapes, "hivit.{block}.mlp.fc1.weight", first_main),
        "qkv_bias": "hivit.{block}.attention.qkv.bias" in shapes.blocks[first_main],
        "use_absolute_position_embeddings": "hivit.position_embeddings" in shapes.whole,
        "use_relative_position_bias": _TABLE in shapes.blocks[first_main],
        "layer_norm_eps": key_map.layer_norm_eps,
        "pooler_layernorm": key_map.pooler_layernorm,
        "fuse_stages": fused,
    }
    values |= _depths(hidden_size, stage_layers)
    table_heads = shapes.of(_TABLE, 2, first_main)[1] if values["use_relative_position_bias"] else None
    published = _published(values, "hidden_size", "stage_layers")
    values["num_attention_heads"] = _heads(
        "--num-heads", num_heads, table_heads, published and published.num_attention_heads
    )
    if "decoder.embed.weight" in shapes.whole and not encoder_only:
        layers = {name.split(".")[2] for name in shapes.whole if name.startswith("decoder.layers.")}
        values |= {
            "decoder_hidden_size": shapes.of("decoder.embed.weight", 2)[0],
            "decoder_num_hidden_layers": max(map(int, layers), default=0) + 1,
            "decoder_mlp_ratio": _ratio(shapes, "decoder.layers.0.mlp.fc1.weight"),
        }
        names = ("hidden_size", "stage_layers", "decoder_hidden_size", "decoder_num_hidden_layers")
        published = _published(values, *names)
        values["decoder_num_attention_heads"] = _heads(
            "--decoder-num-heads", decoder_num_heads, None, published and published.decoder_num_attention_heads
        )
    if "classifier.weight" in shapes.whole:
        values["num_labels"] = shapes.of("classifier.weight", 2)[0]
    try:
        return HiViTConfig(**values)
    except ValueError as error:
        raise ConversionError(f"The shapes of this file fit no HiViT: {error}") from error


def _depths(hidden_size: int, stage_layers: list[int]) -> dict:
    """Stem blocks are written as a published network does, otherwise two per depth if their numbers are even."""
    for published in PUBLISHED:
        if published.hidden_size == hidden_size and published.stage_layers == stage_layers:
            return {"depths": published.depths, "stem_blocks_per_depth": published.stem_blocks_per_depth}
    stem1, stem2, main = stage_layers
    per_depth = 1 if stem1 % 2 or stem2 % 2 else 2
    return {"depths": [stem1 // per_depth, stem2 // per_depth, main], "stem_blocks_per_depth": per_depth}


def _heads(option: str, given: int | None, in_tables: int | None, published: int | None) -> int:
    known = in_tables or published
    if in_tables and given and given != in_tables:
        raise ConversionError(
            f"{option} {given} contradicts the relative tables, which have {in_tables} heads. Leave it out."
        )
    if not (given or known):
        raise ConversionError(
            f"Neither a relative table nor a published network of these shapes tells the heads: give {option}."
        )
    return given or known
