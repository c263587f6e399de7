# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Export to ONNX, checked against PyTorch in onnxruntime; int8 quantization. Needs the extra `onnx`."""

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..modeling_hivit import HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTPreTrainedModel


if TYPE_CHECKING:
    from ..data.datasets import ImageDataset
OPSET = 23  # the newest that both onnxruntime and onnxruntime-web run everywhere
OPSETS = range(18, 26)  # what torch.onnx writes
TOLERANCE = 1e-4
OUTPUTS = {
    "classification": ["logits"],
    "features": ["last_hidden_state", "pooler_output"],
    "reconstruction": ["reconstruction", "bool_masked_pos"],
}


class _Task(nn.Module):
    """A model that returns the `OUTPUTS` of a task; features without what the model does not have of them."""

    def __init__(self, model: HiViTPreTrainedModel, task: str):
        super().__init__()
        self.model, self.task = model.base_model if task == "features" else model, task

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        if self.task == "reconstruction":
            mask = self.model.draw_mask(pixel_values, noise)
            return self.model.reconstruct(pixel_values, noise=noise), mask
        output = self.model(pixel_values)
        return tuple(output[name] for name in OUTPUTS[self.task] if name in output)


def tasks_of(model: HiViTPreTrainedModel) -> list[str]:
    """Tasks that a model can be exported for: features always, and that of its head."""
    if isinstance(model, HiViTForImageClassification):
        return ["classification", "features"]
    return ["reconstruction", "features"] if isinstance(model, HiViTForMaskedImageModeling) else ["features"]


def export_onnx(
    model: HiViTPreTrainedModel, path: Path, task: str, dynamic_size: bool = False, opset: int = OPSET
) -> float:
    """
    Writes one ONNX file, weights included, for any batch size, and compares its outputs in onnxruntime with PyTorch's.

    Inputs and outputs:
        classification: `pixel_values` (B, 3, H, W) -> `logits` (B, num_labels).
        features: `pixel_values` -> `last_hidden_state` (B, N, C), and `pooler_output` (B, C) if the model pools.
        reconstruction: `pixel_values`, `noise` (B, N) -> `reconstruction` (B, 3, H, W) as of
            `HiViTForMaskedImageModeling.reconstruct`, and `bool_masked_pos` (B, N). The units with the smallest noise
            stay visible; how many, is settled by `config.mask_ratio` at the time of the export.

    Args:
        path: the file to write.
        task: `classification`, `features` or `reconstruction`.
        dynamic_size: whether height and width may be any multiples of `patch_size`, from two units on; otherwise they
            are `image_size`.
        opset: version of ONNX's operators.

    Returns:
        The largest absolute difference from PyTorch, at most `TOLERANCE`.

    Raises:
        ValueError: if the model cannot do this, a package is missing, or onnxruntime differs by more than `TOLERANCE`;
            no file is left then.
    """
    check_exportable(model, task, dynamic_size, opset)
    import onnx

    with _exportable(model):
        wrapper = _Task(model, task).eval()
        # of a size that is not compared later, and traced only: its numbers are never computed
        inputs = _example(model, task, batch_size=3, grid=(3, 5) if dynamic_size else model.config.grid_size)
        shapes = {name: {0: torch.export.Dim("batch")} for name in inputs}
        if dynamic_size:
            patch_size = model.config.patch_size
            shapes["pixel_values"] |= {
                axis: patch_size * torch.export.Dim(name, min=2, max=1024) for axis, name in [(2, "rows"), (3, "cols")]
            }
        # exported apart: torch.onnx.export would fall back to a fixed batch size without a word
        program = torch.export.export(wrapper, (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
        outputs = OUTPUTS[task][: len(program.graph_signature.user_outputs)]
        exported = torch.onnx.export(
            program,
            (),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=outputs,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        onnx_model = exported.model_proto
        del onnx_model.graph.value_info[:]  # names of inner dimensions, some of which are wrong for other sizes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        onnx.save(onnx_model, path)
        difference = largest_difference(model, path, task, dynamic_size)
    if not difference <= TOLERANCE:
        Path(path).unlink()
        raise ValueError(f"onnxruntime differs from PyTorch by {difference:.1e} in {task}, more than {TOLERANCE:g}.")
    return difference


def check_exportable(model: HiViTPreTrainedModel, task: str, dynamic_size: bool = False, opset: int = OPSET):
    """ValueError if `export_onnx` would refuse these arguments."""
    if task not in tasks_of(model):
        raise ValueError(f"A {type(model).__name__} cannot be exported for {task!r}: it does {tasks_of(model)}.")
    if dynamic_size and task == "reconstruction":
        raise ValueError("A reconstruction has a fixed size, as the number of visible units follows from it.")
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}. Leave it out.")
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install 'hivit-hf[onnx]'.")
    if {(parameter.dtype, parameter.device.type) for parameter in model.parameters()} != {(torch.float32, "cpu")}:
        raise ValueError("ONNX files are made of float32 models on the CPU: call model.float().cpu() first.")


@torch.no_grad()
def largest_difference(model: HiViTPreTrainedModel, path: Path, task: str, dynamic_size: bool = False) -> float:
    """The largest absolute difference between onnxruntime on a file and PyTorch, over several batches and sizes."""
    session = cpu_session(path)
    wrapper, own = _Task(model, task).eval(), model.config.grid_size
    grids = [own, (2, 3), (own[0] + 3, own[1] + 1)] if dynamic_size else [own]
    largest = 0.0
    for batch_size in (1, 2):
        for grid in grids:
            inputs = _example(model, task, batch_size, grid)
            found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            for ours, theirs in zip(wrapper(**inputs), found):
                largest = max(largest, (ours.double() - torch.from_numpy(theirs).double()).abs().max().item())
    return largest


def cpu_session(path: Path):
    """An `onnxruntime.InferenceSession` on the CPU, quiet."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantize(path: Path, out_path: Path):
    """Writes the file with its matrices as 8-bit integers, scaled while it runs (dynamic quantization)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(path, out_path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def labeled_images(path: Path, model: HiViTForImageClassification, processor: BaseImageProcessor) -> "ImageDataset":
    """
    Images with their class ids, decoded when they are accessed.

    Args:
        path: a folder with a folder of images for each class, or a dataset saved with `save_to_disk`; classes have the
            names of the model's.

    Raises:
        ValueError: if there are none, their classes are not those of the model, or packages are missing.
    """
    try:
        from ..classification.evaluation import targets_for
        from ..data.datasets import ImageDataset, image_column, open_splits
    except ImportError as error:
        raise ValueError(f"Labeled images need {error.name}: pip install 'hivit-hf[train]'.") from error
    try:
        dataset = open_splits(str(path))["train"]
        column, targets = image_column(dataset), targets_for(model, dataset, "train")
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} holds no labeled images of the model's classes: give a folder with a folder of images for each "
            f"class, or a dataset saved with `save_to_disk`. {error}"
        ) from error
    transform = lambda image: processor(image, return_tensors="pt").pixel_values[0]  # noqa: E731
    return ImageDataset(dataset, column, transform, targets, model.config.num_channels, name=str(path))


def int8_cost(path: Path, quantized_path: Path, images: "ImageDataset", batch_size: int = 32) -> dict[str, float | int]:
    """
    Quantizes a classifier, and measures the accuracy of both on labeled images, a batch at a time.

    Raises:
        ValueError: if an image cannot be read; says which.
    """
    quantize(path, quantized_path)
    hits = dict.fromkeys(("float32", "int8"), 0)
    sessions = {"float32": cpu_session(path), "int8": cpu_session(quantized_path)}
    for batch in tqdm(DataLoader(images, batch_size), desc="accuracy", unit="batch", disable=None):
        for name, session in sessions.items():
            logits = session.run(["logits"], {"pixel_values": batch["pixel_values"].numpy()})[0]
            hits[name] += int((logits.argmax(axis=1) == batch["labels"].numpy()).sum())
    accuracy = {f"accuracy_{name}": count / len(images) for name, count in hits.items()}
    drop = accuracy["accuracy_float32"] - accuracy["accuracy_int8"]
    return {"images": len(images), **accuracy, "drop": drop}


def _example(model: HiViTPreTrainedModel, task: str, batch_size: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    generator, size = torch.Generator().manual_seed(0), [length * model.config.patch_size for length in grid]
    inputs = {"pixel_values": torch.randn(batch_size, model.config.num_channels, *size, generator=generator)}
    if task == "reconstruction":
        inputs["noise"] = torch.rand(batch_size, grid[0] * grid[1], generator=generator)
    return inputs


@contextlib.contextmanager
def _exportable(model: HiViTPreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode with attention written out, and afterwards as it was."""
    training, attention, collecting = model.training, model.config._attn_implementation, gc.isenabled()
    model.eval().set_attn_implementation("eager")
    gc.disable()  # it would search what tracing makes, again and again, for a fifth of the time, and find it in use
    try:
        with torch.no_grad(), _quiet():
            yield
    finally:
        if collecting:
            gc.enable()
        model.set_attn_implementation(attention)
        model.train(training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
