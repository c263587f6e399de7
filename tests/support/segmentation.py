"""What the tests of segmentation share: models to begin with, small runs, predictions that vary."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import UperNetForSemanticSegmentation

import finetune_segmentation
from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.data.seeding import seeded
from hivit_hf.image_processing import IMAGENET_MEAN, IMAGENET_STD
from hivit_hf.segmentation.data import WholeImage
from hivit_hf.segmentation.trainer import SegmentationTrainer
from hivit_hf.training.command_line import parse_arguments
from scenes.data import map_names


SCENES = Path(finetune_segmentation.__file__).parent / "recipes" / "segmentation_scenes.yaml"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SMALL = {"head_channels": 8, "auxiliary_channels": 8}
NAMES = ["sky", "earth", "sea"]


def model_folder(folder: Path, kind=HiViTForMaskedImageModeling, **changes) -> str:
    torch.manual_seed(3)
    kind(HiViTConfig(**{**NETWORK, **changes})).save_pretrained(folder)
    return str(folder)


def flags_of(values: dict) -> list[str]:
    """A command line, without what is None."""
    flags = []
    for name, value in values.items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(json.dumps(i) if isinstance(i, (bool, dict)) else str(i) for i in items)]
    return flags


def run(dataset: str, output: Path, *flags: str) -> int:
    """The script, for 4 steps."""
    small = SMALL | {"auxiliary_weight": 0.4, "learning_rate": 2e-3, "layer_decay": 0.9, "class_names": map_names()}
    small |= {"crop_size": 32, "eval_size": 60, "per_device_train_batch_size": 2, "effective_batch_size": 4}
    small |= {"max_steps": 4, "warmup_steps": 1, "eval_steps": 2, "logging_steps": 1, "num_overlays": 2}
    where = {"dataset_name": dataset, "output_dir": output, "config": SCENES}
    return finetune_segmentation.main([*flags_of(small), *flags, *flags_of(where)])


def trainer_for(dataset: str | None, output: Path, **changes) -> SegmentationTrainer:
    """The trainer that the script makes, at the moment when it begins to train."""

    made = []

    def begin(trainer: SegmentationTrainer, **_):
        made.append(trainer)
        raise InterruptedError

    values = {"from_scratch": True, "architecture": "tiny", **SMALL, "class_names": map_names(), "crop_size": 32}
    values |= {"eval_size": 60, "per_device_train_batch_size": 2, "effective_batch_size": 4, "config": SCENES}
    values |= {"config_overrides": {"depths": [1, 1, 1], "hidden_size": 32, "num_attention_heads": 2, "patch_size": 8}}
    values |= {"dataset_name": dataset, "output_dir": output} | changes
    with mock.patch.object(SegmentationTrainer, "train", begin), pytest.raises(InterruptedError):
        finetune_segmentation.train(*parse_arguments(finetune_segmentation.ARGUMENTS, None, flags_of(values)))
    return made[0]


def make_erratic(model: UperNetForSemanticSegmentation, image: PILImage.Image) -> UperNetForSemanticSegmentation:
    """Re-initializes the classifier so that no class is likelier than another on the image: small things decide."""
    classifier = model.decode_head.classifier
    pixel_values, _ = WholeImage(IMAGENET_MEAN, IMAGENET_STD)(image.crop((0, 0, 48, 40)), np.zeros((40, 48)))
    with seeded(0), torch.no_grad():
        torch.nn.init.normal_(classifier.weight)
        torch.nn.init.zeros_(classifier.bias)
        std, mean = torch.std_mean(model.eval()(pixel_values=pixel_values[None]).logits, (0, 2, 3))
        classifier.weight /= std[:, None, None, None]
        classifier.bias -= mean / std
    return model
