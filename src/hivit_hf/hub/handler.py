# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Inference Endpoint for HiViT. The endpoint toolkit makes an `EndpointHandler` and calls it once per request.

    request   {"inputs": IMAGE, "parameters": {"top_k": 5}}      or a list of images
    answer    [{"label": "tabby", "score": 0.97}, ...]             for classifiers, one such list per image of a list
              {"features": [...]}                                   for encoders: features averaged over the image
              {"error": "what is wrong and how to fix it"}          for what cannot be answered

An IMAGE is a `PIL.Image` (what the toolkit makes of an image body), bytes, or base64, also as a data: URI. Addresses
are never fetched. This file travels to the Hub with `image_reading.py`: it imports nothing else of the package.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig


try:
    from ..image_reading import FormatError, LevelsError, check_format, open_file, read_processor, to_eight_bits
except ImportError:  # on the Hub, where the files lie side by side
    from image_reading import FormatError, LevelsError, check_format, open_file, read_processor, to_eight_bits


MAX_MEGAPIXELS = 64
MAX_SIDE_RATIO = 100  # an image of 100,000x1 px would be resized to one of 256 x 25,600,000
MAX_IMAGES = 32
MAX_REQUEST_MEGAPIXELS = 256  # of all images of a request together


class RequestError(ValueError):
    """A request that cannot be answered: what is wrong, and how to fix it."""


def read_image(source: Image.Image | bytes | str) -> Image.Image:
    """
    An RGB image, upright; the first frame of an animation; what is transparent becomes white.

    Args:
        source: an image, the bytes of an image file, or those in base64, also as a data: URI.

    Raises:
        RequestError: if it is no image, too large, or too long and thin.
    """
    if isinstance(source, str):
        source = _decode_base64(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise RequestError("The image is empty: send the bytes of a PNG, JPEG, GIF or WebP file.")
        try:
            source = open_file(source)
        except Exception as error:  # decoders raise whatever they stumble over
            if isinstance(error, Image.DecompressionBombError):
                raise RequestError(_too_large("more than 170")) from error
            raise RequestError("This is not an image that can be read: send a PNG, JPEG, GIF or WebP file.") from error
    if not isinstance(source, Image.Image):
        raise RequestError(f"An image must be an image, bytes or base64 text, got a {type(source).__name__}.")
    try:
        check_format(source)  # the toolkit opens the body of a request itself
    except FormatError as error:
        raise RequestError(f"This image is not read, as {error}: send a PNG, JPEG, GIF or WebP file.") from error
    _check_size(source.width, source.height)
    try:
        source.seek(0)
        return _to_rgb(ImageOps.exif_transpose(source))
    except LevelsError as error:
        raise RequestError(f"The image has no known white, as {error}: save it with 8 or 16 bits.") from error
    except Exception as error:
        raise RequestError("The image is damaged, its pixels cannot be read: send it again, or another.") from error


def _decode_base64(text: str) -> bytes:
    if re.match(r"\s*(https?|ftp|file)://", text, flags=re.IGNORECASE):
        raise RequestError("Addresses are not fetched: send the image itself, as bytes or in base64.")
    text = re.sub(r"^\s*data:[\w/+.;=-]*,", "", text)
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("The text is not base64: send the bytes of an image file in base64.") from error


def _check_size(width: int, height: int):
    if not width or not height:
        raise RequestError(f"The image has no pixels: it is {width}x{height} px.")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise RequestError(_too_large(f"{width}x{height} px are {width * height / 1e6:.0f}"))
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise RequestError(
            f"The image is too long and thin: {width}x{height} px, where one side may be {MAX_SIDE_RATIO} times the "
            "other; crop it."
        )


def _too_large(what: str) -> str:
    return f"The image is too large: {what} megapixels, at most {MAX_MEGAPIXELS} are read; send a smaller one."


def _to_rgb(image: Image.Image) -> Image.Image:
    image = to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def class_scores(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    Scores of the classes as in transformers' pipeline: sigmoid for multi-label classification, the bare numbers for
    regression, softmax otherwise.

    Args:
        logits: (batch, num_labels).

    Returns:
        (batch, num_labels), float32.
    """
    logits = logits.float()
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(dim=1)


class EndpointHandler:
    """
    Loads a model once, and answers requests with it.

    Args:
        path: folder of the model, with its code and image processor.
    """

    def __init__(self, path: str = ""):
        config = json.loads((Path(path) / "config.json").read_text())
        self.classifies = "HiViTForImageClassification" in (config.get("architectures") or [])
        if self.classifies:
            self.model = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
        else:
            self.model = AutoModel.from_pretrained(path, trust_remote_code=True, add_pooling_layer=False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = self.model.to(self.device).eval()
        self.processor = read_processor(path)

    def __call__(self, data: dict[str, Any]) -> list | dict:
        """The answer to a request, always of types that JSON knows. Never raises."""
        try:
            sources, is_batch, top_k = self._read_request(data)
            answers = self._answer(self._read_pixels(sources), top_k)
        except RequestError as error:
            return {"error": str(error)}
        except Exception as error:  # a request must not end the endpoint, whatever was overlooked
            return {"error": f"The request could not be answered ({type(error).__name__}): please report it."}
        return answers if is_batch else answers[0]

    def _read_request(self, data: Any) -> tuple[list, bool, int | None]:
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise RequestError('The request must be a JSON object with the image under "inputs".')
        unknown = sorted(str(name) for name in set(data) - {"inputs", "parameters"})
        if unknown:
            raise RequestError(f'The request knows "inputs" and "parameters", got {", ".join(unknown)[:80]}.')
        inputs, parameters = data["inputs"], data.get("parameters")
        is_batch = isinstance(inputs, (list, tuple))
        if is_batch and not 1 <= len(inputs) <= MAX_IMAGES:
            raise RequestError(f"A request holds 1 to {MAX_IMAGES} images, got {len(inputs)}.")
        top_k = self._read_top_k({} if parameters is None else parameters)
        return list(inputs) if is_batch else [inputs], is_batch, top_k

    def _read_pixels(self, sources: list) -> torch.Tensor:
        """Pixels (B, 3, H, W) of the images, read one by one: only one is held in its full size."""
        pixels, megapixels = [], 0.0
        for source in sources:
            image = read_image(source)
            megapixels += image.width * image.height / 1e6
            if megapixels > MAX_REQUEST_MEGAPIXELS:
                raise RequestError(
                    f"The request is too large: its images have more than {MAX_REQUEST_MEGAPIXELS} megapixels in "
                    "all; send fewer at once, or smaller ones."
                )
            pixels.append(self.processor(image, return_tensors="pt").pixel_values)
        return torch.cat(pixels)

    def _read_top_k(self, parameters: Any) -> int | None:
        if not isinstance(parameters, dict):
            raise RequestError(f'"parameters" must be an object, got a {type(parameters).__name__}.')
        unknown = sorted(str(name) for name in set(parameters) - {"top_k"})
        if unknown:
            raise RequestError(f"The only parameter is top_k, got {', '.join(unknown)[:80]}.")
        if not self.classifies:
            if parameters:
                raise RequestError("top_k is for classifiers, and this model gives features: leave it out.")
            return None
        top_k, num_labels = parameters.get("top_k"), self.model.config.num_labels
        if top_k is None:
            return min(5, num_labels)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise RequestError(f"top_k must be a whole number of at least 1, got {str(top_k)[:40]!r}.")
        return min(top_k, num_labels)

    @torch.inference_mode()
    def _answer(self, pixel_values: torch.Tensor, top_k: int | None) -> list:
        output = self.model(pixel_values.to(self.device))
        if not self.classifies:
            return [{"features": row.tolist()} for row in output.last_hidden_state.mean(dim=1).float()]
        scores, labels = class_scores(output.logits, self.model.config).topk(top_k)
        names = self.model.config.id2label
        return [
            [{"label": names[label], "score": score} for label, score in zip(*row)]
            for row in zip(labels.tolist(), scores.tolist())
        ]
