# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Model cards, rendered from data: the configuration, the table of checkpoints, conversion reports, result files."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import modeling_hivit
from ..configuration_hivit import HiViTConfig
from .model_zoo import Checkpoint


TEMPLATE = Path(__file__).parent / "card_template.md"
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown"}
TASKS = {"image-classification", "image-feature-extraction"}
TAGS = {"hivit", "itpn", "vision", "masked-image-modeling", "masked-autoencoder", "self-supervised"}
TAGS |= {"custom_code", "onnx"}
CITATIONS = {
    "hivit": """@inproceedings{zhang2023hivit,
  title = {HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer},
  author = {Zhang, Xiaosong and Tian, Yunjie and Xie, Lingxi and Huang, Wei and Dai, Qi and Ye, Qixiang and Tian, Qi},
  booktitle = {International Conference on Learning Representations},
  year = {2023}
}""",
    "itpn": """@inproceedings{tian2023itpn,
  title = {Integrally Pre-Trained Transformer Pyramid Networks},
  author = {Tian, Yunjie and Xie, Lingxi and Wang, Zhaozhi and Wei, Longhui and Zhang, Xiaopeng and Jiao, Jianbin and
            Wang, Yaowei and Tian, Qi and Ye, Qixiang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2023}
}""",
}
_QUICK_START = {
    "HiViTForImageClassification": """from transformers import pipeline

classify = pipeline("image-classification", "{source}", trust_remote_code=True{revision})
classify({image}, top_k=3)""",
    "HiViTForMaskedImageModeling": """import torch
from PIL import Image
from transformers import AutoModelForMaskedImageModeling, {processor}

processor = {processor}.from_pretrained("{source}"{revision})
model = AutoModelForMaskedImageModeling.from_pretrained("{source}", trust_remote_code=True{revision})
pixel_values = processor(Image.open({image}).convert("RGB"), return_tensors="pt").pixel_values
mask = model.draw_mask(pixel_values)  # (1, {units}), True = masked
image = model.reconstruct(pixel_values, bool_masked_pos=mask)  # masked patches reconstructed, visible ones unchanged
with torch.no_grad():
    features = model.hivit(pixel_values).last_hidden_state  # (1, {units}, {channels}): nothing is masked""",
    "HiViTModel": """import torch
from PIL import Image
from transformers import AutoModel, {processor}

processor = {processor}.from_pretrained("{source}"{revision})
model = AutoModel.from_pretrained("{source}", add_pooling_layer=False, trust_remote_code=True{revision})
pixel_values = processor(Image.open({image}).convert("RGB"), return_tensors="pt").pixel_values
with torch.no_grad():
    features = model(pixel_values).last_hidden_state  # (1, {units}, {channels})""",
}
# file of `benchmarks/results` -> what it measured, the keys of the value, its unit
_MEASURED = {
    "inference_cpu.json": (
        "classification, forward, float32, batch {batch_size}",
        ("float32", "models", "HiViT-B", "median_s"),
        "s",
    ),
    "onnx_cpu.json": (
        "the same in onnxruntime, relative to PyTorch, round by round",
        ("speed", "onnxruntime", "times_slower_than_ours"),
        "x the time",
    ),
}
_FIELDS = [name for name in HiViTConfig.__annotations__ if not name.startswith("_")]
_TRAINING_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range")
_TRAINING_FIELDS += ("mask_ratio",)


@dataclass(frozen=True)
class Folder:
    """
    Contents of a repository that its card describes.

    Args:
        samples: of a classifier: the widget's images with predictions, `src`, `example_title` and `output` each.
        reconstructions: of an autoencoder: paths of images.
        report: the conversion report, if the weights were converted.
        tree: the files.
        processor: class of the image processor.
        parameters: of the model in it; counted from the configuration if not given.
    """

    samples: Sequence[dict] = ()
    reconstructions: Sequence[str] = ()
    report: dict | None = None
    tree: str = ""
    processor: str = "BitImageProcessor"
    parameters: int | None = None


def count_parameters(model_class: str, config: HiViTConfig) -> int:
    """Parameters of a network, without making it; encoders are counted without pooling layer, as they are published."""
    arguments = {"add_pooling_layer": False} if model_class == "HiViTModel" else {}
    with torch.device("meta"):
        return getattr(modeling_hivit, model_class)(config, **arguments).num_parameters()


def differences(model_class: str, config: HiViTConfig, other: HiViTConfig) -> list[str]:
    """Names of what makes the networks of two configurations different; what only training uses does not count."""
    ignored = set(_TRAINING_FIELDS)
    if model_class != "HiViTForMaskedImageModeling":
        ignored |= {name for name in _FIELDS if name.startswith("decoder_")} | {"fuse_stages", "norm_pix_loss"}
    names = [name for name in _FIELDS if name not in ignored]
    if model_class == "HiViTForImageClassification":
        names.append("num_labels")
    return [name for name in names if _plain(config, name) != _plain(other, name)]


def _plain(config: HiViTConfig, name: str):
    value = getattr(config, name)
    if name == "image_size" and isinstance(value, int):
        return [value, value]
    return list(value) if isinstance(value, tuple) else value


def measured_results(model_class: str, config: HiViTConfig, results_dir: Path | None) -> list[dict]:
    """Rows of the table of results, from the benchmark files of this repository that measured this very network."""
    base = HiViTConfig.from_architecture("base", num_labels=1000)
    same = model_class == "HiViTForImageClassification" and not differences(model_class, config, base)
    if results_dir is None or not same:
        return []
    rows = []
    for file, (what, keys, unit) in _MEASURED.items():
        path = results_dir / file
        if not path.exists():
            continue
        record = found = json.loads(path.read_text())
        for key in keys:
            found = found[key]
        what = f"{what.format(**record)}, {record['hardware']['cpu']}, {record['hardware']['cores']} cores"
        rows.append({"what": what, "value": f"{found:.2f} {unit}", "source": f"`benchmarks/results/{file}`"})
    return rows


def render_card(
    about: Checkpoint,
    config: HiViTConfig,
    folder: Folder | None = None,
    results_dir: Path | None = None,
    to_hub: bool = False,
) -> str:
    """
    The card of a model.

    Args:
        about: what cannot be derived from the model.
        config: its configuration.
        folder: what lies beside the card, if it lies in a repository; without, it is the card of a checkpoint that is
            described only.
        results_dir: the repository's `benchmarks/results`, if the card may quote them.
        to_hub: whether it is about to be uploaded, so that its readers find the weights on the Hub.

    Raises:
        ValueError: if the card would not pass `check_card`.
    """
    folder = folder or Folder()
    height, width = (length * config.patch_size for length in config.grid_size)
    trained_here = about.weights == "unpublished" and bool(folder.tree)
    whose = ", the paper's own weights" if trained_here else ""
    paper_rows = [
        {"what": r.what + whose, "value": r.value, "source": f"paper ({r.paper})"} for r in about.paper_results
    ]
    measured = measured_results(about.model_class, config, results_dir)
    uploaded = about.uploaded or to_hub
    load_from = about.repo_id if uploaded else about.repo_id.rpartition("/")[2]
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters |= {"plain": _escaped, "url": quote}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about=about,
        config=config,
        folder=folder,
        metadata=_metadata(about, config, folder).to_yaml().strip(),
        decoder=about.model_class == "HiViTForMaskedImageModeling",
        classifies=about.model_class == "HiViTForImageClassification",
        trained_here=trained_here,
        uploaded=uploaded,
        load_from=load_from,
        parameters=folder.parameters or count_parameters(about.model_class, config),
        input_size=f"{height}x{width}",
        quick_start=_quick_start(about, config, folder, load_from, uploaded),
        limits=_limits(about, config),
        results=paper_rows + measured,
        paper_only=bool(paper_rows) and not measured,
        license_text=_license_text(about, trained_here),
        citation="\n\n".join(CITATIONS[paper] for paper in about.papers),
    )
    check_card(text)
    return text


def _quick_start(about: Checkpoint, config: HiViTConfig, folder: Folder, load_from: str, uploaded: bool) -> str:
    imports, image = _example_image(about, load_from, uploaded, folder)
    return imports + _QUICK_START[about.model_class].format(
        source=load_from,
        revision=f', revision="{about.revision}"' if about.revision else "",
        image=image,
        processor=folder.processor,
        units=config.grid_size[0] * config.grid_size[1],
        channels=config.hidden_size,
    )


def _example_image(about: Checkpoint, load_from: str, uploaded: bool, folder: Folder) -> tuple[str, str]:
    """Imports, and the expression for the image of the quick start: a sample, if there is one."""
    if not folder.samples:
        return "", '"image.jpg"'
    name = folder.samples[0]["src"]
    if not uploaded:
        return "", json.dumps(f"{load_from}/{name}", ensure_ascii=False)
    arguments = [json.dumps(load_from), json.dumps(name, ensure_ascii=False)]
    arguments += [f'revision="{about.revision}"'] if about.revision else []
    return "from huggingface_hub import hf_hub_download\n", f"hf_hub_download({', '.join(arguments)})"


def _escaped(text: str) -> str:
    """A text whose characters mean only themselves, in Markdown, its tables and HTML attributes."""
    return re.sub(r"[\\`*_\[\]|~<>&\"']", lambda found: f"&#{ord(found[0])};", " ".join(str(text).split()))


def check_card(text: str):
    """
    Checks a card as far as that goes without the network: huggingface_hub's parsing, and the lists of this file.

    Raises:
        ValueError: if the metadata cannot be parsed, or license, task, library or a tag is none of the known ones.
    """
    data = ModelCard(text).data
    for name, value, known in [
        ("license", data.license, LICENSES),
        ("pipeline_tag", data.pipeline_tag, TASKS),
        ("library_name", data.library_name, {"transformers"}),
        *(("tags", tag, TAGS) for tag in data.tags or []),
    ]:
        if value not in known:
            raise ValueError(f"The card's {name} is {value!r}: choose from {', '.join(sorted(known))}.")


def _metadata(about: Checkpoint, config: HiViTConfig, folder: Folder) -> ModelCardData:
    tags = ["hivit", "vision", "custom_code"]
    tags += ["itpn"] if "itpn" in about.papers else []
    if about.model_class == "HiViTForMaskedImageModeling":
        tags += ["masked-image-modeling", "masked-autoencoder", "self-supervised"]
    if folder.tree and "onnx/" in folder.tree:
        tags.append("onnx")
    classifies = about.model_class == "HiViTForImageClassification"
    results = None
    if classifies and about.weights == "original":  # these very weights were measured by the paper
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="ILSVRC/imagenet-1k",
                dataset_name="ImageNet-1k",
                metric_type="accuracy",
                metric_name="top-1 at 224 px",
                metric_value=float(result.value.split()[0]),
                source_name=f"paper (arXiv {result.arxiv})",
                source_url=f"https://arxiv.org/abs/{result.arxiv}",
            )
            for result in about.paper_results
        ]
    return ModelCardData(
        license=about.license,
        library_name="transformers",
        pipeline_tag="image-classification" if classifies else "image-feature-extraction",
        tags=tags,
        datasets=list(about.datasets) or None,
        metrics=["accuracy"] if classifies else None,
        model_name=about.title if results else None,
        eval_results=results,
        widget=[sample | {"src": quote(sample["src"])} for sample in folder.samples] or None,
    )


def _limits(about: Checkpoint, config: HiViTConfig) -> list[str]:
    rows, columns = config.grid_size
    size = f"{rows * config.patch_size}x{columns * config.patch_size} px"
    lines = [
        f"Images of {size}, as in training; other multiples of {config.patch_size} px work too (positions are "
        "interpolated)."
    ]
    if about.model_class == "HiViTForImageClassification":
        use, scores = _classifier_limits(config)
        lines.insert(0, use)
        lines.append(scores)
    elif about.model_class == "HiViTForMaskedImageModeling":
        lines.insert(0, "An initialization for fine-tuning and a feature extractor. It has no classes.")
        what = "fine detail is missing"
        if config.norm_pix_loss:
            what = "masked patches are predicted relative to their mean and std, which come from the true image"
        lines.append(f"Reconstructions show what the model has learned; they are no inpainting: {what}.")
        lines.append("There is no hosted widget for masked image modeling.")
    else:
        lines.insert(0, "An initialization for fine-tuning and a feature extractor. It has no classes and no decoder.")
    lines.append(
        "The model inherits the biases of its images and labels: evaluate it on your own data before relying on it."
    )
    lines.append("The Hub's own inference widget does not run models with custom code; the samples here are static.")
    return lines


def _classifier_limits(config: HiViTConfig) -> tuple[str, str]:
    if config.problem_type == "regression":
        return f"Predicts {config.num_labels} numbers for any image.", "Scores are numbers, not probabilities."
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return (
            f"Scores each of {config.num_labels} classes independently: several may be right, or none.",
            "Scores are sigmoid outputs, not calibrated probabilities.",
        )
    return (
        f"Predicts one of {config.num_labels} classes, always: there is no 'none of these'.",
        "Scores are softmax outputs, not calibrated probabilities.",
    )


def _license_text(about: Checkpoint, trained_here: bool) -> str:
    if about.weights == "unpublished" and not trained_here:
        return about.license_note
    if trained_here and about.license == "unknown":
        return "No license is stated for these weights."
    note = "" if trained_here else about.license_note
    return f"The license of the weights is {about.license}. {note}".strip()
