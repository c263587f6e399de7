# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Repositories of the Hub: export of a model with code, card, samples, ONNX files and endpoint; loading; upload."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import pipeline
from transformers.image_processing_utils import BaseImageProcessor

from .. import modeling_hivit
from ..auto_registration import AUTO_MODELS
from ..configuration_hivit import HiViTConfig
from ..image_processing import evaluation_processor, first_line
from ..modeling_hivit import (
    HiViTBackbone,
    HiViTForImageClassification,
    HiViTForMaskedImageModeling,
    HiViTPreTrainedModel,
)
from ..training.folders import refuse_output, written_whole
from .cards import Folder, differences, render_card
from .handler import RequestError, read_image
from .model_zoo import Checkpoint
from .onnx import check_exportable, export_onnx, tasks_of
from .visualization import enlarged, masked_image, pixels_to_image, side_by_side


PACKAGE = Path(__file__).parents[1]
CODE_FILES = ("configuration_hivit.py", "modeling_hivit.py", "image_reading.py", "hub/handler.py")
REQUIREMENTS = ("torch>=2.11", "transformers>=5.17", "safetensors>=0.5", "huggingface-hub>=1.0", "pillow>=11")
SAMPLE_SUFFIXES = (".jpg", ".jpeg", ".png")
WRITTEN_FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "requirements.txt"]
WRITTEN_FILES += ["conversion_report.json", "LICENSE", *(Path(name).name for name in CODE_FILES)]
WRITTEN_FILES += ["onnx/", "onnx/*.onnx", "samples/", *(f"samples/*{suffix}" for suffix in SAMPLE_SUFFIXES)]
# what a card quotes of a conversion report
REPORTED = [("source", "file", str), ("source", "sha256", str), ("source", "title", str), ("source", "size_bytes", int)]
REPORTED += [("proof", "equal", int), ("proof", "compared", int), ("proof", "largest_difference", (int, float))]
MAX_SAMPLES, SHOWN_PX = 24, 192


def export(
    model: HiViTPreTrainedModel,
    out_dir: str | Path,
    about: Checkpoint | None = None,
    image_processor: BaseImageProcessor | None = None,
    samples: Sequence[str | Path] = (),
    conversion_report: dict | None = None,
    onnx: bool = True,
    results_dir: Path | None = None,
    overwrite: bool = False,
    push_to_hub: bool = False,
) -> Path:
    """
    Writes a complete repository of the Hub: weights, configuration with labels and the full `auto_map`, image
    processor, the code that travels, card, sample images with predictions, ONNX files, and the files of an Inference
    Endpoint. The folder is written whole or not at all. Nothing leaves the machine unless asked.

    Args:
        model: any HiViT; its configuration says the names of the classes.
        out_dir: the folder to write.
        about: what the card says that cannot be derived from the model; an entry of `CHECKPOINTS`, or your own.
        image_processor: how images become pixels; `evaluation_processor` of the model's size if not given.
        samples: PNG and JPEG files, at most 24.
        conversion_report: of `conversion/convert.py`, if the weights were converted.
        onnx: whether to write `onnx/`, which takes most of the time.
        results_dir: as in `render_card`.
        overwrite: whether an earlier export in `out_dir` may be replaced.
        push_to_hub: whether to upload the folder to `about.repo_id`; a private repository is made if there is none.

    Returns:
        The folder.

    Raises:
        ValueError: for models, samples and folders that cannot be exported; before anything is written.
    """
    out_dir, samples = Path(out_dir), [Path(sample) for sample in samples]
    _check_model(model)
    about = _about(model, about, out_dir, conversion_report, push_to_hub)
    onnx_files = _onnx_files(model) if onnx else {}
    for task in onnx_files.values():
        check_exportable(model, task)
    refuse_output(out_dir, overwrite, samples, WRITTEN_FILES)
    images = _read_samples(samples)
    image_processor = image_processor or _published_processor(model.config)
    model.eval()
    with written_whole(out_dir, overwrite, samples, WRITTEN_FILES) as folder:
        _save_model(model, folder)
        image_processor.save_pretrained(folder)
        _write_code(folder)
        if conversion_report is not None:
            (folder / "conversion_report.json").write_text(json.dumps(conversion_report, indent=1) + "\n")
        for name, task in onnx_files.items():
            export_onnx(model, folder / "onnx" / name, task)
        found = _run_samples(model, image_processor, images, folder)
        (folder / "README.md").touch()  # it names itself
        found = replace(
            found,
            report=conversion_report,
            tree=tree(folder, out_dir.resolve().name),
            processor=image_processor.to_dict()["image_processor_type"],
            parameters=model.num_parameters(),
        )
        card = render_card(about, model.config, found, results_dir, to_hub=push_to_hub)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if push_to_hub:
        upload(out_dir, about.repo_id)
    return out_dir


def _published_processor(config: HiViTConfig) -> BaseImageProcessor:
    height, width = (length * config.patch_size for length in config.grid_size)
    if height != width:
        raise ValueError(f"The model sees {height}x{width} px, which is no square: give an image_processor.")
    return evaluation_processor(height)


def undescribed(model: HiViTPreTrainedModel, name: str) -> Checkpoint:
    """The description in the card of a model without one."""
    model_class = type(model).__name__
    training = "Not described."
    return Checkpoint(name, name, model_class, description=f"A `{model_class}`.", training=training)


def upload(folder: Path, repo_id: str):
    """
    Uploads a folder to the Hub, into a private repository if there is none yet, and prints the commit. What an earlier
    export has left there and this one has not is deleted; other files stay.

    Raises:
        ValueError: if the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api, written = HfApi(), [name for name in WRITTEN_FILES if not name.endswith("/")]
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Upload HiViT", delete_patterns=written
        )
    except Exception as error:  # the network, the token, the name: the library says which
        raise ValueError(
            f"{folder} was written, but not uploaded to {repo_id}: {first_line(error)} Log in with `hf auth login`, "
            "check the network, and upload it again."
        ) from error
    print(f"uploaded: {commit.commit_url}")


def load_folder(folder: Path) -> HiViTPreTrainedModel:
    """
    The model in a folder, of the class that its configuration names.

    Raises:
        ValueError: if there is none, or it is no HiViT.
    """
    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder} is no folder of a model: it has no config.json with architectures.") from error
    if name not in AUTO_MODELS.values():
        raise ValueError(f"{folder} holds a {name}, which is no HiViT: choose one of {sorted(AUTO_MODELS.values())}.")
    arguments = {"add_pooling_layer": _holds(folder, "layernorm.weight")} if name == "HiViTModel" else {}
    return load_model(getattr(modeling_hivit, name), folder, **arguments)


def _holds(folder: Path, name: str) -> bool:
    """Whether the weights in a folder have a tensor of that name; damaged ones have none."""
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError), safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  (no dictionary)
                return True
    return False


def load_model(model_class: type[HiViTPreTrainedModel], source: str | Path, **arguments) -> HiViTPreTrainedModel:
    """
    `from_pretrained`, which also refuses weights that are not those of the class instead of drawing what is missing.

    Raises:
        ValueError: if it cannot be loaded, or weights are missing.
    """
    try:
        model, found = model_class.from_pretrained(source, output_loading_info=True, **arguments)
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise ValueError(f"{source} cannot be loaded: {first_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{source} is no whole {model_class.__name__}: its weights lack {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}. Give a folder of that class."
        )
    return model


def tree(folder: Path, name: str = "") -> str:
    """The files of a folder with their sizes, a line each."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: (len(p.parts), p.as_posix()))
    names = [path.relative_to(folder).as_posix() for path in paths]
    width = max(map(len, names), default=0)
    lines = [f"  {name:{width}}  {_size(path.stat().st_size):>9}".rstrip() for name, path in zip(names, paths)]
    return "\n".join([f"{name or folder.name}/", *lines])


def _size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return ""  # also the card itself, which names the tree
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.1f} MB"


def _check_model(model):
    """ValueError for what has no card."""
    if isinstance(model, HiViTBackbone):
        raise ValueError(
            "A HiViTBackbone has no card: export the model that it was made from, a HiViTModel for example."
        )
    if not isinstance(model, HiViTPreTrainedModel) or type(model).__name__ not in AUTO_MODELS.values():
        raise ValueError(f"export writes HiViT models, got a {type(model).__name__}. Unwrap or merge it first.")


def _about(
    model: HiViTPreTrainedModel,
    about: Checkpoint | None,
    out_dir: Path,
    conversion_report: dict | None,
    push_to_hub: bool,
) -> Checkpoint:
    model_class = type(model).__name__
    if about is None:
        about = undescribed(model, out_dir.resolve().name)
    if about.model_class != model_class:
        raise ValueError(f"The card is of a {about.model_class}, but the model is a {model_class}.")
    if about.arguments:
        other = differences(model_class, model.config, HiViTConfig(**about.arguments))
        if other:
            raise ValueError(
                f"The card is of {about.title}, but the model is another network, as it differs in {', '.join(other)}: "
                "describe it yourself."
            )
    if about.weights == "original" and conversion_report is None:
        raise ValueError(
            f"The card of {about.title} is of converted weights, but there is no conversion report that proves them: "
            "convert the checkpoint with conversion/convert.py, or describe the model yourself."
        )
    if conversion_report is not None:
        _check_report(conversion_report)
    if push_to_hub and about.repo_id.count("/") != 1:
        raise ValueError(f"To upload, the repository id must be OWNER/NAME, got {about.repo_id!r}.")
    return about


def _check_report(report: dict):
    """ValueError for what is no report of `conversion/convert.py`."""
    try:
        known = all(isinstance(report[part][name], kind) for part, name, kind in REPORTED)
    except (KeyError, TypeError, IndexError):
        known = False
    if not known:
        raise ValueError("The conversion report is not one of conversion/convert.py: convert again, or leave it out.")


def _read_samples(samples: Sequence[Path]) -> dict[str, tuple[Path, Image.Image]]:
    """Name -> file and image. ValueError for what is no image, or too many."""
    if len(samples) > MAX_SAMPLES:
        raise ValueError(f"A card shows at most {MAX_SAMPLES} samples, got {len(samples)}.")
    images = {}
    for path in samples:
        if path.suffix.lower() not in SAMPLE_SUFFIXES:
            raise ValueError(f"Samples are {', '.join(SAMPLE_SUFFIXES)} files, got {path}.")
        name = path.stem + path.suffix.lower()
        if name in images:
            raise ValueError(f"Two samples are named {name}: rename one.")
        try:
            images[name] = path, read_image(path.read_bytes())
        except (RequestError, OSError) as error:
            raise ValueError(f"The sample {path} cannot be read: {error}") from error
    return images


def _save_model(model: HiViTPreTrainedModel, folder: Path):
    """Weights and configuration; that of the model stays without what is only for the folder."""
    own = vars(model.config).get("auto_map")
    model.save_pretrained(folder)
    vars(model.config).pop("auto_map", None)
    if own is not None:
        model.config.auto_map = own


def _write_code(folder: Path):
    """What a Hub folder needs to run without the package."""
    for name in (*CODE_FILES, "LICENSE"):
        shutil.copy(PACKAGE / name, folder)
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")


def _onnx_files(model: HiViTPreTrainedModel) -> dict[str, str]:
    """The files in `onnx/` and the task of each: a classifier's `model.onnx` has its scores, others' the features."""
    names = {"reconstruction": "reconstruction.onnx"}
    return {names.get(task, "model.onnx"): task for task in reversed(tasks_of(model))}


@torch.no_grad()
def _run_samples(
    model: HiViTPreTrainedModel,
    processor: BaseImageProcessor,
    images: dict[str, tuple[Path, Image.Image]],
    folder: Path,
) -> Folder:
    """Copies the samples, and runs the model on them as a user would."""
    if not images:
        return Folder()
    (folder / "samples").mkdir()
    for name, (path, _) in images.items():
        shutil.copyfile(path, folder / "samples" / name)
    if isinstance(model, HiViTForImageClassification):
        classify = pipeline("image-classification", model=model, image_processor=processor)
        samples = []
        for name in images:  # the files, as a user would: the pipeline reads transparent and 16-bit ones in its own way
            answers = classify(str(folder / "samples" / name), top_k=3)
            output = [{**answer, "score": round(answer["score"], 4)} for answer in answers]
            title = Path(name).stem.replace("_", " ")
            samples.append({"src": f"samples/{name}", "example_title": title, "output": output})
        return Folder(samples=samples)
    if not isinstance(model, HiViTForMaskedImageModeling):
        return Folder()
    paths, generator = [], torch.Generator().manual_seed(0)
    for name, (_, image) in images.items():
        pixel_values = processor(image, return_tensors="pt").pixel_values.to(model.device)
        units = model.config.grid_size[0] * model.config.grid_size[1]
        noise = torch.rand(1, units, generator=generator).to(model.device)
        mask = model.draw_mask(pixel_values, noise)
        reconstruction = model.reconstruct(pixel_values, bool_masked_pos=mask)
        seen = pixels_to_image(pixel_values[0], processor)
        masked = masked_image(seen, mask[0], model.config.grid_size)
        row = [seen, masked, pixels_to_image(reconstruction[0], processor)]
        paths.append(_unused(f"samples/{Path(name).stem}_reconstructed", folder))
        side_by_side([enlarged(part, SHOWN_PX) for part in row]).save(folder / paths[-1])
    return Folder(reconstructions=paths)


def _unused(stem: str, folder: Path) -> str:
    """A PNG file's name that no sample has."""
    names = (f"{stem}{number}.png" for number in ("", *(f"_{n}" for n in range(2, 3 + 2 * MAX_SAMPLES))))
    return next(name for name in names if not (folder / name).exists())
