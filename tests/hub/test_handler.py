"""The Inference Endpoint, called as the endpoint toolkit calls it: one object, one dict per request, JSON back."""

import base64
import contextlib
import importlib.util
import io
import json

import numpy as np
import orjson
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, pipeline

from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.data.decoding import UnreadableImageError, upright
from hivit_hf.hub.handler import MAX_MEGAPIXELS, RequestError, read_image
from hivit_hf.hub.repository import export
from support.nonsense import (
    REFUSALS,
    animation,
    encoded,
    exotic_files,
    floats_with,
    is_one_sentence,
    no_process,
    noise,
    random_bytes,
    unreadable,
    unusual_images,
)


def toolkit(folder):
    """What the toolkit makes of a repository: it puts the folder on the path, and imports handler.py as `handler`."""
    spec = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_network):
    root = tmp_path_factory.mktemp("endpoint")
    export(tiny_network(HiViTForImageClassification), root / "classifier", onnx=False)
    export(tiny_network(HiViTForMaskedImageModeling), root / "autoencoder", onnx=False)
    return root


@pytest.fixture(scope="module")
def endpoint(folders):
    return toolkit(folders / "classifier")


def answer(endpoint, request):
    """The answer after its way through the toolkit's serializer."""
    return json.loads(orjson.dumps(endpoint(request), option=orjson.OPT_SERIALIZE_NUMPY))


def test_every_way_to_send_an_image(endpoint, folders):
    image = noise(80, 70)
    file = encoded(image)
    text = base64.b64encode(file).decode()
    folder = str(folders / "classifier")
    expected = pipeline(
        "image-classification",
        model=HiViTForImageClassification.from_pretrained(folder),
        image_processor=BitImageProcessor.from_pretrained(folder),
    )(image, top_k=5)
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for inputs in [image, file, bytearray(file), text, wrapped, f"data:image/png;base64,{text}"]:
        found = answer(endpoint, {"inputs": inputs})
        assert [guess["label"] for guess in found] == [guess["label"] for guess in expected]
        assert [guess["score"] for guess in found] == pytest.approx([guess["score"] for guess in expected], abs=1e-5)
    assert answer(endpoint, json.loads(json.dumps({"inputs": text, "parameters": {}}))) == found


@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "multi_label_classification"},
        {"num_labels": 1},
        {"problem_type": "regression"},
        {"problem_type": "single_label_classification"},
    ],
    ids=str,
)
def test_scores_are_the_pipelines(tiny_network, tmp_path, changes):
    folder, image = (
        export(tiny_network(HiViTForImageClassification, **changes), tmp_path / "m", onnx=False),
        noise(64, 64),
    )
    expected = pipeline(
        "image-classification",
        model=HiViTForImageClassification.from_pretrained(folder),
        image_processor=BitImageProcessor.from_pretrained(folder),
    )(image, top_k=5)
    found = answer(toolkit(folder), {"inputs": image})
    assert [guess["label"] for guess in found] == [guess["label"] for guess in expected]
    assert [guess["score"] for guess in found] == pytest.approx([guess["score"] for guess in expected], abs=1e-5)


def test_huge_requests_are_read_one_by_one_and_end(endpoint, monkeypatch):
    held = []
    read = endpoint.__call__.__func__.__globals__["read_image"]

    def counted(source):
        held.append(source)
        return read(source)

    monkeypatch.setitem(endpoint.__call__.__func__.__globals__, "read_image", counted)
    image = Image.new("1", (8000, 7000))
    found = answer(endpoint, {"inputs": [image] * 32})
    assert "more than 256 megapixels in all" in found["error"]
    assert len(held) == 5  # the others were never read


def test_top_k_and_batches(endpoint):
    images = [noise(64, 64), noise(70, 64)]
    assert len(answer(endpoint, {"inputs": images[0], "parameters": {"top_k": 2}})) == 2
    assert len(answer(endpoint, {"inputs": images[0], "parameters": {"top_k": 900}})) == 5  # that many classes
    both = answer(endpoint, {"inputs": images, "parameters": {"top_k": 1}})
    for found, image in zip(both, images):
        alone = answer(endpoint, {"inputs": image, "parameters": {"top_k": 1}})
        assert found[0]["label"] == alone[0]["label"]
        assert found[0]["score"] == pytest.approx(alone[0]["score"], abs=1e-5)


def test_an_encoder_gives_features(folders):
    endpoint = toolkit(folders / "autoencoder")
    image = noise(64, 64)
    pixel_values = BitImageProcessor.from_pretrained(folders / "autoencoder")(image, return_tensors="pt").pixel_values
    model = HiViTModel.from_pretrained(folders / "autoencoder", add_pooling_layer=False)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state.mean(dim=1)[0]
    found = answer(endpoint, {"inputs": image})["features"]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
    assert "top_k is for classifiers" in answer(endpoint, {"inputs": image, "parameters": {"top_k": 1}})["error"]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (None, '"inputs"'),
        ({}, '"inputs"'),
        ([], '"inputs"'),
        ("hello", '"inputs"'),
        ({"inputs": None}, '"inputs"'),
        ({"image": "x"}, '"inputs"'),
        ({"inputs": "", "parameters": {}}, "empty"),
        ({"inputs": []}, "1 to 32 images, got 0"),
        ({"inputs": [b""] * 33}, "1 to 32 images, got 33"),
        ({"inputs": b"x", "image": b"y"}, "got image"),
        ({"inputs": b"x", "parameters": [5]}, "must be an object"),
        ({"inputs": b"x", "parameters": {"topk": 5}}, "got topk"),
        ({"inputs": b"x", "parameters": {"top_k": 0}}, "at least 1"),
        ({"inputs": b"x", "parameters": {"top_k": True}}, "whole number"),
        ({"inputs": b"x", "parameters": {"top_k": "5"}}, "whole number"),
        ({"inputs": b"x", "parameters": {"top_k": 2.5}}, "whole number"),
    ],
)
def test_wrong_requests_are_answered_in_words(endpoint, request_, words):
    found = answer(endpoint, request_)
    assert list(found) == ["error"]
    assert words in found["error"] and is_one_sentence(found["error"])


@pytest.mark.parametrize("name", unreadable())
def test_what_is_no_image_is_answered_in_words(endpoint, name):
    found = answer(endpoint, {"inputs": unreadable()[name]})
    assert list(found) == ["error"]
    assert REFUSALS[name] in found["error"] and is_one_sentence(found["error"])


@pytest.mark.parametrize("name", unusual_images())
def test_unusual_images_are_classified(endpoint, name):
    assert len(answer(endpoint, {"inputs": unusual_images()[name]})) == 5


def test_what_an_image_becomes():
    assert read_image(animation()).getpixel((3, 3))[0] > 200  # the first frame, red
    assert read_image(unusual_images()["transparent"]).getpixel((3, 3)) == (255, 255, 255)
    upright = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert read_image(encoded(upright, "JPEG", exif=exif)).size == (10, 20)
    array = np.zeros((8000, 8001), np.uint8)
    with pytest.raises(RequestError, match=f"8001x8000 px are 64 megapixels, at most {MAX_MEGAPIXELS}"):
        read_image(Image.fromarray(array))


@pytest.mark.parametrize(
    ("mode", "level", "gray"),
    [("I;16", 40_000, 156), ("I;16", 65_535, 255), ("I;16", 100, 0), ("I;16B", 40_000, 156), ("I", 40_000, 156),
     ("F", 0.6, 153), ("F", 1.0, 255), ("F", 200.0, 200)],
)  # fmt: skip
def test_more_than_8_bits_are_scaled_here_as_in_training(mode, level, gray):
    image = Image.new(mode, (9, 9), level)
    assert read_image(image).getpixel((3, 3)) == (gray,) * 3
    assert upright(image, 3).getpixel((3, 3)) == (gray,) * 3
    assert upright(image, 1).getpixel((3, 3)) == gray


def test_levels_without_a_known_white_are_refused(tmp_path):
    for mode, level, words in [
        ("I", 70_000, "from 70000 to 70000, not from 0 to 65535"),
        ("I", -1, "from -1 to -1"),
        ("F", 300.0, "from 300 to 300, not from 0 to 255"),
    ]:
        with pytest.raises(RequestError, match=f"{words}.*: save it with 8 or 16 bits"):
            read_image(Image.new(mode, (9, 9), level))
        with pytest.raises(UnreadableImageError, match=f"^its values range {words}"):
            upright(Image.new(mode, (9, 9), level), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused_wherever_they_stand(value):
    words = r"are no numbers \(NaN\)" if np.isnan(value) else "its values range from"
    for file in floats_with(value):
        with pytest.raises(RequestError, match=f"{words}.*: save it with 8 or 16 bits") as caught:
            read_image(file)
        assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize("name", exotic_files())
def test_other_formats_are_refused_and_start_no_program(endpoint, name, monkeypatch):
    """As bytes, and as the image that the toolkit opened itself."""
    started, file = no_process(monkeypatch), exotic_files()[name]
    inputs = [file, base64.b64encode(file).decode()]
    with contextlib.suppress(Exception):  # not all are whole
        inputs.append(Image.open(io.BytesIO(file)))
    for sent in inputs:
        found = answer(endpoint, {"inputs": sent})
        assert is_one_sentence(found["error"]) and "send a PNG, JPEG, GIF or WebP file" in found["error"]
    assert not started


def test_the_transparent_level_of_16_bits_is_scaled_too():
    image = Image.fromarray(np.array([[40_000, 1000]], np.uint16))
    found = read_image(encoded(image, transparency=40_000))
    assert [found.getpixel((column, 0))[0] for column in (0, 1)] == [255, 4]


@pytest.mark.slow
def test_a_thousand_requests_of_nonsense(endpoint):
    """Answered in words, all of them, and the endpoint still classifies as before."""
    image = encoded(noise(64, 64))
    before = answer(endpoint, {"inputs": image})
    odd = [value for name, value in unreadable().items() if name != "100 megapixels"]
    for number in range(1000):
        inputs = odd[number % 40] if number % 40 < len(odd) else random_bytes(number)
        if number == 500:
            inputs = unreadable()["100 megapixels"]
        request = [{"inputs": inputs}, {"inputs": [image, inputs]}, {"inputs": io.BytesIO(b"x")}][number % 3]
        found = answer(endpoint, request)
        assert list(found) == ["error"], (number, found)
        assert "report it" not in found["error"] and is_one_sentence(found["error"]), (number, inputs, found)
    assert answer(endpoint, {"inputs": image}) == before


def test_an_oversight_does_not_end_the_endpoint(endpoint, monkeypatch):
    def broken(*arguments, **keywords):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(endpoint, "processor", broken)
    assert "RuntimeError" in answer(endpoint, {"inputs": noise(64, 64)})["error"]
