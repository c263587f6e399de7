# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Monitoring of pre-training: validation loss, kNN accuracy and reconstructions of validation images."""

from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torchvision.utils import make_grid
from transformers.utils import logging

from ..data.transforms import denormalize
from ..modeling_hivit import HiViTForMaskedImageModeling
from ..training.figures import INK, figure_to_png, new_figure
from ..training.neighbors import nearest_neighbor_accuracy
from .arguments import PretrainingDataArguments
from .data import ValidationImages, to_device


logger = logging.get_logger(__name__)
NUM_RECONSTRUCTIONS = 8


class Monitor:
    """
    Evaluates validation images, always with the same masks.

    Args:
        model: the bare one, which shares its weights with the one that is trained.
        accelerator: decides device and precision, and has the trackers.
        data_args: mean and standard deviation of the pixels.
        folder: where images are written.
    """

    def __init__(
        self,
        validation: ValidationImages,
        model: HiViTForMaskedImageModeling,
        accelerator: Accelerator,
        data_args: PretrainingDataArguments,
        batch_size: int,
        folder: Path,
    ):
        self.validation, self.model, self.accelerator = validation, model, accelerator
        self.data_args, self.batch_size, self.folder = data_args, batch_size, folder

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """`eval_loss`, and `eval_knn_accuracy` if there are labels; draws reconstructions."""
        images, labels, model = self.validation.images, self.validation.labels, self.model
        units = model.config.grid_size[0] * model.config.grid_size[1]
        noise = torch.rand(len(images), units, generator=torch.Generator().manual_seed(0))
        losses, features = [], []
        model.eval()
        for pixels, numbers in zip(images.split(self.batch_size), noise.split(self.batch_size)):
            batch = self._to_device(pixels, numbers)
            with self.accelerator.autocast():
                losses.append(model(**batch).loss.item() * len(pixels))
                if labels is not None:
                    features.append(model.hivit(batch["pixel_values"]).last_hidden_state.mean(dim=1))
        few = self._to_device(images[:NUM_RECONSTRUCTIONS], noise[:NUM_RECONSTRUCTIONS])
        with self.accelerator.autocast():
            mask = model.draw_mask(few["pixel_values"], few["noise"])
            restored = model.reconstruct(few["pixel_values"], mask).float().cpu()
        model.train()
        if self.accelerator.is_main_process:
            self._draw(step, mask.cpu(), restored)
        metrics = {"eval_loss": sum(losses) / len(images)}
        if labels is not None:
            half = len(labels) // 2  # whose labels are known; those of the others are predicted
            known, unknown = torch.cat(features).tensor_split([half])
            metrics["eval_knn_accuracy"] = nearest_neighbor_accuracy(known, labels[:half], unknown, labels[half:])
        return metrics

    def _to_device(self, pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        return to_device({"pixel_values": pixels, "noise": noise}, self.accelerator.device, self.data_args)

    def _draw(self, step: int, mask: torch.BoolTensor, restored: torch.Tensor):
        originals = self.validation.images[:NUM_RECONSTRUCTIONS].float() / 255
        restored = denormalize(restored, self.data_args.image_mean, self.data_args.image_std)
        originals, restored = (p.expand(-1, 3, -1, -1) if p.shape[1] == 1 else p[:, :3] for p in (originals, restored))
        figure = reconstruction_grid(originals, mask, restored, self.model.config.patch_size)
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"reconstructions-{step:08d}.png").write_bytes(figure_to_png(figure))
            rows = torch.cat([originals, restored]).clamp(0, 1).permute(0, 2, 3, 1).numpy()
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"reconstructions": rows}, step, **options)
        except OSError as error:
            logger.error(f"The reconstructions of step {step} could not be written ({error.strerror}).")


def reconstruction_grid(
    originals: torch.Tensor, bool_masked_pos: torch.BoolTensor, reconstructions: torch.Tensor, patch_size: int
) -> Figure:
    """
    Three rows of images: the originals, the same with masked patches in gray, and the reconstructions.

    Args:
        originals: (B, 3, H, W), values in [0, 1].
        bool_masked_pos: (B, N), True = masked.
        reconstructions: (B, 3, H, W), values are clipped to [0, 1].
        patch_size: side of a unit in px.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
        raise ValueError(
            "originals and reconstructions must both have the shape (B, 3, H, W), got "
            f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}."
        )
    batch, _, height, width = originals.shape
    grid = height // patch_size, width // patch_size
    if tuple(bool_masked_pos.shape) != (batch, grid[0] * grid[1]):
        raise ValueError(
            f"bool_masked_pos must have the shape {(batch, grid[0] * grid[1])} for units of {patch_size} px, got "
            f"{tuple(bool_masked_pos.shape)}."
        )
    masked_pixels = bool_masked_pos.unflatten(1, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    masked = torch.where(masked_pixels[:, None], torch.tensor(0.55), originals)
    rows = {"original": originals, "masked": masked, "reconstructed": reconstructions}
    images, padding = torch.cat(list(rows.values())).clamp(0, 1).cpu(), max(2, width // 16)
    figure = new_figure(width=0.86 * batch + 1.1, height=0.86 * 3)
    axes = figure.add_subplot()
    axes.imshow(make_grid(images, batch, padding, pad_value=1.0).permute(1, 2, 0).numpy(), interpolation="nearest")
    middles = [padding + height / 2 + row * (height + padding) for row in range(len(rows))]
    axes.set_yticks(middles, list(rows), fontsize=10, color=INK)
    axes.set(xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
