"""Converting a checkpoint to a Transformers folder, and back, each proven by reading what was written."""

import json
import math
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BitImageProcessor, PreTrainedModel
from transformers.initialization import no_init_weights

from architecture import block_names, infer_config
from checkpoint import Checkpoint, ConversionError, read_checkpoint
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.modeling_hivit import relative_position_index, resize_table, sin_cos_position_embeddings
from key_maps import Dropped, Index, KeyMap, Match, OnlyIf, dense, itpn, mmpretrain, self_supervised, supervised
from key_maps.others import recognise
from report import describe_source, describe_versions, write_report


KEY_MAPS = {module.KEY_MAP.name: module.KEY_MAP for module in (self_supervised, supervised, mmpretrain, dense, itpn)}
MODEL_CLASSES = {cls.__name__: cls for cls in (HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification)}
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class Plan:
    """
    What becomes of each tensor of a checkpoint.

    Args:
        model_class, config, model_arguments: the model that the tensors make.
        tensors: full name here -> tensor.
        dropped: key of the checkpoint -> why it has no counterpart.
        resized: full name here -> what was done to it.
    """

    key_map: KeyMap
    model_class: type[PreTrainedModel]
    config: HiViTConfig
    model_arguments: dict
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)

    def saved_name(self, name: str) -> str:
        """The name in the model's own state dict: the bare encoder has no prefix."""
        return name.removeprefix("hivit.") if self.model_class is HiViTModel else name


def choose_key_map(source: str, keys: list[str]) -> KeyMap:
    """The layout that `--source` names, or, for `auto`, the one that knows the most of the keys."""
    network = recognise(keys)
    if network:
        raise ConversionError(f"This is not an original HiViT but {network}.")
    if source != "auto":
        return KEY_MAPS[source]
    fits = {name: key_map.fits(keys) for name, key_map in KEY_MAPS.items()}
    best = max(fits, key=fits.get)
    if 2 * fits[best] < len(keys):
        examples = ", ".join(keys[:4])
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
    Decides what becomes of every tensor, without writing anything.

    Raises:
        ConversionError: with a table of the tensors that are unknown, missing, of another shape or type, or not finite.
    """
    key_map = choose_key_map(source, list(checkpoint.tensors))
    config = infer_config(key_map, checkpoint.tensors, num_heads, decoder_num_heads, encoder_only)
    index = relative_position_index(config.grid_size, torch.device("cpu"))
    if image_size is not None:
        config.image_size = image_size
        try:
            config.check()
        except ValueError as error:
            raise ConversionError(f"--image-size {image_size}: {error}") from error
    names = block_names(config.stage_layers)
    found, dropped, problems = {}, {}, []
    for key, tensor in checkpoint.tensors.items():
        match = key_map.match(key)
        if match is None:
            problems.append(("unknown", key, f"{list(tensor.shape)}", "no such tensor in this layout"))
            continue
        if isinstance(match.rule, Index) and not torch.equal(tensor, index):
            problems.append(("index", key, f"{list(tensor.shape)}", "that of the grid of the relative tables"))
        reason = _why_dropped(match, config, encoder_only)
        if reason:
            dropped[key] = reason
        else:
            name = match.name if match.block is None else match.name.replace("{block}", names[match.block])
            found[name] = (key, tensor)

    model_class, arguments = _model_of(found)
    plan = Plan(key_map, model_class, config, arguments, dropped=dropped)
    for name, (key, tensor) in found.items():
        plan.tensors[name] = _resized(plan, name, key, tensor)
    problems += _compare_with_the_model(plan, found)
    _settle_dtype(plan, dtype, problems)
    if problems:
        raise ConversionError(f"The tensors do not make a {model_class.__name__}:\n{_table(problems)}")
    return plan


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
    return HiViTModel, {} if any(name.startswith("hivit.layernorm.") for name in found) else {
        "add_pooling_layer": False
    }


def _resized(plan: Plan, name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """The position embedding or a relative table for the grid of the configuration; other tensors as they are."""
    grid = plan.config.grid_size
    if name.endswith("relative_position_bias_table") and tensor.ndim == 2:
        old, new = math.isqrt(tensor.shape[0]), tuple(2 * length - 1 for length in grid)
        if old * old == tensor.shape[0] and (old, old) != new:
            plan.resized[name] = f"{old}x{old} -> {new[0]}x{new[1]} offsets, bicubic"
            return resize_table(tensor, (old, old), new)
    elif name.endswith("position_embeddings") and tensor.ndim == 3:
        old = math.isqrt(tensor.shape[1])
        if old * old == tensor.shape[1] and (old, old) != grid:
            if name.startswith("decoder."):
                plan.resized[name] = f"recomputed for {grid[0]}x{grid[1]} units: it is fixed, as sines and cosines"
                plan.dropped[key] = "fixed sines and cosines of the old grid"
                return sin_cos_position_embeddings(grid, tensor.shape[2]).to(tensor.dtype)
            plan.resized[name] = f"{old}x{old} -> {grid[0]}x{grid[1]} units, bicubic"
            return resize_table(tensor[0], (old, old), grid).unsqueeze(0)
    return tensor


def _compare_with_the_model(plan: Plan, found: Mapping) -> list[tuple[str, str, str, str]]:
    with torch.device("meta"), no_init_weights():
        model = plan.model_class(plan.config, **plan.model_arguments)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    numbers = {name: number for number, name in enumerate(block_names(plan.config.stage_layers))}
    problems = []
    for name, (key, tensor) in found.items():
        shape, saved = list(plan.tensors[name].shape), plan.saved_name(name)
        if saved not in expected:
            problems.append(("unknown", key, f"{shape}", f"the model has no {saved}"))
        elif shape != expected[saved]:
            problems.append(("shape", key, f"{shape}", f"{expected[saved]}"))
        elif not tensor.is_floating_point():
            problems.append(("type", key, f"{tensor.dtype}", "a floating-point type"))
        elif not torch.isfinite(plan.tensors[name]).all():
            problems.append(("not finite", key, "NaN or infinity", "numbers"))
    saved_names = {plan.saved_name(name) for name in found}
    for saved in expected:
        if saved not in saved_names:
            full = saved if plan.model_class is not HiViTModel else f"hivit.{saved}"
            key = plan.key_map.original_name(full, numbers.get) or saved
            problems.append(("missing", key, "nothing", f"{expected[saved]}"))
    return problems


def _settle_dtype(plan: Plan, dtype: torch.dtype | None, problems: list):
    dtypes = {
        str(tensor.dtype).removeprefix("torch.") for tensor in plan.tensors.values() if tensor.is_floating_point()
    }
    if dtype is None and len(dtypes) > 1 and not problems:
        raise ConversionError(
            f"The tensors are of several types, {', '.join(sorted(dtypes))}: choose one with --dtype."
        )
    if dtype is not None:
        plan.tensors = {name: tensor.to(dtype) for name, tensor in plan.tensors.items()}
    plan.config.dtype = next(iter(plan.tensors.values())).dtype if plan.tensors else None


def _table(problems: list[tuple[str, str, str, str]], most: int = 20) -> str:
    rows = [("what", "tensor", "found", "expected"), *problems[:most]]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines + ([f"... and {len(problems) - most} more"] if len(problems) > most else []))


def convert(
    checkpoint: Checkpoint, plan: Plan, out_dir: Path, id2label: dict[int, str] | None = None, overwrite: bool = False
) -> dict:
    """
    Writes the folder and the report, and compares what a user will load with what was read.

    Raises:
        ConversionError: if the folder cannot be written, or does not load as it was read; nothing is left behind then.
    """
    if id2label is not None:
        plan.config.id2label, plan.config.label2id = id2label, {label: n for n, label in id2label.items()}
    plan.config.architectures = [plan.model_class.__name__]
    with written_whole(out_dir, overwrite, keep=checkpoint.path) as folder:
        tensors = {plan.saved_name(name): tensor for name, tensor in plan.tensors.items()}
        save_file(_separate(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        plan.config.save_pretrained(folder)
        image_processor(plan.config).save_pretrained(folder)
        model, info = plan.model_class.from_pretrained(folder, output_loading_info=True, **plan.model_arguments)
        if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise ConversionError(f"The written folder does not load as it should: {info}.")
        proof = compare(model.state_dict(), tensors)
        report = {
            "source": describe_source(checkpoint, plan.key_map),
            "model": {
                "class": plan.model_class.__name__,
                "arguments": plan.model_arguments,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "dtype": str(plan.config.dtype).removeprefix("torch."),
                "image_size": plan.config.image_size,
            },
            "tensors": {
                "read": len(checkpoint.tensors),
                "mapped": len(checkpoint.tensors) - len(plan.dropped),
                "dropped": len(plan.dropped),
            },
            "dropped": _by_reason(plan.dropped),
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


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for key, reason in dropped.items():
        reasons.setdefault(reason, []).append(key)
    return reasons


def compare(written: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> dict:
    """
    Holds what was written against what was read, tensor by tensor, every number of them; in `qkv.bias` also the third
    of the keys, which no output shows.

    Raises:
        ConversionError: if a tensor is missing or differs.
    """
    if set(written) != set(read):
        raise ConversionError(f"Written and read differ in the tensors {sorted(set(written) ^ set(read))[:8]}.")
    unequal = [name for name, tensor in read.items() if not torch.equal(written[name], tensor)]
    if unequal:
        raise ConversionError(f"Written and read differ in the numbers of {unequal[:8]}.")
    return {
        "compared": len(read),
        "equal": len(read) - len(unequal),
        "largest_difference": 0.0,
        "numbers_compared": sum(tensor.numel() for tensor in read.values()),
        "qkv_bias_k_thirds_equal": sum(name.endswith("qkv.bias") for name in read),
    }


def image_processor(config: HiViTConfig) -> BitImageProcessor:
    """The published evaluation transform: shorter side to size * 256 / 224, centre crop; above 224 px no crop."""
    size = config.image_size
    shorter = size if size > 224 else round(size * 256 / 224)
    return BitImageProcessor(
        size={"shortest_edge": shorter},
        crop_size={"height": size, "width": size},
        resample=3,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )


# -- back to the original -------------------------------------------------------------------------------------------


def to_original(folder: Path, out_dir: Path, source: str = "auto", overwrite: bool = False) -> dict:
    """
    Writes `checkpoint.pth` in the original's layout from a folder of the package.

    Args:
        source: the layout; `auto` takes the one that the folder's conversion report names, or `self-supervised`.

    Raises:
        ConversionError: if the folder holds no HiViT, or the layout has no place for one of its tensors.
    """
    config, class_name, tensors = _read_folder(folder)
    key_map = KEY_MAPS[_layout_of(folder) if source == "auto" else source]
    for name in ("layer_norm_eps", "pooler_layernorm"):
        if getattr(config, name) != getattr(key_map, name):
            raise ConversionError(
                f"The layout {key_map.name} implies {name}={getattr(key_map, name)}, but the model has "
                f"{getattr(config, name)}. Choose another --source."
            )
    blocks = block_names(config.stage_layers)
    numbers = {name: number for number, name in enumerate(blocks)}
    names = {name: key_map.original_name(name, numbers.get) for name in tensors}
    homeless = [
        ("no place", name, f"{list(tensors[name].shape)}", key_map.name) for name, key in names.items() if not key
    ]
    if homeless:
        raise ConversionError(f"The layout {key_map.name} has no place for these:\n{_table(homeless)}")
    state_dict = OrderedDict((key, tensors[name]) for name, key in names.items())
    added = {}
    if config.use_relative_position_bias:
        main = [number for number, name in enumerate(blocks) if name.startswith("stages.2.")]
        index = relative_position_index(config.grid_size, torch.device("cpu"))
        for key in key_map.index_keys(main):
            state_dict[key], added[key] = index, "index buffer, recomputed"
    if class_name == "HiViTForMaskedImageModeling" and not config.fuse_stages:
        state_dict["norm.weight"], state_dict["norm.bias"] = (
            torch.ones(config.hidden_size),
            torch.zeros(config.hidden_size),
        )
        added |= dict.fromkeys(("norm.weight", "norm.bias"), "identity: the original has it, but does not apply it")

    with written_whole(out_dir, overwrite, keep=folder) as target:
        torch.save({key_map.container: state_dict}, target / "checkpoint.pth")
        proof = compare(read_checkpoint(target / "checkpoint.pth").tensors, state_dict)
        report = {
            "source": {"folder": folder.name, "class": class_name},
            "written": {"file": "checkpoint.pth", "entry": key_map.container, "layout": key_map.name},
            "tensors": {"read": len(tensors), "mapped": len(names), "added": len(added)},
            "added": _by_reason(added),
            "proof": proof,
            "versions": describe_versions(),
        }
        write_report(target, report)
    return report


def _read_folder(folder: Path) -> tuple[HiViTConfig, str, dict[str, torch.Tensor]]:
    """The configuration, the class and the tensors, by their full names, of a folder of the package."""
    file = folder / "model.safetensors"
    if not file.is_file() or not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} must be a folder with config.json and model.safetensors, for --to-original.")
    try:
        config = HiViTConfig.from_pretrained(folder)
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged folder can raise anything
        raise ConversionError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    class_name = (config.architectures or [None])[0]
    if class_name not in MODEL_CLASSES:
        raise ConversionError(f"{folder} holds a {class_name}; the original knows {', '.join(MODEL_CLASSES)}.")
    if class_name == "HiViTModel":
        tensors = {f"hivit.{name}": tensor for name, tensor in tensors.items()}
    return config, class_name, tensors


def _layout_of(folder: Path) -> str:
    report = folder / "conversion_report.json"
    if not report.is_file():
        return self_supervised.KEY_MAP.name
    return json.loads(report.read_text())["source"]["layout"]


# -- folders --------------------------------------------------------------------------------------------------------


def refuse_output(out_dir: Path, overwrite: bool, keep: Path):
    """ConversionError if `out_dir` must not be written: before time is spent."""
    if not out_dir.exists():
        return
    if not overwrite:
        raise ConversionError(f"{out_dir} exists. Choose another folder, or give --overwrite.")
    if not out_dir.is_dir():
        raise ConversionError(f"{out_dir} is a file, not a folder. Choose another name.")
    if keep.resolve().is_relative_to(out_dir.resolve()):
        raise ConversionError(f"{out_dir} holds {keep}, which --overwrite would delete. Choose another folder.")
    if any(out_dir.iterdir()) and not (out_dir / "conversion_report.json").is_file():
        raise ConversionError(f"{out_dir} was not written by this command, so --overwrite does not delete it.")


@contextmanager
def written_whole(out_dir: Path, overwrite: bool, keep: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out_dir` if all goes well, and vanishes otherwise."""
    refuse_output(out_dir, overwrite, keep)
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise ConversionError(f"{out_dir} cannot be written: {error.strerror}.") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        if out_dir.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
            os.replace(out_dir, old)
            os.replace(partial, out_dir)
            shutil.rmtree(old)
        else:
            os.replace(partial, out_dir)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_error(error):
            raise ConversionError(f"{out_dir} could not be written, and nothing of it was left: {error}.") from error
        raise


def _is_disk_error(error: BaseException) -> bool:
    return isinstance(error, OSError) or "No space left" in str(error) or "os error" in str(error)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
