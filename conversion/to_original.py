"""Conversion back: from a folder of the package to a checkpoint in an original layout, verified by reading it."""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from architecture import block_names
from checkpoint import ConversionError, read_checkpoint, shown
from engine import KEY_MAPS, WRITTEN_FILES, by_reason, compare, expected_shapes, problems_with, table
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.modeling_hivit import relative_position_index
from hivit_hf.training.folders import written_whole
from key_maps import KeyMap, self_supervised
from report import describe_versions, write_report


MODEL_CLASSES = {cls.__name__: cls for cls in (HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification)}


def to_original(folder: Path, out_dir: Path, source: str = "auto", overwrite: bool = False) -> dict:
    """
    Writes `checkpoint.pth` in the original's layout from a folder of the package.

    Args:
        source: the layout; `auto` takes the one that the folder's conversion report names, or `self-supervised`.

    Raises:
        ConversionError: if the folder holds no sound HiViT, or the layout has no place for one of its tensors.
    """
    config, class_name, tensors = _read_folder(folder)
    key_map = KEY_MAPS[_layout_of(folder) if source == "auto" else source]
    _check_expressible(key_map, config)
    blocks = block_names(config.stage_layers)
    numbers = {name: number for number, name in enumerate(blocks)}
    names = {name: key_map.original_name(name, numbers.__getitem__) for name in tensors}
    homeless = [
        ("no place", name, f"{list(tensors[name].shape)}", key_map.name) for name, key in names.items() if not key
    ]
    if homeless:
        raise ConversionError(f"The layout {key_map.name} has no place for these:\n{table(homeless)}")
    state_dict = OrderedDict((key, tensors[name]) for name, key in names.items())
    added = {}
    if config.use_relative_position_bias:
        main = [number for number, name in enumerate(blocks) if name.startswith("stages.2.")]
        index = relative_position_index(config.grid_size, torch.device("cpu"))
        for key in key_map.index_keys(main):
            state_dict[key], added[key] = index, "index buffer, recomputed"
    if class_name == "HiViTForMaskedImageModeling" and not config.fuse_stages:
        like = tensors["decoder.mask_token"]
        width = config.hidden_size
        state_dict |= {"norm.weight": like.new_ones(width), "norm.bias": like.new_zeros(width)}
        added |= dict.fromkeys(("norm.weight", "norm.bias"), "identity: the original has it, but does not apply it")

    with written_whole(out_dir, overwrite, [folder], WRITTEN_FILES) as target:
        torch.save({key_map.container: state_dict}, target / "checkpoint.pth")
        proof = compare(read_checkpoint(target / "checkpoint.pth").tensors, state_dict)
        report = {
            "source": {"folder": folder.name, "class": class_name},
            "written": {"file": "checkpoint.pth", "entry": key_map.container, "layout": key_map.name},
            "tensors": {"read": len(tensors), "mapped": len(names), "added": len(added)},
            "added": by_reason(added),
            "proof": proof,
            "versions": describe_versions(),
        }
        write_report(target, report)
    return report


def _check_expressible(key_map: KeyMap, config: HiViTConfig):
    """ConversionError if the original of this layout computes something else than the model."""
    implied = {
        "layer_norm_eps": key_map.layer_norm_eps,
        "pooler_layernorm": key_map.pooler_layernorm,
        "hidden_act": "gelu",
    }
    for name, value in implied.items():
        if getattr(config, name) != value:
            raise ConversionError(
                f"The layout {key_map.name} implies {name}={value}, but the model has {getattr(config, name)}. Choose "
                "another --source, if there is one."
            )
    if len(set(config.grid_size)) > 1:
        raise ConversionError(f"The original knows square images only, but the model is for {config.image_size} px.")


def _read_folder(folder: Path) -> tuple[HiViTConfig, str, dict[str, torch.Tensor]]:
    """
    The configuration, the class and the tensors, by their full names, of a folder of the package. ConversionError if
    they do not belong together.
    """
    file = folder / "model.safetensors"
    if not file.is_file() or not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} must be a folder with config.json and model.safetensors, for --to_original.")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = HiViTConfig.from_pretrained(folder)
        tensors = load_file(file)
        class_name = content["architectures"][0]
        model_class = MODEL_CLASSES[class_name]
    except (ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise ConversionError(f"{folder} holds no HiViT that can be read: {shown(str(error))}.") from error
    if content.get("model_type") != "hivit":
        raise ConversionError(f"{folder} holds a {shown(content.get('model_type'))}, not a hivit.")
    arguments = {} if model_class is not HiViTModel else {"add_pooling_layer": "layernorm.weight" in tensors}
    expected = expected_shapes(model_class, config, arguments)
    problems = problems_with(tensors, expected, shown_name=str)
    if problems:
        raise ConversionError(f"{file} and config.json do not belong together:\n{table(problems)}")
    if model_class is HiViTModel:
        tensors = {f"hivit.{name}": tensor for name, tensor in tensors.items()}
    return config, class_name, tensors


def _layout_of(folder: Path) -> str:
    try:
        layout = json.loads((folder / "conversion_report.json").read_text(encoding="utf-8"))["source"]["layout"]
    except (OSError, ValueError, KeyError, TypeError):
        return self_supervised.KEY_MAP.name
    return layout if layout in KEY_MAPS else self_supervised.KEY_MAP.name
