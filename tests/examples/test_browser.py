"""The page of examples/browser in a real browser, held against PyTorch."""

import base64
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor

from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.hub.handler import read_image
from hivit_hf.hub.onnx import export_onnx
from hivit_hf.hub.repository import export
from support.chromium import BROWSER_EXAMPLE, browser, serve
from support.nonsense import animation, encoded, hundred_megapixels, noise
from support.patience import PATIENCE_S


pytestmark = pytest.mark.slow
PROCESSORS = {
    "crop": BitImageProcessor(
        size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}, resample=3, image_mean=[0.4, 0.5, 0.6]
    ),
    "squeeze": BitImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, resample=2),
}


def expected_pixels(processor, image):
    """What the processor's numbers say, with Pillow: (3, H, W)."""
    size = processor.size
    if size.height:
        image = image.resize((size.width, size.height), Image.Resampling(processor.resample))
    else:
        short = min(image.size)
        wide = tuple(int(size.shortest_edge * side / short) for side in image.size)
        image = image.resize(wide, Image.Resampling(processor.resample))
        left, top = ((side - 64) // 2 for side in image.size)
        image = image.crop((left, top, left + 64, top + 64))
    levels = np.asarray(image, np.float64).transpose(2, 0, 1) * processor.rescale_factor
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return torch.from_numpy((levels - mean) / std).float()


@pytest.fixture(scope="module")
def models(tiny_network):
    names = dict(enumerate(["tench", "goldfish", "great white shark"]))
    return {
        "classifier": tiny_network(HiViTForImageClassification, id2label=names),
        "autoencoder": tiny_network(HiViTForMaskedImageModeling),
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory, models):
    """The page with two models, which see images through different processors."""
    root = tmp_path_factory.mktemp("site")
    for path in BROWSER_EXAMPLE.glob("*.*"):
        if path.suffix in (".html", ".js", ".css"):
            shutil.copy(path, root)
    (root / "node_modules").symlink_to(BROWSER_EXAMPLE / "node_modules")
    for name, task, processor in [
        ("classifier", "classification", "crop"),
        ("autoencoder", "reconstruction", "squeeze"),
    ]:
        export_onnx(models[name], root / "models" / name / f"{task}.onnx", task)
        models[name].config.save_pretrained(root / "models" / name)
        PROCESSORS[processor].save_pretrained(root / "models" / name)
    return root


def link_page(site, folder):
    """The page without its models, in another folder."""
    for path in site.iterdir():
        if path.name != "models":
            (folder / path.name).symlink_to(path)


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture
def page(chromium, site):
    """The page, ready; an error in it fails the test, and so does a request to anywhere else."""
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    with serve(site) as address:
        own = (address, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or errors.append(request.url))
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        yield page
        page.close()
    assert errors == []


def drop(page, content, name="image.png"):
    """Drops a file onto the page, as a mouse does, and waits for what it says."""
    data = page.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name));
            return data;
        }""",
        [base64.b64encode(content).decode(), name],
    )
    page.dispatch_event("#zone", "drop", {"dataTransfer": data})
    page.wait_for_function("document.getElementById('status').textContent !== 'Looking …'", timeout=1000 * PATIENCE_S)


def shown(page, kind, field):
    """Numbers of what the page has computed last."""
    return torch.tensor(page.evaluate(f"Array.from(window.hivit.current().{kind}.{field}, Number)"))


@pytest.mark.parametrize("size", [(64, 64), (200, 90), (31, 170), (9, 9)], ids=str)
def test_pixels_and_numbers_are_pytorchs(page, models, size):
    image = noise(*size)
    drop(page, encoded(image))
    assert page.inner_text("#status") == ""
    pixels = expected_pixels(PROCESSORS["crop"], image)
    torch.testing.assert_close(shown(page, "classified", "pixelValues").view(3, 64, 64), pixels, atol=1e-5, rtol=0)
    with torch.no_grad():
        logits = models["classifier"](pixels[None]).logits[0]
    torch.testing.assert_close(shown(page, "classified", "logits"), logits, atol=1e-3, rtol=0)

    pixels = expected_pixels(PROCESSORS["squeeze"], image)[None]
    torch.testing.assert_close(shown(page, "reconstructed", "pixelValues").view_as(pixels), pixels, atol=1e-5, rtol=0)
    random = shown(page, "reconstructed", "noise")[None]
    mask = models["autoencoder"].draw_mask(pixels, random)
    assert torch.equal(shown(page, "reconstructed", "mask")[None].bool(), mask)
    filled = models["autoencoder"].reconstruct(pixels, bool_masked_pos=mask)
    torch.testing.assert_close(shown(page, "reconstructed", "values").view_as(filled), filled, atol=1e-3, rtol=0)


def test_what_a_visitor_sees(page, models):
    assert not page.is_visible("#classification")
    image = noise(70, 70)
    drop(page, encoded(image))
    with torch.no_grad():
        scores = models["classifier"](expected_pixels(PROCESSORS["crop"], image)[None]).logits[0].softmax(dim=0)
    order = scores.argsort(descending=True).tolist()
    rows = page.locator("#classes li").all_inner_texts()
    names = models["classifier"].config.id2label
    assert [row.split("\n")[0] for row in rows] == [names[number] for number in order]
    assert [row.split("\n")[-1] for row in rows] == [f"{100 * scores[number]:.1f} %" for number in order]
    assert page.inner_text("#masked-caption") == "visible patches: 25 %"
    before = shown(page, "reconstructed", "mask")
    page.click("#again")
    changed = "(before) => window.hivit.current().reconstructed.mask.some((masked, unit) => masked != before[unit])"
    page.wait_for_function(changed, arg=before.tolist())
    gray = page.evaluate(
        """() => {
            const canvas = document.getElementById("masked");
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return window.hivit.current().reconstructed.mask.map((masked, unit) => {
                const at = ((Math.floor(unit / 4) * 16 + 3) * canvas.width + (unit % 4) * 16 + 3) * 4;
                return [masked, data[at] === 140 && data[at + 1] === 140 && data[at + 2] === 140];
            });
        }"""
    )
    assert all(masked == is_gray for masked, is_gray in gray)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "The file is empty."),
        (b"not an image", "not an image that the browser can read"),
        (encoded(noise(40, 40))[:40], "not an image"),
        (functools.partial(hundred_megapixels), "too large: 100 megapixels"),
        (functools.partial(encoded, Image.new("1", (9000, 1))), "too long and thin: 9000x1 px"),
    ],
    ids=["empty", "text", "cut off", "100 megapixels", "too thin"],
)
def test_bad_files_are_answered_in_words(page, content, words):
    drop(page, content() if callable(content) else content)
    assert words in page.inner_text("#status")
    assert "error" in page.get_attribute("#status", "class")
    drop(page, encoded(noise(70, 70)))  # and it works again
    assert page.inner_text("#status") == ""
    assert page.is_visible("#classification")


def test_unusual_images(page):
    drop(page, animation(), "moving.gif")
    red, _, blue = page.evaluate("Array.from(window.hivit.current().image.data.slice(0, 3))")
    assert red > 200 and blue < 50  # the first frame
    drop(page, encoded(Image.new("RGBA", (30, 30), (255, 0, 0, 0))))
    assert page.evaluate("Array.from(window.hivit.current().image.data.slice(0, 3))") == [255, 255, 255]
    drop(page, encoded(Image.new("RGB", (1, 1), "blue")))
    assert page.inner_text("#status") == ""


def test_16_bits_are_scaled_as_in_python(page):
    ramp = Image.fromarray(np.linspace(0, 65_535, 900).astype(np.uint16).reshape(30, 30))
    drop(page, encoded(ramp))
    seen = np.array(page.evaluate("Array.from(window.hivit.current().image.data)")).reshape(30, 30, 3)
    assert np.abs(seen - np.asarray(read_image(ramp), int)).max() <= 1  # browsers cut off the lower 8 bits


def test_missing_models_are_said(chromium, site, tmp_path):
    link_page(site, tmp_path)
    page = chromium.new_page()
    with serve(tmp_path) as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        words = page.inner_text("#status")
        assert "is not there (404)" in words
        assert words.endswith("README.md says how to export models for this page.")
        assert page.is_disabled("#file")
        page.close()


def test_processors_that_the_page_does_not_have_are_said(chromium, site, tmp_path):
    shutil.copytree(site, tmp_path / "site", symlinks=True)
    for name, changes in [
        ("classifier", {"image_processor_type": "ConvNextImageProcessor"}),
        ("autoencoder", {"do_normalize": False}),
    ]:
        path = tmp_path / "site" / "models" / name / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    page = chromium.new_page()
    with serve(tmp_path / "site") as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        assert "not as ConvNextImageProcessor does" in page.inner_text("#status")
        assert "and the model's processor does not" in page.inner_text("#status")
        page.close()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, site, tiny_network):
    """The page with folders of `hivit_hf.hub.export` as they are: a classifier of several labels and an autoencoder."""
    root = tmp_path_factory.mktemp("repositories")
    link_page(site, root)
    changes = {"id2label": {0: "round", 1: "red", 2: "alive"}, "problem_type": "multi_label_classification"}
    models = {
        "classifier": tiny_network(HiViTForImageClassification, **changes),
        "autoencoder": tiny_network(HiViTForMaskedImageModeling),
    }
    for (name, model), processor in zip(models.items(), PROCESSORS.values()):
        export(model, root / "models" / name, image_processor=processor)
    return root, models


def test_folders_of_the_hub_are_loaded_as_they_are(chromium, repositories):
    """And each of several labels has a probability of its own."""
    root, models = repositories
    page, image = chromium.new_page(), noise(70, 70)
    with serve(root) as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        assert page.inner_text("#status") == ""
        drop(page, encoded(image))
        pixels = expected_pixels(PROCESSORS["crop"], image)[None]
        with torch.no_grad():
            scores = models["classifier"](pixels).logits[0].sigmoid()
        found = dict(page.evaluate("window.hivit.current().classified.classes.map(({label, score}) => [label, score])"))
        names = models["classifier"].config.id2label
        assert found == pytest.approx({names[n]: score for n, score in enumerate(scores.tolist())}, abs=1e-3)
        assert abs(sum(found.values()) - 1) > 0.1
        pixels = expected_pixels(PROCESSORS["squeeze"], image)[None]
        mask = models["autoencoder"].draw_mask(pixels, shown(page, "reconstructed", "noise")[None])
        filled = models["autoencoder"].reconstruct(pixels, bool_masked_pos=mask)
        torch.testing.assert_close(shown(page, "reconstructed", "values").view_as(filled), filled, atol=1e-3, rtol=0)
        page.close()


def test_models_of_another_kind_are_said(chromium, repositories, tmp_path):
    """An encoder's repository has a model.onnx too."""
    root, _ = repositories
    link_page(root, tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "classifier").symlink_to(root / "models" / "autoencoder")
    page = chromium.new_page()
    with serve(tmp_path) as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        assert "The model in ./models/classifier computes no logits" in page.inner_text("#status")
        page.close()


def test_numbers_are_shown_as_numbers(chromium, site, tiny_network, tmp_path):
    model = tiny_network(HiViTForImageClassification, problem_type="regression", num_labels=2)
    link_page(site, tmp_path)
    export_onnx(model, tmp_path / "models" / "classifier" / "classification.onnx", "classification")
    model.config.save_pretrained(tmp_path / "models" / "classifier")
    PROCESSORS["crop"].save_pretrained(tmp_path / "models" / "classifier")
    image, page = noise(70, 70), chromium.new_page()
    with torch.no_grad():
        values = model(expected_pixels(PROCESSORS["crop"], image)[None]).logits[0]
    with serve(tmp_path) as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        drop(page, encoded(image))
        rows = dict(row.split("\n") for row in page.locator("#classes li").all_inner_texts())
        page.close()
    assert rows.keys() == {"LABEL_0", "LABEL_1"}  # as the pipeline calls them
    for number in (0, 1):
        assert float(rows[f"LABEL_{number}"]) == pytest.approx(values[number].item(), abs=2e-3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_do_not_scroll_sideways(chromium, site, scheme):
    page = chromium.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    with serve(site) as address:
        page.goto(f"{address}/index.html")
        page.wait_for_selector("html[data-ready]", timeout=1000 * PATIENCE_S)
        drop(page, encoded(noise(70, 70)))
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.close()
