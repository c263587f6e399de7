"""What the tests of detection share: sizes of small detectors, a small pre-trained HiViT, small runs."""

import json
from pathlib import Path

import torch

import finetune_detection
from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.detection.trainer import DetectionTrainer
from hivit_hf.training.command_line import parse_arguments


SMOKE = Path(finetune_detection.__file__).parent / "recipes" / "detection_smoke_cpu.yaml"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "depths": [1, 1, 2], "num_attention_heads": 2}
RCNN = {"fpn_channels": 16, "box_head_channels": 16, "mask_head_channels": 8, "min_size": 64, "max_size": 96}
DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 10}


def annotations_of(folder: Path, split: str) -> Path:
    """The annotation file of a split of scenes, `train` or `test`."""
    return folder / "annotations" / f"instances_{split}.json"


def pretrained(folder: Path, **changes) -> str:
    """A folder with a small masked autoencoder."""
    torch.manual_seed(3)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    HiViTForMaskedImageModeling(HiViTConfig(**{**NETWORK, **decoder, **changes})).save_pretrained(folder)
    return str(folder)


def flags_of(values: dict) -> list[str]:
    """A command line."""
    flags = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(json.dumps(i) if isinstance(i, (bool, dict)) else str(i) for i in items)]
    return flags


def data_flags(folder: Path) -> list[str]:
    """Where the scenes of the fixture are: first four words for training, then four for evaluation."""
    return flags_of(
        {
            "train_annotations": annotations_of(folder, "train"),
            "train_image_dir": folder / "train",
            "eval_annotations": annotations_of(folder, "test"),
            "eval_image_dir": folder / "test",
        }
    )


def command(folder: Path, output: Path, *arguments: str) -> int:
    """The script with the recipe for smoke tests."""
    first = ["--config", str(SMOKE), *data_flags(folder), "--output_dir", str(output)]
    return finetune_detection.main([*first, *arguments])


def trainer_for(folder: Path, output: Path, **changes) -> DetectionTrainer:
    """The trainer that the script makes."""
    first = ["--config", str(SMOKE), *data_flags(folder), "--output_dir", str(output)]
    return finetune_detection.make_trainer(
        *parse_arguments(finetune_detection.ARGUMENTS, None, [*first, *flags_of(changes)])
    )
