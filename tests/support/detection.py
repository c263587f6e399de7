"""What tests of detection share: small scenes as COCO files, sizes of small detectors, a small pre-trained HiViT."""

from pathlib import Path

import torch

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling


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
