# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Table of published checkpoints: repository on the Hub, whether it is uploaded, and the contents of its card."""

from dataclasses import dataclass, field

from ..configuration_hivit import ARCHITECTURES


# iTPN-B's encoder. It never had a name of its own, so it is no entry of ARCHITECTURES.
ITPN_BASE = {"hidden_size": 512, "depths": [3, 3, 24], "num_attention_heads": 8, "early_blocks_per_depth": 1}


@dataclass(frozen=True)
class PaperResult:
    """A result from a paper: what was measured, its value with the unit, and the paper's number on arXiv."""

    what: str
    value: str
    arxiv: str = "2205.14949"

    @property
    def paper(self) -> str:
        """The paper as a link in Markdown."""
        return f"[arXiv {self.arxiv}](https://arxiv.org/abs/{self.arxiv})"


@dataclass(frozen=True)
class Checkpoint:
    """
    A trained model, as its card describes it.

    Args:
        title: heading of the card.
        repo_id: its repository on the Hub.
        revision: the uploaded commit; None as long as nothing has been uploaded.
        model_class: the class that the weights are of.
        arguments: of `HiViTConfig`.
        description: what it is, in a sentence or two of Markdown.
        training: data, recipe and hardware, in Markdown.
        paper_results: of this network after this training.
        weights: `original` if the authors published weights that are converted, `unpublished` if they did not, `own`
            if they are ours to publish.
        weights_source: where the original weights are, in Markdown.
        train_it: how to train one, in Markdown, where weights are not published.
        license: identifier of the Hub for the weights; `unknown` where their publisher states none.
        license_note: what is known of it.
        datasets: ids on the Hub of the training datasets.
        papers: for the citation, of `hivit` and `itpn`.
    """

    title: str
    repo_id: str
    model_class: str
    description: str
    training: str
    arguments: dict = field(default_factory=dict)
    revision: str | None = None
    paper_results: tuple[PaperResult, ...] = ()
    weights: str = "own"
    weights_source: str = ""
    train_it: str = ""
    license: str = "unknown"
    license_note: str = ""
    datasets: tuple[str, ...] = ()
    papers: tuple[str, ...] = ("hivit",)

    @property
    def uploaded(self) -> bool:
        """Whether the repository is on the Hub."""
        return self.revision is not None


_ORIGINAL_LICENSE = (
    "The original HiViT code is under the MIT license. Whether that covers the weights, their publishers do not say: "
    "ask them before you redistribute."
)
_ITPN_LICENSE = "The publishers of iTPN state no license that we know of: ask them before you redistribute."
_IMAGENET = ("ILSVRC/imagenet-1k",)


def _supervised_from_scratch(name: str, letter: str, top1: str, drop_path: float) -> Checkpoint:
    return Checkpoint(
        title=f"HiViT-{letter}, supervised on ImageNet-1k",
        repo_id=f"hivit-hf/hivit-{name}",
        model_class="HiViTForImageClassification",
        arguments={**ARCHITECTURES[name], "num_labels": 1000},
        description=f"HiViT-{letter} for image classification, trained from scratch on ImageNet-1k.",
        paper_results=(PaperResult("ImageNet-1k, top-1 at 224 px", f"{top1} %"),),
        training=(
            "The paper's recipe: 300 epochs, 20 of them warm-up, batch 1024, AdamW (0.9, 0.999), learning rate 1e-3 to "
            "1e-5 by cosine, weight decay 0.05, mixup 0.8, cutmix 1.0, label smoothing 0.1, RandAugment m9, random "
            f"erasing 0.25, color jitter 0.4, drop path {drop_path}, no gradient clipping."
        ),
        train_it=(
            f"The same recipe is `examples/recipes/supervised_{name}_300ep.yaml`. In a checkout of the repository:\n\n"
            "```bash\npython examples/finetune_classification.py --dataset_name ILSVRC/imagenet-1k \\\n"
            f"    --config examples/recipes/supervised_{name}_300ep.yaml --output_dir runs/hivit-{name}\n```"
        ),
        weights="unpublished",
        license_note="There are no weights to license. What you train is yours.",
        datasets=_IMAGENET,
    )


def _itpn_encoder(size: str, letter: str, arguments: dict, main_layers: int) -> Checkpoint:
    return Checkpoint(
        title=f"iTPN-{letter} (pixel), encoder",
        repo_id=f"hivit-hf/itpn-{size}-pixel",
        model_class="HiViTModel",
        arguments={**arguments, "use_relative_position_bias": False},
        description=(
            f"The encoder of iTPN-{letter} after pre-training on pixels: a HiViT with {main_layers} main layers. "
            "iTPN's feature pyramid and decoder are another network and are not included."
        ),
        training="Masked image modeling of pixels on ImageNet-1k through iTPN's feature pyramid; see its paper.",
        weights="original",
        weights_source="linked from the README of [sunsmarterjie/iTPN](https://github.com/sunsmarterjie/iTPN)",
        license_note=_ITPN_LICENSE,
        datasets=_IMAGENET,
        papers=("itpn", "hivit"),
    )


CHECKPOINTS = {
    "hivit-tiny": _supervised_from_scratch("tiny", "T", "82.1", 0.05),
    "hivit-small": _supervised_from_scratch("small", "S", "83.5", 0.3),
    "hivit-base": _supervised_from_scratch("base", "B", "83.8", 0.5),
    "hivit-base-mae-1600ep": Checkpoint(
        title="HiViT-B, masked autoencoder, 1600 epochs",
        repo_id="hivit-hf/hivit-base-mae-1600ep",
        model_class="HiViTForMaskedImageModeling",
        arguments=ARCHITECTURES["base-mae"],
        description=(
            "HiViT-B pre-trained as a masked autoencoder on ImageNet-1k, without labels. Encoder and decoder: it "
            "reconstructs images without further training, extracts features, and initializes fine-tuning."
        ),
        training=(
            "Masked image modeling on ImageNet-1k, 1600 epochs, 40 of them warm-up, effective batch 4096, AdamW "
            "(0.9, 0.95), learning rate 1e-4 for each 256 images, cosine to 0, weight decay 0.05, 75 % of the units "
            "masked, random crops of 20 to 100 % of the image and flips. The authors used 8 GPUs. The same recipe is "
            "`examples/recipes/mae_base_1600ep.yaml`, for `examples/pretrain_mim.py`."
        ),
        paper_results=(
            PaperResult("ImageNet-1k, top-1 after 100 epochs of fine-tuning", "84.6 %"),
            PaperResult("COCO, box AP, Mask R-CNN fine-tuned from it", "53.3"),
            PaperResult("ADE20K, mIoU, UPerNet, fine-tuned from the fine-tuned classifier", "52.8 %"),
        ),
        weights="original",
        weights_source=(
            "`mae_hivit_base_1600ep.pth`, linked from the README of "
            "[zhangxiaosong18/hivit](https://github.com/zhangxiaosong18/hivit)"
        ),
        license_note=_ORIGINAL_LICENSE,
        datasets=_IMAGENET,
    ),
    "hivit-base-mae-1600ep-ft100ep": Checkpoint(
        title="HiViT-B, masked autoencoder fine-tuned for 100 epochs",
        repo_id="hivit-hf/hivit-base-mae-1600ep-ft100ep",
        model_class="HiViTForImageClassification",
        arguments={**ARCHITECTURES["base"], "num_labels": 1000},
        description=(
            "HiViT-B for image classification: pre-trained as a masked autoencoder for 1600 epochs, then fine-tuned "
            "with the labels of ImageNet-1k for 100."
        ),
        training=(
            "From the 1600-epoch masked autoencoder: 100 epochs, 5 of them warm-up, effective batch 1024, AdamW "
            "(0.9, 0.999), learning rate 5e-4 for each 256 images, down to 1e-6, weight decay 0.05, layer decay "
            "0.85, drop path 0.2, mixup 0.8, cutmix 1.0, label smoothing 0.1, RandAugment m9, random erasing 0.25. The "
            "same recipe is `examples/recipes/finetune_base_100ep.yaml`, for `examples/finetune_classification.py`."
        ),
        paper_results=(PaperResult("ImageNet-1k, top-1 at 224 px", "84.6 %"),),
        weights="original",
        weights_source=(
            "`mae_hivit_base_1600ep_ft100ep.pth`, linked from the README of "
            "[zhangxiaosong18/hivit](https://github.com/zhangxiaosong18/hivit)"
        ),
        license_note=_ORIGINAL_LICENSE,
        datasets=_IMAGENET,
    ),
    "itpn-base-pixel": _itpn_encoder("base", "B", ITPN_BASE, 24),
    "itpn-large-pixel": _itpn_encoder("large", "L", ARCHITECTURES["large"], 40),
}
# the default models of the Space
SPACE_CHECKPOINTS = {"classifier": "hivit-base-mae-1600ep-ft100ep", "autoencoder": "hivit-base-mae-1600ep"}
