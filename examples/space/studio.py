"""The models of the Space, without its page: classification, masked reconstruction, features as colors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from hivit_hf import HiViTBackbone, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.hub.handler import RequestError, class_scores, read_image
from hivit_hf.hub.repository import load_model
from hivit_hf.hub.visualization import enlarged, feature_image, masked_image, pixels_to_image
from hivit_hf.image_processing import load_processor


STAGES = ("stage1", "stage2", "stage3")
SHOWN_PX = 448


@dataclass(frozen=True)
class Source:
    """
    Where a model comes from.

    Args:
        name: a folder, or a repository of the Hub.
        revision: commit, tag or branch of the repository; its main branch if empty.

    Raises:
        ValueError: for a revision of a folder.
    """

    name: str | Path
    revision: str | None = None

    def __post_init__(self):
        if self.revision and Path(self.name).is_dir():
            raise ValueError(f"{self.name} is a folder, which has no revision {self.revision!r}: leave that out.")

    @property
    def may_change(self) -> bool:
        """Whether the model may change there."""
        return not self.revision and not Path(self.name).is_dir()

    def load(self, model_class: type, **arguments):
        """The model in evaluation mode, and its processor. ValueError if it cannot be loaded, or lacks weights."""
        revision = self.revision or None
        model = load_model(model_class, self.name, revision=revision, **arguments).eval()
        return model, load_processor(self.name, model.config, revision)


class Studio:
    """
    The models of the Space.

    Args:
        classifier, autoencoder: sources of the models.

    Raises:
        ValueError: if one cannot be loaded, or lacks weights.
    """

    def __init__(self, classifier: Source, autoencoder: Source):
        self.may_change = [str(source.name) for source in (classifier, autoencoder) if source.may_change]
        self.classifier, self.classifier_processor = classifier.load(HiViTForImageClassification)
        self.autoencoder, self.autoencoder_processor = autoencoder.load(HiViTForMaskedImageModeling)
        self.backbone, _ = autoencoder.load(HiViTBackbone, out_features=list(STAGES))
        self.grid = self.autoencoder.config.grid_size
        self.mask_ratio = self.autoencoder.config.mask_ratio

    @torch.inference_mode()
    def classify(self, path: str | None) -> dict[str, float]:
        """Class -> probability, of all classes. RequestError for what is no image, here as below."""
        pixel_values = self.classifier_processor(_read(path), return_tensors="pt").pixel_values
        scores = class_scores(self.classifier(pixel_values).logits, self.classifier.config)[0].tolist()
        return {self.classifier.config.id2label[number]: score for number, score in enumerate(scores)}

    def draw_mask(self, ratio: float) -> list[bool]:
        """A random mask, True = masked, of this fraction of the units, rounded; at least one stays visible."""
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise RequestError(f"The mask ratio must be a number from 0 to 1, got {str(ratio)[:40]!r}.")
        units = self.grid[0] * self.grid[1]
        num_masked = min(round(units * ratio), units - 1)
        order = torch.rand(units).argsort()
        return (order.argsort() < num_masked).tolist()

    def toggle(self, mask: list[bool], column: float, row: float) -> list[bool]:
        """The mask with one unit toggled; `column` and `row` in [0, 1), as fractions of width and height."""
        for place in (column, row):
            if isinstance(place, bool) or not isinstance(place, (int, float)) or not abs(place) <= 2**31:
                raise RequestError(f"A click is at two numbers, column and row, got {str(place)[:40]!r}.")
        mask, (rows, columns) = list(self._checked(mask)), self.grid
        unit = min(max(int(row * rows), 0), rows - 1) * columns + min(max(int(column * columns), 0), columns - 1)
        mask[unit] = not mask[unit]
        if all(mask):
            raise RequestError("One patch must stay visible: unmask another before you mask this one.")
        return mask

    def toggle_at(self, mask: list[bool], pixel: list[float]) -> list[bool]:
        """As `toggle`, for a click at `pixel`, (x, y), of the images that `reconstruct` gives."""
        if not isinstance(pixel, (list, tuple)) or len(pixel) != 2:
            raise RequestError(f"A click is at two numbers, column and row, got {str(pixel)[:40]!r}.")
        sides = [length * self.autoencoder.config.patch_size for length in reversed(self.grid)]
        sides = [side * max(1, SHOWN_PX // sides[0]) for side in sides]
        small = [type(n) in (int, float) and abs(n) <= 2**31 for n in pixel]  # toggle refuses others
        return self.toggle(mask, *(n / side if ok else n for n, side, ok in zip(pixel, sides, small)))

    @torch.inference_mode()
    def reconstruct(self, path: str | None, mask: list[bool]) -> tuple[Image.Image, Image.Image]:
        """The image with its masked units gray, and with them reconstructed."""
        mask = torch.tensor(self._checked(mask))
        pixel_values = self.autoencoder_processor(_read(path), return_tensors="pt").pixel_values
        filled = self.autoencoder.reconstruct(pixel_values, bool_masked_pos=mask[None])
        seen, filled = (pixels_to_image(pixels[0], self.autoencoder_processor) for pixels in (pixel_values, filled))
        return enlarged(masked_image(seen, mask, self.grid), SHOWN_PX), enlarged(filled, SHOWN_PX)

    @torch.inference_mode()
    def features(self, path: str | None) -> list[Image.Image]:
        """The three stages of the encoder as colors, fine to coarse."""
        pixel_values = self.autoencoder_processor(_read(path), return_tensors="pt").pixel_values
        height, width = pixel_values.shape[2:]
        size = (SHOWN_PX, round(SHOWN_PX * height / width))
        return [feature_image(feature_map[0], size) for feature_map in self.backbone(pixel_values).feature_maps]

    def _checked(self, mask: list[bool]) -> list[bool]:
        units = self.grid[0] * self.grid[1]
        if not isinstance(mask, list) or len(mask) != units or not all(isinstance(unit, bool) for unit in mask):
            raise RequestError(f"A mask is a list of {units} booleans, one per patch.")
        if all(mask):
            raise RequestError("One patch must stay visible: unmask one.")
        return mask


def _read(path: str | None) -> Image.Image:
    if not path:
        raise RequestError("There is no image yet: drop one, or choose a sample.")
    try:
        content = Path(path).read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise RequestError("The image did not arrive: send it again.") from error
    return read_image(content)


def file_within(path: str | None, folder: str | Path) -> str | None:
    """
    The path of a file in the folder of uploads, where samples are too. No path comes back as it is.

    A request can name any path, and Gradio checks those alone that its own page sends.

    Raises:
        RequestError: for a file elsewhere, through links too, and for what is no plain file.
    """
    if not path:
        return path
    try:
        found = Path(path).resolve()
        if found.is_relative_to(Path(folder).resolve()) and found.is_file():
            return str(found)
    except (OSError, TypeError, ValueError, RuntimeError):  # no path at all, or a link to itself
        pass
    raise RequestError("The image is neither an upload nor a sample: upload it.")
