"""The Space: what it computes, its page in a real browser, and what it says to nonsense."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from PIL import Image
from transformers import BitImageProcessor

import hivit_hf
from hivit_hf import HiViTBackbone, HiViTForImageClassification
from hivit_hf.hub.handler import RequestError
from hivit_hf.hub.model_zoo import CHECKPOINTS, SPACE_CHECKPOINTS
from hivit_hf.hub.visualization import feature_image
from support.attacks import FAILED, requests
from support.chromium import browser
from support.nonsense import exotic_files, is_one_sentence, no_process, unusual_images
from support.patience import PATIENCE_S
from support.space import SPACE, Client, running_space, write_models


sys.path.append(str(SPACE))
from studio import Source, Studio, file_within


@pytest.fixture(scope="module")
def models(tmp_path_factory, redraw):
    return write_models(tmp_path_factory.mktemp("space"), redraw)


@pytest.fixture(scope="module")
def studio(models):
    return Studio(Source(models / "classifier"), Source(models / "autoencoder"))


def test_it_computes_what_the_models_do(studio, models):
    image = Image.open(models / "image.png")
    pixel_values = BitImageProcessor.from_pretrained(models / "classifier")(image, return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = HiViTForImageClassification.from_pretrained(models / "classifier")(pixel_values).logits[0].softmax(0)
    found = studio.classify(str(models / "image.png"))
    assert found == pytest.approx(dict(zip(["tench", "goldfish", "great white shark"], scores.tolist())), abs=1e-5)

    mask = studio.draw_mask(0.75)
    assert sum(mask) == 12
    seen, filled = studio.reconstruct(str(models / "image.png"), mask)
    assert seen.size == filled.size == (448, 448)
    seen_small, filled_small = (shown.resize((64, 64), Image.Resampling.NEAREST) for shown in (seen, filled))
    for unit, masked in enumerate(mask):
        box = (unit % 4 * 16, unit // 4 * 16, unit % 4 * 16 + 16, unit // 4 * 16 + 16)
        is_gray = set(seen_small.crop(box).get_flattened_data()) == {(140, 140, 140)}
        is_kept = filled_small.crop(box).tobytes() == image.crop(box).tobytes()
        assert (is_gray, is_kept) == (masked, not masked)
    nothing_masked = studio.reconstruct(str(models / "image.png"), [False] * 16)[1]
    assert nothing_masked.resize((64, 64), Image.Resampling.NEAREST).tobytes() == image.tobytes()

    stages = studio.features(str(models / "image.png"))
    backbone = HiViTBackbone.from_pretrained(models / "autoencoder", out_features=["stage1", "stage2", "stage3"]).eval()
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
    for shown, feature_map in zip(stages, maps):
        assert shown.tobytes() == feature_image(feature_map[0], (448, 448)).tobytes()
        assert len(set(shown.get_flattened_data())) > 3


def test_like_features_have_like_colors():
    feature_map = torch.zeros(8, 4, 4)
    feature_map[:, :, 2:] = torch.randn(8)[:, None, None]
    image = feature_image(feature_map, (4, 4))
    colors = [image.getpixel((column, 1)) for column in range(4)]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_a_folder_without_the_weights_is_refused(models, tiny_network, tmp_path):
    with pytest.raises(ValueError, match=r"weights lack classifier\.bias"):
        Studio(Source(models / "autoencoder"), Source(models / "autoencoder"))
    with pytest.raises(ValueError, match="weights lack decoder"):
        Studio(Source(models / "classifier"), Source(models / "classifier"))
    (tmp_path / "model.safetensors").write_text("garbage")
    (tmp_path / "config.json").write_text((models / "classifier" / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be loaded"):
        Studio(Source(tmp_path), Source(models / "autoencoder"))


def test_several_labels_are_scored_each_by_itself(models, tiny_network, tmp_path):
    changes = {"problem_type": "multi_label_classification"}
    model = tiny_network(HiViTForImageClassification, **changes)
    model.save_pretrained(tmp_path)
    processor = BitImageProcessor.from_pretrained(models / "classifier")
    processor.save_pretrained(tmp_path)
    pixel_values = processor(Image.open(models / "image.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values).logits[0].sigmoid().tolist()
    found = Studio(Source(tmp_path), Source(models / "autoencoder")).classify(str(models / "image.png"))
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_port_that_cannot_be_had_is_said(models):
    folders = ["--classifier", str(models / "classifier"), "--autoencoder", str(models / "autoencoder")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port, words in [("99999", "from 1 to 65535"), (str(taken.getsockname()[1]), "Give another --port")]:
            command = [sys.executable, str(SPACE / "app.py"), *folders, "--port", port]
            environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
            finished = subprocess.run(
                command, cwd=models, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert finished.returncode == 2, finished.stderr
            assert words in finished.stderr and "Traceback" not in finished.stderr


def test_masks(studio):
    assert [sum(studio.draw_mask(ratio)) for ratio in (0, 0.5, 0.95, 1)] == [0, 8, 15, 15]
    assert studio.draw_mask(0.5) != studio.draw_mask(0.5)
    mask = [False] * 16
    assert studio.toggle(mask, 0.99, 0.0)[3]
    assert studio.toggle(mask, 0.3, 0.8)[13]
    assert mask == [False] * 16
    last = [True] * 15 + [False]
    with pytest.raises(RequestError, match="One patch must stay visible"):
        studio.toggle(last, 0.99, 0.99)
    assert studio.toggle_at(mask, [447, 0])[3] and studio.toggle_at(mask, (134.5, 360))[13]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda studio: studio.classify(None), "no image yet"),
        (lambda studio: studio.classify("/nowhere.png"), "did not arrive"),
        (lambda studio: studio.draw_mask("half"), "from 0 to 1"),
        (lambda studio: studio.draw_mask(float("nan")), "from 0 to 1"),
        (lambda studio: studio.toggle([False] * 16, "left", 0.5), "at two numbers, column and row, got 'left'"),
        (lambda studio: studio.toggle([False] * 16, 0.5, None), "at two numbers"),
        (lambda studio: studio.toggle([False] * 16, float("nan"), 0.5), "at two numbers"),
        (lambda studio: studio.toggle([False] * 16, 10**400, 0.5), "at two numbers"),
        (lambda studio: studio.toggle_at([False] * 16, "left"), "at two numbers"),
        (lambda studio: studio.toggle_at([False] * 16, ["a", "b"]), "at two numbers"),
        (lambda studio: studio.toggle_at([False] * 16, [10**400, 1]), "at two numbers"),
        (lambda studio: studio.toggle_at([False] * 16, {"x": 1}), "at two numbers"),
        (lambda studio: studio.reconstruct(None, [True] * 16), "must stay visible"),
        (lambda studio: studio.reconstruct(None, [False] * 3), "16 booleans"),
        (lambda studio: studio.reconstruct(None, "mask"), "16 booleans"),
    ],
)
def test_mistakes_are_answered_in_words(studio, call, words):
    with pytest.raises(RequestError, match=words) as refusal:
        call(studio)
    assert is_one_sentence(str(refusal.value))


def test_other_formats_are_refused_and_start_no_program(studio, tmp_path, monkeypatch):
    started = no_process(monkeypatch)
    for name, file in exotic_files().items():
        (tmp_path / name).write_bytes(file)
        with pytest.raises(RequestError, match="not an image that can be read") as refusal:
            studio.features(str(tmp_path / name))
        assert is_one_sentence(str(refusal.value))
    assert not started


def test_only_plain_files_within_the_folder_are_read(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    for path in (folder / "image.png", tmp_path / "private.png"):
        path.write_bytes(b"image")
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (tmp_path / "other").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    assert file_within(str(folder / "image.png"), folder) == str(folder / "image.png")
    assert file_within(str(folder / "image.png"), tmp_path / "other") == str(folder / "image.png")
    assert file_within(None, folder) is None and file_within("", folder) == ""
    others = ["../private.png", "link.png", "loop.png", "pipe.png", ".", "none.png", "\0", "a" * 5000]
    for path in [*(f"{folder}/{name}" for name in others), str(tmp_path / "private.png"), "/dev/zero", "/etc", "x", 7]:
        with pytest.raises(RequestError, match="neither an upload nor a sample") as refusal:
            file_within(path, folder)
        assert is_one_sentence(str(refusal.value))


def test_its_card_names_checkpoints_of_the_table():
    text = (SPACE / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["models"] == [CHECKPOINTS[name].repo_id for name in SPACE_CHECKPOINTS.values()]
    for link in re.findall(r"\]\((?!https?://)(.*?)\)", text):  # what is uploaded is this folder alone
        assert (SPACE / link).resolve().is_relative_to(SPACE) and (SPACE / link).exists(), link
    pinned = (SPACE.parents[1] / "constraints.txt").read_text()
    assert f"gradio=={data['sdk_version']}\n" in pinned


def test_every_flag_of_the_readme_and_its_variable_is_read(monkeypatch):
    import app

    rows = re.findall(r"^\| `--(\w+)` \| `(\w+)` \|", (SPACE / "README.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 4
    for number, (flag, variable) in enumerate(rows):
        monkeypatch.setenv(variable, f"value {number}")
        assert getattr(app.parse_arguments([]), flag) == f"value {number}"
        assert getattr(app.parse_arguments([f"--{flag}", "mine"]), flag) == "mine"


REVISIONS = """
import sys
sys.path.insert(0, sys.argv[1])
import hivit_hf
from studio import Source, Studio
assert hivit_hf.__file__.startswith(sys.argv[1]), hivit_hf.__file__
autoencoder = Source(sys.argv[2])
for revision in sys.argv[3:]:
    studio = Studio(Source("me/fish", revision), autoencoder)
    print(*studio.classifier.config.id2label.values(), *studio.classifier_processor.image_mean, *studio.may_change)
try:
    Studio(Source("me/fish", "f" * 40), autoencoder)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_models_of_the_hub_are_of_the_revision_that_is_given(models, tiny_network, tmp_path):
    """From the Hub's cache, as without network, with the files as they lie in a Space: the package beside the app."""
    repository, commits = tmp_path / "home" / "hub" / "models--me--fish", ["0" * 40, "1" * 40]
    for commit, name, mean in zip(commits, ("tench", "shark"), (0.25, 0.75)):
        folder = repository / "snapshots" / commit
        tiny_network(HiViTForImageClassification, id2label={0: name, 1: "other"}).save_pretrained(folder)
        size = {"height": 64, "width": 64}
        BitImageProcessor(size=size, do_center_crop=False, image_mean=[mean] * 3).save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    shutil.copytree(SPACE, tmp_path / "space")
    shutil.copytree(Path(hivit_hf.__file__).parent, tmp_path / "space" / "hivit_hf")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REVISIONS, str(tmp_path / "space"), str(models / "autoencoder"), *commits, ""]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert finished.returncode == 0, finished.stderr
    *found, words = finished.stdout.splitlines()
    expected = ["tench other 0.25 0.25 0.25", "shark other 0.75 0.75 0.75", "shark other 0.75 0.75 0.75 me/fish"]
    assert found == expected  # the last one of the main branch, which may change
    assert words.startswith("me/fish cannot be loaded: ")


def test_the_page_says_when_no_revision_is_given(studio, monkeypatch):
    import app

    def texts():
        return [block["props"].get("value") for block in app.build(studio, []).get_config_file()["components"]]

    assert not any(str(text).startswith(app.UNPINNED) for text in texts())
    monkeypatch.setattr(studio, "may_change", ["me/fish"])
    assert f"{app.UNPINNED} me/fish." in texts()


def test_revisions_of_nothing_are_refused(models, capsys):
    import app

    for arguments, words in [
        (["--classifier_revision", "abc"], "--classifier_revision abc needs a repository"),
        (["--classifier", str(models / "classifier"), "--classifier_revision", "abc"], "has no revision 'abc'"),
    ]:
        assert app.main(arguments) == 2
        assert words in capsys.readouterr().err


# -- running --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(models):
    with running_space(models) as found:
        yield found


@pytest.mark.slow
def test_in_a_browser(address, models, studio):
    with browser() as chromium:
        page, errors = chromium.new_page(viewport={"width": 1180, "height": 800}), []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.set_input_files("#image input[type=file]", str(models / "image.png"))
        best = max(studio.classify(str(models / "image.png")).items(), key=lambda item: item[1])
        page.wait_for_selector(f"#classes >> text={best[0]}")
        assert f"{best[1]:.0%}" in page.inner_text("#classes")

        page.get_by_role("tab", name="Reconstruct").click()
        masked = page.locator(".masked img").first
        masked.wait_for(state="visible")
        before = masked.get_attribute("src")
        size = masked.bounding_box()
        masked.click(position={"x": 0.9 * size["width"], "y": 0.9 * size["height"]})
        page.wait_for_function("(before) => document.querySelector('.masked img').src !== before", arg=before)
        sources = before, masked.get_attribute("src")
        before, after = (Image.open(io.BytesIO(httpx.get(source).content)) for source in sources)
        changed = [unit for unit in range(16) if _unit(before, unit) != _unit(after, unit)]
        assert changed == [15]
        shown = masked.get_attribute("src")
        page.get_by_role("button", name="Mask other patches").click()
        page.wait_for_function("(before) => document.querySelector('.masked img').src !== before", arg=shown)

        page.get_by_role("tab", name="Features").click()
        page.wait_for_function(
            "[...document.querySelectorAll('.pixels img')].filter((i) => i.offsetParent).length === 3"
        )

        (models / "text.png").write_bytes(b"not an image")
        page.goto(address)
        page.set_input_files("#image input[type=file]", str(models / "text.png"))
        page.wait_for_selector("#words >> text=This is not an image that can be read")
        assert errors == []


def _unit(shown: Image.Image, unit: int) -> bytes:
    side = shown.width // 4
    box = (unit % 4 * side, unit // 4 * side, unit % 4 * side + side, unit // 4 * side + side)
    return shown.convert("RGB").crop(box).tobytes()


@pytest.mark.slow
def test_samples_and_uploads_are_read(address, models):
    with Client(address) as client:
        upload = client.upload((models / "image.png").read_bytes())["path"]
        sample = next((models / "uploads").rglob("sample.png"))
        for path in (upload, str(sample)):
            for mark in ({"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "x"}}, {}):
                assert "tench" in client.call("look", {"path": path, **mark}, 0.5)
                assert client.run("look", {"path": path, **mark}, 0.5)["data"][-1] == ""
        for name, content in unusual_images().items():
            assert client.run("look", client.upload(content), 0.5)["data"][-1] == "", name


@pytest.mark.slow
def test_requests_of_nonsense_and_for_files_of_the_server(address, models):
    """Over the network, as the page and scripts send them: words each time, and it classifies as before."""
    with Client(address) as client:
        found = [outcome for _ in range(3) for outcome in requests.attacks(client, models)]
    assert [(name, said) for name, outcome, said in found if outcome == FAILED] == []
    assert len(found) > 1000


def test_without_models_it_says_what_to_do(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HIVIT_")}
    for arguments, words in [
        ([], "There is no classifier: run `make demo` first"),
        (["--classifier", "nowhere", "--autoencoder", "nowhere"], "nowhere"),
    ]:
        command = [sys.executable, str(SPACE / "app.py"), *arguments]
        finished = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert finished.returncode == 2
        assert re.search(words, finished.stderr) and "Traceback" not in finished.stderr
