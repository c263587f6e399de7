"""Conversion of a checkpoint to a Transformers folder, verified by reading it back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from architecture import block_names, infer_config, square_side
from checkpoint import Checkpoint, ConversionError, shown
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.image_processing import evaluation_processor
from hivit_hf.modeling_hivit import relative_position_index, resize_table, sin_cos_position_embeddings
from hivit_hf.training.folders import written_whole
from key_maps import Dropped, Index, KeyMap, Match, OnlyIf, dense, itpn, mmpretrain, self_supervised, supervised
from key_maps.others import recognize
from report import describe_source, describe_versions, write_report


KEY_MAPS = {module.KEY_MAP.name: module.KEY_MAP for module in (self_supervised, supervised, mmpretrain, dense, itpn)}
WRITTEN_FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "checkpoint.pth"}
WRITTEN_FILES |= {"conversion_report.json", "conversion_report.md"}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Plan:
    """
    The model, and the destination of each tensor of a checkpoint.

    Args:
        model_class, config, model_arguments: the model that the tensors make.
        tensors: full name here -> tensor.
        dropped: key of the checkpoint -> why it has no counterpart.
        resized: full name here -> what was done to it.
        replaced: full names here whose tensor was recomputed.
        cast: change of dtype, if any.
    """

    key_map: KeyMap
    model_class: type[PreTrainedModel]
    config: HiViTConfig
    model_arguments: dict
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    cast: dict | None = None

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """By the names in the model's own state dict: the bare encoder has no prefix."""
        prefix = "hivit." if self.model_class is HiViTModel else ""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}


def choose_key_map(source: str, keys: list[str]) -> KeyMap:
    """The layout that `--source` names, or, for `auto`, the one that knows the most of the keys."""
    network = recognize(keys)
    if network:
        raise ConversionError(f"This is not an original HiViT but {network}.")
    fits = {name: key_map.fits(keys) for name, key_map in KEY_MAPS.items()}
    best = max(fits, key=fits.get)
    if source != "auto":
        if fits[source] < fits[best]:
            raise ConversionError(f"The keys are those of --source {best}, not of {source}. Leave it out.")
        return KEY_MAPS[source]
    if 2 * fits[best] < len(keys):
        examples = ", ".join(map(shown, keys[:4]))
        raise ConversionError(f"This is no HiViT that is known here. Its {len(keys)} keys begin with {examples}.")
    return KEY_MAPS[best]


# -- to a Transformers folder ---------------------------------------------------------------------------------------


def plan_conversion(
    checkpoint: Checkpoint,
    source: str = "auto",
    encoder_only: bool = False,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """
    Maps every tensor of a checkpoint, without writing anything.

    Raises:
        ConversionError: with a table of the tensors that are unknown, missing, of another shape or type, or not finite.
    """
    key_map = choose_key_map(source, list(checkpoint.tensors))
    config = infer_config(key_map, checkpoint.tensors, num_heads, decoder_num_heads, encoder_only)
    grid = config.grid_size
    if image_size is not None:
        config.image_size = image_size
        try:
            config.check()
        except ValueError as error:
            raise ConversionError(f"--image_size {image_size}: {error}") from error
    names = block_names(config.stage_layers)
    found, dropped, problems = {}, {}, []
    for key, tensor in checkpoint.tensors.items():
        match = key_map.match(key)
        if match is None:
            problems.append(("unknown", key, f"{list(tensor.shape)}", "no such tensor in this layout"))
            continue
        if isinstance(match.rule, Index) and not _is_index(tensor, grid):
            problems.append(("index", key, f"{list(tensor.shape)}", "that of the grid of the relative tables"))
        reason = _why_dropped(match, config, encoder_only)
        if reason:
            dropped[key] = reason
        else:
            name = match.name if match.block is None else match.name.replace("{block}", names[match.block])
            if name in found:
                problems.append(("twice", key, f"{list(tensor.shape)}", f"{found[name][0]} is the same tensor"))
            found[name] = (key, tensor)

    model_class, arguments = _model_of(found)
    plan = Plan(key_map, model_class, config, arguments, dropped=dropped)
    for name, (key, tensor) in found.items():
        plan.tensors[name] = _resized(plan, name, key, tensor, grid)
    numbers = {block: number for number, block in enumerate(names)}

    def original_key(saved: str) -> str:
        name = f"hivit.{saved}" if model_class is HiViTModel else saved
        return found[name][0] if name in found else key_map.original_name(name, numbers.get) or saved

    expected = expected_shapes(model_class, config, arguments)
    problems += problems_with(plan.saved_tensors(), expected, original_key)
    if problems:
        raise ConversionError(f"The tensors do not make a {model_class.__name__}:\n{table(problems)}")
    _settle_dtype(plan, dtype)
    return plan


def _is_index(tensor: torch.Tensor, grid: tuple[int, int]) -> bool:
    """Whether an index buffer is the one of this grid; it is computed only if the shape is right."""
    units = math.prod(grid)
    return tensor.shape == (units, units) and torch.equal(tensor, relative_position_index(grid, tensor.device))


def _why_dropped(match: Match, config: HiViTConfig, encoder_only: bool) -> str | None:
    if isinstance(match.rule, (Dropped, Index)):
        return match.rule.reason
    if isinstance(match.rule, OnlyIf) and not getattr(config, match.rule.switch):
        return match.rule.reason
    if encoder_only and not match.name.startswith("hivit."):
        return "only the encoder was asked for"
    return None


def _model_of(found: Mapping) -> tuple[type[PreTrainedModel], dict]:
    if "classifier.weight" in found or "classifier.bias" in found:
        return HiViTForImageClassification, {}
    if any(name.startswith("decoder.") for name in found):
        return HiViTForMaskedImageModeling, {}
    pools = any(name.startswith("hivit.layernorm.") for name in found)
    return HiViTModel, {} if pools else {"add_pooling_layer": False}


def _resized(plan: Plan, name: str, key: str, tensor: torch.Tensor, made_for: tuple[int, int]) -> torch.Tensor:
    """
    The position embedding or a relative table for the grid of the configuration; other tensors as they are.

    Args:
        made_for: the grid that the network was made for.
    """
    grid = plan.config.grid_size
    if name.endswith("relative_position_bias_table") and grid != made_for:
        old, new = (tuple(2 * length - 1 for length in size) for size in (made_for, grid))
        plan.resized[name] = f"{old[0]}x{old[1]} -> {new[0]}x{new[1]} offsets, bicubic"
        return resize_table(tensor, old, new)
    if name == "hivit.position_embeddings":
        old = square_side(tensor.shape[1], key)
        if (old, old) != grid:
            plan.resized[name] = f"{old}x{old} -> {grid[0]}x{grid[1]} units, bicubic"
            return resize_table(tensor[0], (old, old), grid).unsqueeze(0)
    if name == "decoder.position_embeddings" and grid != made_for and tensor.shape[1:2] == (math.prod(made_for),):
        fixed = sin_cos_position_embeddings(made_for, tensor.shape[2])
        if torch.allclose(tensor.double(), fixed, atol=1e-3):
            plan.replaced.add(name)
            plan.dropped[key] = "fixed sines and cosines, recomputed for the other grid"
            return sin_cos_position_embeddings(grid, tensor.shape[2]).to(tensor.dtype)
        plan.resized[name] = f"{made_for[0]}x{made_for[1]} -> {grid[0]}x{grid[1]} units, bicubic"
        return resize_table(tensor[0], made_for, grid).unsqueeze(0)
    return tensor


def expected_shapes(model_class: type[PreTrainedModel], config: HiViTConfig, arguments: dict) -> dict[str, list[int]]:
    """The names and shapes of a model's tensors, without making them."""
    with torch.device("meta"), no_init_weights():
        model = model_class(config, **arguments)
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def problems_with(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, list[int]], shown_name: Callable[[str], str]
) -> list[tuple[str, str, str, str]]:
    """Rows for `table`: tensors that are not those of a model, under the names that `shown_name` gives them."""
    problems = []
    for name, tensor in tensors.items():
        key, shape = shown_name(name), list(tensor.shape)
        if name not in expected:
            problems.append(("unknown", key, f"{shape}", f"the model has no {name}"))
        elif shape != expected[name]:
            problems.append(("shape", key, f"{shape}", f"{expected[name]}"))
        elif not tensor.is_floating_point():
            problems.append(("type", key, f"{tensor.dtype}", "a floating-point type"))
        elif not torch.isfinite(tensor).all():
            problems.append(("not finite", key, "NaN or infinity", "numbers"))
    missing = [name for name in expected if name not in tensors]
    return problems + [("missing", shown_name(name), "nothing", f"{expected[name]}") for name in missing]


def _settle_dtype(plan: Plan, dtype: torch.dtype | None):
    """One type for all numbers. ConversionError if there are several and none was chosen, or numbers do not fit."""
    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in plan.tensors.values()})
    if dtype is None and len(found) > 1:
        raise ConversionError(f"The tensors are of several types, {', '.join(found)}: choose one with --dtype.")
    if dtype is None and found[0] not in DTYPES:
        raise ConversionError(f"The tensors are of type {found[0]}: choose another with --dtype.")
    if dtype is not None:
        change = 0.0
        for name, tensor in plan.tensors.items():
            cast = tensor.to(dtype)
            if not torch.isfinite(cast).all():
                raise ConversionError(f"{name} has numbers too large for {dtype}. Choose another --dtype.")
            if tensor.numel():
                change = max(change, (cast.double() - tensor.double()).abs().max().item())
            plan.tensors[name] = cast
        wanted = str(dtype).removeprefix("torch.")
        if found != [wanted]:
            plan.cast = {"from": found, "to": wanted, "largest_change": change}
    plan.config.dtype = next(iter(plan.tensors.values())).dtype


def table(problems: list[tuple[str, str, str, str]], most: int = 20) -> str:
    rows = [("what", "tensor", "found", "expected"), *(tuple(map(shown, row)) for row in problems[:most])]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + ([f"... and {len(problems) - most} more"] if len(problems) > most else []))


def convert(
    checkpoint: Checkpoint,
    plan: Plan,
    out_dir: Path,
    id2label: dict[int, str] | None = None,
    overwrite: bool = False,
    keep: Sequence[Path] = (),
) -> dict:
    """
    Writes the folder and the report, and compares what a user will load with what was read.

    Args:
        keep: files besides the checkpoint that must not be deleted.

    Raises:
        FolderError: if the folder cannot be written.
        ConversionError: if it does not load as it was read; nothing is left behind then.
    """
    if id2label is not None:
        plan.config.id2label, plan.config.label2id = id2label, {label: n for n, label in id2label.items()}
    plan.config.architectures = [plan.model_class.__name__]
    source = describe_source(checkpoint, plan.key_map)
    keep = [checkpoint.path, *keep]
    with written_whole(out_dir, overwrite, keep, WRITTEN_FILES) as folder:
        tensors = plan.saved_tensors()
        save_file(_separate(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        plan.config.save_pretrained(folder)
        evaluation_processor(plan.config.image_size).save_pretrained(folder)
        model, info = plan.model_class.from_pretrained(folder, output_loading_info=True, **plan.model_arguments)
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ConversionError(f"The written folder does not load as it should: {info}.")
        proof = compare(model.state_dict(), tensors)
        report = {
            "source": source,
            "model": {
                "class": plan.model_class.__name__,
                "arguments": plan.model_arguments,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(plan.config.dtype).removeprefix("torch."),
                "image_size": plan.config.image_size,
            },
            "tensors": {
                "read": len(checkpoint.tensors),
                "mapped": len(plan.tensors) - len(plan.replaced),
                "dropped": len(plan.dropped),
            },
            "cast": plan.cast,
            "dropped": by_reason(plan.dropped),
            "resized": plan.resized,
            "proof": proof,
            "versions": describe_versions(),
        }
        write_report(folder, report)
    return report


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, none of which shares its memory with another, as safetensors wants them."""
    seen, separate = set(), {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    return separate


def by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for key, reason in dropped.items():
        reasons.setdefault(reason, []).append(key)
    return reasons


def compare(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> dict:
    """
    Holds what was written against what was to be written, tensor by tensor, every number of them; the third of
    `qkv.bias` that is of the keys, which no output shows, is counted.

    Raises:
        ConversionError: if a tensor is missing or differs.
    """
    if set(written) != set(read):
        raise ConversionError(f"Written and read differ in the tensors {sorted(set(written) ^ set(read))[:8]}.")
    unequal = [name for name in read if read[name].dtype != written[name].dtype or not read[name].equal(written[name])]
    if unequal:
        raise ConversionError(f"Written and read differ in the numbers of {unequal[:8]}.")
    return {
        "compared": len(read),
        "equal": len(read),
        "largest_difference": 0.0,  # any other is refused
        "numbers_compared": sum(tensor.numel() for tensor in read.values()),
        "qkv_bias_k_thirds_equal": sum(name.endswith("qkv.bias") for name in read),
    }
