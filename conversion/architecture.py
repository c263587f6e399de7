"""Architecture of a state dict, inferred from its names and shapes alone."""

import math
from collections.abc import Iterable, Mapping
from itertools import groupby

import torch

from checkpoint import ConversionError
from hivit_hf.configuration_hivit import ARCHITECTURES, HiViTConfig
from hivit_hf.hub.model_zoo import ITPN_BASE
from key_maps import KeyMap, dense


PUBLISHED = [HiViTConfig(**arguments) for arguments in (*ARCHITECTURES.values(), ITPN_BASE)]

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
            raise ConversionError(f"{key} must have {num_dimensions} dimensions, none empty, got {list(shape)}.")
        return shape

    def kind(self, block: int) -> str:
        names = self.blocks.get(block, {})
        if any(".reduction." in name or name.startswith("hivit.{block}.norm.") for name in names):
            return MERGE
        return ATTENTION if any(".attention." in name or ".norm1." in name for name in names) else MLP

    def stage_layers(self) -> list[int]:
        """Layers of the three stages. ConversionError if the blocks are not MLPs, merge, MLPs, merge, attention."""
        _check_numbered_through("blocks", self.blocks)
        kinds = [self.kind(block) for block in range(len(self.blocks))]
        merges = [block for block, kind in enumerate(kinds) if kind == MERGE]
        if len(merges) == 2:
            parts = [kinds[: merges[0]], kinds[merges[0] + 1 : merges[1]], kinds[merges[1] + 1 :]]
            if all(parts) and [set(part) for part in parts] == [{MLP}, {MLP}, {ATTENTION}]:
                return [len(part) for part in parts]
        found = ", ".join(f"{len(list(run))} x {kind}" for kind, run in groupby(kinds)) or "none"
        raise ConversionError(
            "The blocks of a HiViT are MLP blocks, a merge, MLP blocks, a merge and attention blocks; this file has "
            f"{found}. It is incomplete, or another network."
        )


def _check_numbered_through(what: str, numbers: Iterable[int]):
    found = sorted(numbers)
    missing = next((number for number, present in enumerate(found) if number != present), None)
    if missing is not None:
        raise ConversionError(
            f"{what}.{missing} is missing: {what} are numbered from 0 without gaps. The file is incomplete."
        )


def square_side(number: int, what: str) -> int:
    """The side of a square grid with this number of entries; ConversionError if it is no square."""
    side = math.isqrt(number)
    if side * side != number:
        raise ConversionError(f"{what} has {number} entries, which is no square: only square images can be told apart.")
    return side


def _grid_side(key_map: KeyMap, shapes: Shapes) -> int:
    """Side of the grid of units that the network was made for: that of the relative tables, if there are some."""
    tables = sorted({tuple(names[_TABLE]) for names in shapes.blocks.values() if _TABLE in names})
    if len(tables) > 1:
        raise ConversionError(f"The relative tables have several shapes, {tables}: they must have one.")
    of_tables = of_positions = None
    if tables:
        offsets = square_side(tables[0][0], "relative_position_bias_table")
        if offsets % 2 == 0:
            raise ConversionError(f"relative_position_bias_table has {offsets}x{offsets} offsets, which must be odd.")
        of_tables = (offsets + 1) // 2
    if "hivit.position_embeddings" in shapes.whole:
        of_positions = square_side(shapes.of("hivit.position_embeddings", 3)[1], "the position embedding")
    if of_tables and of_positions and of_tables != of_positions and key_map is not dense.KEY_MAP:
        raise ConversionError(
            f"The position embedding is for {of_positions}x{of_positions} units, the relative tables for "
            f"{of_tables}x{of_tables}: only segmentation and detection checkpoints may differ so."
        )
    side = of_tables or of_positions
    if side is None:
        raise ConversionError("There is neither a position embedding nor a relative table: the image size is unknown.")
    return side


def _ratio(shapes: Shapes, name: str, block: int | None = None) -> float:
    """The width of an MLP relative to its channels, such that the model rounds to the same width."""
    wide, narrow = shapes.of(name, 2, block)
    return wide / narrow if int(narrow * (wide / narrow)) == wide else (wide + 0.5) / narrow


def _published(hidden_size: int, stage_layers: list[int]) -> HiViTConfig | None:
    """The published network of this shape; with a decoder if the published one has one."""
    return next((p for p in PUBLISHED if (p.hidden_size, p.stage_layers) == (hidden_size, stage_layers)), None)


def infer_config(
    key_map: KeyMap,
    tensors: Mapping[str, torch.Tensor],
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    encoder_only: bool = False,
) -> HiViTConfig:
    """
    The configuration whose model has these tensors.

    Args:
        num_heads: attention heads of the main stage, if neither relative tables nor a published shape tell them.
        decoder_num_heads: the same of the decoder.
        encoder_only: whether decoder and classifier stay behind, so that nothing of them need be known.

    Raises:
        ConversionError: if it cannot be told, or contradicts what was given.
    """
    shapes = Shapes(key_map, tensors)
    values = _encoder_values(key_map, shapes, num_heads)
    has_decoder = "decoder.embed.weight" in shapes.whole
    if has_decoder and not encoder_only:
        values |= _decoder_values(shapes, values["hidden_size"], decoder_num_heads)
    elif decoder_num_heads is not None:
        raise ConversionError("--decoder_num_heads was given, but there is no decoder to convert. Leave it out.")
    if "classifier.weight" in shapes.whole and not encoder_only:
        values["num_labels"] = shapes.of("classifier.weight", 2)[0]
    try:
        return HiViTConfig(**values)
    except ValueError as error:
        raise ConversionError(f"The shapes of this file fit no HiViT: {error}") from error


def _encoder_values(key_map: KeyMap, shapes: Shapes, num_heads: int | None) -> dict:
    stage_layers = shapes.stage_layers()
    first_main = stage_layers[0] + stage_layers[1] + 2
    embedding_channels, num_channels, token_size, _ = shapes.of("hivit.embeddings.projection.weight", 4)
    hidden_size, patch_size = 4 * embedding_channels, 4 * token_size
    has_tables = _TABLE in shapes.blocks[first_main]
    published = _published(hidden_size, stage_layers)
    in_tables = shapes.of(_TABLE, 2, first_main)[1] if has_tables else None
    return {
        "image_size": _grid_side(key_map, shapes) * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "hidden_size": hidden_size,
        **_depths(published, stage_layers),
        "num_attention_heads": _heads("--num_heads", num_heads, in_tables, published and published.num_attention_heads),
        "early_mlp_ratio": _ratio(shapes, "hivit.{block}.mlp.fc1.weight", 0),
        "mlp_ratio": _ratio(shapes, "hivit.{block}.mlp.fc1.weight", first_main),
        "qkv_bias": "hivit.{block}.attention.qkv.bias" in shapes.blocks[first_main],
        "use_absolute_position_embeddings": "hivit.position_embeddings" in shapes.whole,
        "use_relative_position_bias": has_tables,
        "layer_norm_eps": key_map.layer_norm_eps,
        "pooler_layernorm": key_map.pooler_layernorm,
    }


def _decoder_values(shapes: Shapes, hidden_size: int, num_heads: int | None) -> dict:
    layers = {int(name.split(".")[2]) for name in shapes.whole if name.startswith("decoder.layers.")}
    _check_numbered_through("decoder_blocks", layers)
    width, features = shapes.of("decoder.embed.weight", 2)
    published = _published(hidden_size, shapes.stage_layers())
    same = published and (published.decoder_hidden_size, published.decoder_num_hidden_layers) == (width, len(layers))
    known = published.decoder_num_attention_heads if same else None
    return {
        "fuse_stages": features != hidden_size,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": len(layers),
        "decoder_mlp_ratio": _ratio(shapes, "decoder.layers.0.mlp.fc1.weight"),
        "decoder_num_attention_heads": _heads("--decoder_num_heads", num_heads, None, known),
    }


def _depths(published: HiViTConfig | None, stage_layers: list[int]) -> dict:
    """Stem blocks are written as a published network does, otherwise two per depth if their numbers are even."""
    if published:
        return {"depths": published.depths, "early_blocks_per_depth": published.early_blocks_per_depth}
    stage1, stage2, main = stage_layers
    per_depth = 1 if stage1 % 2 or stage2 % 2 else 2
    return {"depths": [stage1 // per_depth, stage2 // per_depth, main], "early_blocks_per_depth": per_depth}


def _heads(option: str, given: int | None, in_tables: int | None, published: int | None) -> int:
    if in_tables and given and given != in_tables:
        raise ConversionError(
            f"{option} {given} contradicts the relative tables, which have {in_tables}: leave it out."
        )
    heads = given or in_tables or published
    if not heads:
        raise ConversionError(
            f"Neither relative tables nor a published network of these shapes tell the heads: {option}."
        )
    return heads
