"""Exported folders and model cards: complete, true to their data, refused when they would not be."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from safetensors.torch import load_file
from transformers import BitImageProcessor, ViTImageProcessor, pipeline

import export_onnx
import hivit_hf
import push_to_hub
from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.auto_registration import AUTO_MAP
from hivit_hf.classification.evaluation import load_for_evaluation
from hivit_hf.hub import repository
from hivit_hf.hub.cards import check_card, render_card
from hivit_hf.hub.handler import EndpointHandler, read_image
from hivit_hf.hub.model_zoo import CHECKPOINTS, Checkpoint, PaperResult
from hivit_hf.hub.repository import export
from hivit_hf.image_processing import load_processor
from hivit_hf.training.folders import FolderError
from hivit_hf.training.initialization import normalization
from support.networks import TINY
from support.nonsense import encoded, hundred_megapixels, noise


ROOT = Path(__file__).parents[2]
REPORT = {
    "source": {"file": "x.pth", "size_bytes": 12345, "sha256": "ab" * 32, "title": "self-supervised"},
    "proof": {"equal": 7, "compared": 7, "largest_difference": 0.0},
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(90, 70), (8, 8)]):
        (folder / f"noise_{number}.png").write_bytes(encoded(noise(*size)))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def classifier(tiny_network):
    return tiny_network(HiViTForImageClassification, id2label={0: "tench", 1: "goldfish", 2: "shark"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classifier, samples):
    """A classifier, exported with everything."""
    about = dataclasses.replace(repository.undescribed(classifier, "fish"), title="Fish", license="mit")
    return export(classifier, tmp_path_factory.mktemp("out") / "fish", about, samples=samples, conversion_report=REPORT)


def test_the_folder_is_complete(folder, classifier):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "README.md",
        "config.json",
        "configuration_hivit.py",
        "conversion_report.json",
        "handler.py",
        "image_reading.py",
        "model.safetensors",
        "modeling_hivit.py",
        "onnx/model.onnx",
        "preprocessor_config.json",
        "requirements.txt",
        "samples/noise_0.png",
        "samples/noise_1.png",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["HiViTForImageClassification"]
    assert config["id2label"] == {"0": "tench", "1": "goldfish", "2": "shark"}
    assert config["auto_map"] == AUTO_MAP
    assert len(AUTO_MAP) == 6
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, classifier.state_dict()[name])
    assert json.loads((folder / "conversion_report.json").read_text()) == REPORT
    assert not hasattr(classifier.config, "auto_map")  # the model in memory is as it was


def test_the_card_says_what_the_pipeline_says(folder, samples):
    card = ModelCard.load(folder / "README.md")
    classify = pipeline("image-classification", model=str(folder))
    widget = card.data.widget
    assert [entry["src"] for entry in widget] == ["samples/noise_0.png", "samples/noise_1.png"]
    for entry in widget:
        found = classify(str(folder / entry["src"]), top_k=3)
        assert [guess["label"] for guess in entry["output"]] == [guess["label"] for guess in found]
        for told, measured in zip(entry["output"], found):
            assert told["score"] == pytest.approx(measured["score"], abs=6e-5)
            assert f"{told['label']}: {100 * told['score']:.1f} %" in card.content
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert "onnx" in card.data.tags
    assert f"sha256 `{'ab' * 32}`" in card.content and "7 of 7 tensors" in card.content
    for path in folder.rglob("*"):
        assert path.is_dir() or path.relative_to(folder).as_posix() in card.content


def test_what_a_pipeline_reads_otherwise_is_shown_as_it_does(classifier, tmp_path):
    """16 bits are white to it, and what is transparent has the color below."""
    deep = np.asarray(Image.effect_noise((64, 64), 90), np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.merge("RGBA", [Image.effect_noise((64, 64), 90) for _ in range(4)]).save(tmp_path / "glass.png")
    samples = [tmp_path / "deep.png", tmp_path / "glass.png"]
    folder = export(classifier, tmp_path / "out", samples=samples, onnx=False)
    classify = pipeline("image-classification", model=str(folder))
    for entry in ModelCard.load(folder / "README.md").data.widget:
        found = classify(str(folder / entry["src"]), top_k=3)
        assert [guess["score"] for guess in entry["output"]] == pytest.approx([g["score"] for g in found], abs=6e-5)


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (HiViTForImageClassification, {}),
        (HiViTForMaskedImageModeling, {}),
        (HiViTModel, {"add_pooling_layer": True}),
        (HiViTModel, {"add_pooling_layer": False}),
    ],
)
def test_the_card_counts_the_parameters_that_lie_beside_it(model_class, options, tiny_config, tmp_path, push):
    model = model_class(tiny_config(), **options)
    model.save_pretrained(tmp_path / "model")
    code, printed = push("model", "out", "--no_onnx")
    assert code == 0, printed
    buffers = {name for name, _ in model.named_buffers()}
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    count = sum(tensor.numel() for name, tensor in tensors.items() if name not in buffers)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `{model_class.__name__}` | {count:,} |" in card


def test_the_cards_quick_start_runs(folder, tmp_path):
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL).group(1)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + "\nprint(classify.model.config.id2label)"]
    finished = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "goldfish" in finished.stdout


@pytest.mark.slow
def test_an_autoencoder_shows_reconstructions(tiny_network, samples, tmp_path):
    model = tiny_network(HiViTForMaskedImageModeling)
    folder = export(model, tmp_path / "mae", samples=samples)
    card = (folder / "README.md").read_text()
    assert (folder / "onnx" / "reconstruction.onnx").is_file()
    assert (folder / "onnx" / "model.onnx").is_file()
    for sample in samples:
        assert f"](samples/{sample.stem}_reconstructed.png)" in card
        assert (folder / "samples" / f"{sample.stem}_reconstructed.png").is_file()
    assert "included" in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL).group(1)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "image.jpg").write_bytes(encoded(noise(70, 80), "JPEG"))
    command = [sys.executable, "-c", code + "\nprint(tuple(features.shape), tuple(image.shape))"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.strip() == "(1, 16, 32) (1, 3, 64, 64)"


def test_what_cannot_be_exported_is_refused_before_anything_is_written(classifier, tiny_network, tmp_path, samples):
    refusals = [
        (ValueError, "got a Linear", lambda: export(torch.nn.Linear(1, 1), tmp_path / "out")),
        (ValueError, "the model is a HiViTForImage",
         lambda: export(classifier, tmp_path / "out", CHECKPOINTS["hivit-base-mae-1600ep"])),
        (ValueError, "OWNER/NAME", lambda: export(classifier, tmp_path / "out", push_to_hub=True)),
        (ValueError, "at most 24", lambda: export(classifier, tmp_path / "out", samples=[samples[0]] * 25)),
        (ValueError, "Two samples", lambda: export(classifier, tmp_path / "out", samples=[samples[0]] * 2)),
        (ValueError, ".png files, got", lambda: export(classifier, tmp_path / "out", samples=[Path("a.txt")])),
        (ValueError, "cannot be read", lambda: export(classifier, tmp_path / "out", samples=[Path("a.png")])),
    ]  # fmt: skip
    wide = tiny_network(HiViTForImageClassification, image_size=(32, 64))
    refusals.append((ValueError, "give an image_processor", lambda: export(wide, tmp_path / "out")))
    (tmp_path / "huge.png").write_bytes(hundred_megapixels())
    huge = [tmp_path / "huge.png"]
    refusals.append((ValueError, "too large", lambda: export(classifier, tmp_path / "out", samples=huge)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refusals += [
        (FolderError, "exists", lambda: export(classifier, tmp_path / "mine")),
        (FolderError, "holds thesis.txt", lambda: export(classifier, tmp_path / "mine", overwrite=True)),
    ]
    for kind, words, call in refusals:
        with pytest.raises(kind, match=re.escape(words)):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge.png", "mine"]


def test_a_failed_export_leaves_nothing(classifier, tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("on the way")

    monkeypatch.setattr(repository, "render_card", fail)
    with pytest.raises(RuntimeError, match="on the way"):
        export(classifier, tmp_path / "new" / "out", onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_an_export(classifier, tmp_path, samples):
    out = export(classifier, tmp_path / "out", samples=samples, onnx=False)
    export(classifier, out, onnx=False, overwrite=True)
    assert not (out / "samples").exists()
    (out / "samples").mkdir()
    (out / "samples" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"samples/notes\.txt"):
        export(classifier, out, onnx=False, overwrite=True)


def test_nothing_is_uploaded_unless_asked(classifier, samples, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            calls.append(("upload", repo_id, delete_patterns, (Path(folder_path) / "README.md").read_text()))
            return type("Commit", (), {"commit_url": "https://huggingface.co/me/fish/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    about = dataclasses.replace(repository.undescribed(classifier, "fish"), repo_id="me/fish")
    export(classifier, tmp_path / "a", about, onnx=False)
    assert calls == []
    export(classifier, tmp_path / "b", about, samples=samples, onnx=False, push_to_hub=True)
    assert calls[0] == ("create", "me/fish", True, True)
    kind, repo_id, deleted, card = calls[1]
    assert (kind, repo_id) == ("upload", "me/fish")
    assert "onnx/*.onnx" in deleted and "samples/*.png" in deleted and "*" not in deleted
    assert "Not uploaded" not in card and "is the folder that" not in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL).group(1)
    assert 'pipeline("image-classification", "me/fish", trust_remote_code=True)' in code
    assert 'classify(hf_hub_download("me/fish", "samples/noise_0.png"), top_k=3)' in code
    compile(code, "card", "exec")


def test_an_upload_that_fails_is_told_in_words(classifier, tmp_path, monkeypatch):
    class Api:
        def create_repo(self, *arguments, **keywords):
            raise OfflineModeIsEnabled("Cannot reach the Hub: offline mode is enabled.")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    about = dataclasses.replace(repository.undescribed(classifier, "fish"), repo_id="me/fish")
    with pytest.raises(ValueError, match=r"not uploaded to me/fish: Cannot reach the Hub"):
        export(classifier, tmp_path / "out", about, onnx=False, push_to_hub=True)
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_card_is_of_its_own_network_only(classifier, tmp_path):
    with pytest.raises(ValueError, match="another network, as it differs in image_size, hidden_size"):
        export(classifier, tmp_path / "out", CHECKPOINTS["hivit-base"], onnx=False)
    own = {"arguments": {**TINY, "num_labels": 3}}
    original = dataclasses.replace(CHECKPOINTS["hivit-base-mae-1600ep-ft100ep"], **own)
    with pytest.raises(ValueError, match="no conversion report"):
        export(classifier, tmp_path / "out", original, onnx=False)
    with pytest.raises(ValueError, match=r"not one of conversion/convert\.py"):
        export(classifier, tmp_path / "out", original, conversion_report={"source": []}, onnx=False)
    more = dataclasses.replace(original, arguments={**TINY, "num_labels": 4})
    with pytest.raises(ValueError, match="differs in num_labels"):
        export(classifier, tmp_path / "out", more, conversion_report=REPORT, onnx=False)
    assert not (tmp_path / "out").exists()

    card = export(classifier, tmp_path / "out", original, conversion_report=REPORT, onnx=False) / "README.md"
    assert ModelCard.load(card).data.eval_results[0].metric_value == 84.6
    trained = dataclasses.replace(CHECKPOINTS["hivit-base"], **own)
    text = (export(classifier, tmp_path / "trained", trained, onnx=False) / "README.md").read_text()
    assert "These are not the paper's weights" in text and "There are no weights" not in text
    assert "| ImageNet-1k, top-1 at 224 px, the paper's own weights | 83.8 % |" in text
    assert "With weights that you have trained" not in text


def test_measured_results_are_of_the_whole_network():
    about, results = CHECKPOINTS["hivit-base"], ROOT / "benchmarks" / "results"
    for changes, quoted in [({}, True), ({"drop_path_rate": 0.1}, True), ({"num_attention_heads": 4}, False),
                            ({"early_mlp_ratio": 2.0}, False), ({"num_labels": 10}, False)]:  # fmt: skip
        card = render_card(about, HiViTConfig(**{**about.arguments, **changes}), results_dir=results)
        assert ("inference_cpu.json" in card) == quoted, changes


def test_odd_names_stay_what_they_are(tiny_network, tmp_path):
    names = {0: "a|b", 1: "<script>", 2: "*c* `d` [e]"}
    image = tmp_path / "my fish.PNG"
    image.write_bytes(encoded(noise(64, 64)))
    model = tiny_network(HiViTForImageClassification, id2label=names)
    out = export(model, tmp_path / "out", samples=[image], onnx=False)
    card = ModelCard.load(out / "README.md")
    assert (out / "samples" / "my fish.png").is_file()
    assert card.data.widget[0]["src"] == "samples/my%20fish.png"
    assert {guess["label"] for guess in card.data.widget[0]["output"]} == set(names.values())
    row = next(line for line in card.content.splitlines() if line.startswith("| <img"))
    assert (
        row.count("|") == 3 and "<script>" not in row and "a&#124;b: " in row and 'src="samples/my%20fish.png"' in row
    )
    assert '"out/samples/my fish.png"' in card.content
    export(model, out, samples=[image], onnx=False, overwrite=True)


def test_reconstructions_have_names_of_their_own(tiny_network, tmp_path):
    names = ["a.png", "a.jpg", "a_reconstructed.png"]
    for name in names:
        (tmp_path / name).write_bytes(encoded(noise(64, 64)))
    out = export(
        tiny_network(HiViTForMaskedImageModeling), tmp_path / "o", samples=[tmp_path / n for n in names], onnx=False
    )
    assert len(list((out / "samples").iterdir())) == 6
    for name in names:
        assert (out / "samples" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert len(set(re.findall(r"\]\((samples/.*?)\)", (out / "README.md").read_text()))) == 3


def test_several_labels_are_scored_each_by_itself(tiny_network, samples, tmp_path):
    model = tiny_network(HiViTForImageClassification, problem_type="multi_label_classification")
    card = (export(model, tmp_path / "out", samples=samples, onnx=False) / "README.md").read_text()
    assert "sigmoid outputs" in card and "softmax" not in card


def test_damaged_folders_are_refused_in_words(classifier, tiny_network, tmp_path, push):
    def damaged(name, file, content):
        folder = tmp_path / name
        classifier.save_pretrained(folder)
        BitImageProcessor(crop_size={"height": 64, "width": 64}).save_pretrained(folder)
        (folder / file).write_text(content)
        return name

    config = json.loads((Path(tmp_path / damaged("whole", "x", "")) / "config.json").read_text())
    tiny_network(HiViTForMaskedImageModeling).save_pretrained(tmp_path / "autoencoder")
    path = tmp_path / "autoencoder" / "config.json"
    path.write_text(path.read_text().replace("HiViTForMaskedImageModeling", "HiViTForImageClassification"))
    (tmp_path / "file").write_text("mine")
    for folder, words in [
        (damaged("a", "model.safetensors", "garbage"), "a cannot be loaded"),
        (damaged("b", "config.json", json.dumps({**config, "hidden_size": "wide"})), "b cannot be loaded"),
        (damaged("c", "preprocessor_config.json", "garbage"), "preprocessor_config.json cannot be used"),
        ("autoencoder", "its weights lack classifier.bias"),
    ]:
        for main, options in [(push_to_hub.main, ["--no_onnx"]), (export_onnx.main, [])]:
            code, printed = push(folder, "out", *options, main=main)
            assert code == 2 and words in printed, printed
            assert "Traceback" not in printed and printed.count("error:") == 1
    for report in ("garbage", "[]", '{"source": 1, "proof": 2}'):
        code, printed = push(damaged("d", "conversion_report.json", report), "out", "--no_onnx")
        assert code == 2 and "convert again" in printed, printed
    for options in ((), ("--overwrite",)):
        assert push("whole", "file", "--no_onnx", *options)[0] == 2
    code, printed = push("whole", "file", "--overwrite", main=export_onnx.main)
    assert code == 2 and "is a file" in printed
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_onnx_files_replace_an_earlier_export_alone(classifier, tmp_path, push):
    classifier.save_pretrained(tmp_path / "model")
    features = ("--task", "features")
    assert push("model", "out", *features, main=export_onnx.main)[0] == 0
    assert {"features.onnx", "config.json", "onnx.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    code, printed = push("model", "out", *features, main=export_onnx.main)
    assert code == 2 and "out exists. Choose another folder, or give --overwrite." in printed
    assert push("model", "out", "--task", "classification", "--overwrite", main=export_onnx.main)[0] == 0
    assert not (tmp_path / "out" / "features.onnx").exists()
    before = (tmp_path / "model" / "config.json").read_bytes()
    code, printed = push("model", "model", *features, "--overwrite", main=export_onnx.main)
    assert code == 2 and "model holds" in printed and (tmp_path / "model" / "config.json").read_bytes() == before


def test_processors_of_other_classes_stay_what_they_are(classifier, samples, tmp_path, push):
    """A ViT's processor squeezes the whole image; read as ours, it would cut 224x224 px out of black borders."""
    classifier.save_pretrained(tmp_path / "model")
    squeeze = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.2] * 3, resample=0)
    squeeze.save_pretrained(tmp_path / "model")
    code, printed = push("model", "out", "--no_onnx", "--samples", *samples)
    assert code == 0, printed
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == json.loads(
        (tmp_path / "model" / "preprocessor_config.json").read_text()
    )
    image = read_image(samples[0].read_bytes())
    expected = squeeze(image, return_tensors="pt").pixel_values
    endpoint = EndpointHandler(str(tmp_path / "out"))
    loaded = load_processor(tmp_path / "out", classifier.config)
    for processor in (endpoint.processor, loaded, load_for_evaluation(str(tmp_path / "out"))[1]):
        assert type(processor).__name__.startswith("ViTImageProcessor")
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    with torch.no_grad():
        scores = classifier(expected).logits[0].softmax(dim=0)
    told = ModelCard.load(tmp_path / "out" / "README.md").data.widget[0]["output"][0]
    assert told["score"] == pytest.approx(scores.max().item(), abs=6e-5)
    assert endpoint({"inputs": image})[0]["score"] == pytest.approx(scores.max().item(), abs=1e-5)
    assert normalization(str(tmp_path / "out"), 3)[0] == [0.2] * 3


@pytest.mark.parametrize("name", ["NoSuchImageProcessor", "WhisperFeatureExtractor"])
def test_unknown_image_processors_are_refused(name, classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name, "size": 64}))
    words = f"names the image processor {name}, which transformers does not have or cannot use here: save a BitImage"
    for load in (
        lambda: load_processor(tmp_path, classifier.config),
        lambda: EndpointHandler(str(tmp_path)),
        lambda: load_for_evaluation(str(tmp_path)),
        lambda: normalization(str(tmp_path), 3),
    ):
        with pytest.raises(ValueError, match=words):
            load()


def test_the_cards_of_encoders_name_their_processor(tiny_network, tmp_path):
    squeeze = ViTImageProcessor(size={"height": 64, "width": 64})
    out = export(tiny_network(HiViTModel), tmp_path / "out", image_processor=squeeze, onnx=False)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL).group(1)
    assert 'ViTImageProcessor.from_pretrained("out")' in code and "BitImageProcessor" not in code


def test_onnx_of_half_precision_is_refused_before_anything_is_written(tiny_network, tmp_path):
    model = tiny_network(HiViTForImageClassification).to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32 models on the CPU"):
        export(model, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "out", onnx=False)


def test_requirements_are_those_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(dependencies) - set(repository.REQUIREMENTS) == {"jinja2>=3.1"}  # which renders cards, no more
    assert set(repository.REQUIREMENTS) <= set(dependencies)


def test_a_backbone_cannot_be_described_as_another_class(tiny_network, tmp_path):
    with pytest.raises(ValueError, match="HiViTBackbone"):
        export(tiny_network(HiViTBackbone), tmp_path / "out", CHECKPOINTS["hivit-base"], onnx=False)


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def push(tmp_path, monkeypatch, capsys):
    """Runs the command in `tmp_path`; returns its exit code and what it printed."""

    def run(*arguments, main=push_to_hub.main):
        monkeypatch.chdir(tmp_path)
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_the_command(classifier, samples, tmp_path, push):
    classifier.save_pretrained(tmp_path / "model")
    BitImageProcessor(size={"shortest_edge": 70}, crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "model" / "conversion_report.json").write_text(json.dumps(REPORT))
    code, printed = push("model", "out", "--no_onnx", "--dry_run")
    assert code == 0, printed
    assert "out/\n" in printed and "  modeling_hivit.py" in printed and "conversion_report.json" in printed
    assert not (tmp_path / "out").exists()
    code, printed = push("model", "out", "--no_onnx", "--title", "Fish", "--license", "mit", "--samples", samples[0])
    assert code == 0, printed
    assert "nothing was uploaded" in printed
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"
    assert BitImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 70
    for arguments, words in [
        (("model", "out"), "exists"),
        (("nowhere", "out2"), "no folder of a model"),
        (("model", "out2", "--checkpoint", "hivit-base-mae-1600ep"), "the model is a HiViTForImageClassification"),
        (("model", "out2", "--license", "beer", "--no_onnx"), "license is 'beer'"),
        (("model", "out2", "--push_to_hub", "--dry_run"), "exclude each other"),
        (("model", "out2", "--push_to_hub"), "OWNER/NAME"),
    ]:
        code, printed = push(*arguments)
        assert code == 2, printed
        assert words in printed and "Traceback" not in printed
        assert not (tmp_path / "out2").exists()


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "push_to_hub.py"), "nowhere", "out"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    *warnings, last = finished.stderr.splitlines()  # of libraries, such as torchao where it is installed
    assert last == "error: nowhere is no folder of a model: it has no config.json with architectures."
    assert not any("Traceback" in line for line in warnings)


# -- cards ----------------------------------------------------------------------------------------------------------


def test_no_card_is_stale():
    command = [sys.executable, str(ROOT / "model_cards" / "render.py"), "--check"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_every_checkpoint_has_a_card_and_an_architecture():
    parameters = {
        "hivit-tiny": "19,181,668",
        "hivit-small": "37,526,464",
        "hivit-base": "66,418,952",
        "hivit-base-mae-1600ep": "87,041,152",
        "hivit-base-mae-1600ep-ft100ep": "66,418,952",
    }
    for name, about in CHECKPOINTS.items():
        card = ModelCard.load(ROOT / "model_cards" / f"{name}.md")
        check_card(str(card))
        assert parameters.get(name, "") in card.content
        assert ("**These weights were never published.**" in card.content) == (about.weights == "unpublished")
        assert card.data.license == "unknown"
        assert "widget" not in card.data.to_dict()  # these weights were not run here
        assert about.uploaded == (about.revision is not None)
    assert len({about.repo_id for about in CHECKPOINTS.values()}) == len(CHECKPOINTS)


HIVIT = "arXiv 2205.14949"
# as they stand in the paper, typed in once more
PAPER_RESULTS = {
    "hivit-tiny": [("ImageNet-1k, top-1 at 224 px", "82.1 %", HIVIT)],
    "hivit-small": [("ImageNet-1k, top-1 at 224 px", "83.5 %", HIVIT)],
    "hivit-base": [("ImageNet-1k, top-1 at 224 px", "83.8 %", HIVIT)],
    "hivit-base-mae-1600ep": [
        ("ImageNet-1k, top-1 after 100 epochs of fine-tuning", "84.6 %", HIVIT),
        ("COCO, box AP, Mask R-CNN fine-tuned from it", "53.3", HIVIT),
        ("ADE20K, mIoU, UPerNet, fine-tuned from the fine-tuned classifier", "52.8 %", HIVIT),
    ],
    "hivit-base-mae-1600ep-ft100ep": [("ImageNet-1k, top-1 at 224 px", "84.6 %", HIVIT)],
}
# checkpoint -> rows: file of benchmarks/results, what, keys of the value, unit
MEASURED_RESULTS = {
    name: [
        (
            "inference_cpu",
            "classification, forward, float32, batch {batch_size}",
            "float32 models HiViT-B median_s",
            "s",
        ),
        (
            "onnx_cpu",
            "the same in onnxruntime, relative to PyTorch, round by round",
            "speed onnxruntime times_slower_than_ours",
            "x the time",
        ),
    ]
    for name in ("hivit-base", "hivit-base-mae-1600ep-ft100ep")
}


def rows_of_tables(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("|")]


def expected_rows(name: str) -> list[str]:
    """The rows of all tables of a card, made without the code that renders cards."""
    about, config = CHECKPOINTS[name], HiViTConfig(**CHECKPOINTS[name].arguments)
    with torch.device("meta"):
        model = getattr(hivit_hf, about.model_class)(config)
    # the published encoders end without a norm
    count = sum(p.numel() for n, p in model.named_parameters() if n not in ("layernorm.weight", "layernorm.bias"))
    heads = ["network", "parameters", "channels", "depths", "heads", "input"]
    cells = [f"`{about.model_class}`", f"{count:,}", config.hidden_size, ", ".join(map(str, config.depths))]
    cells += [config.num_attention_heads, f"{config.image_size}x{config.image_size} px"]
    if about.model_class == "HiViTForMaskedImageModeling":
        heads, cells = [*heads, "decoder"], [*cells, "included"]
    if about.model_class == "HiViTForImageClassification":
        heads, cells = [*heads, "classes"], [*cells, config.num_labels]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), f"| {' | '.join(map(str, cells))} |"]
    results = [
        f"| {what} | {value} | paper ([{paper}](https://arxiv.org/abs/{paper.split()[1]})) |"
        for what, value, paper in PAPER_RESULTS.get(name, [])
    ]
    for file, what, keys, unit in MEASURED_RESULTS.get(name, []):
        record = value = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
        for key in keys.split():
            value = value[key]
        machine = f"{record['hardware']['cpu']}, {record['hardware']['cores']} cores"
        what = f"{what.format(**record)}, {machine}"
        results.append(f"| {what} | {value:.2f} {unit} | `benchmarks/results/{file}.json` |")
    return rows + (["| | | source |", "|---|---|---|", *results] if results else [])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_result_is_the_papers_or_of_a_benchmark_file(name):
    card = (ROOT / "model_cards" / f"{name}.md").read_text()
    expected = expected_rows(name)
    assert rows_of_tables(card) == expected
    digits = [found.start() for found in re.finditer(r"\d", card)]
    in_tables = [at for at in digits if card[card.rfind("\n", 0, at) + 1] == "|"]
    assert len(in_tables) > 15
    for at in in_tables:  # a wrong digit anywhere is noticed
        wrong = card[:at] + str((int(card[at]) + 1) % 10) + card[at + 1 :]
        assert rows_of_tables(wrong) != expected, card[at - 20 : at + 20]


def test_the_results_in_the_metadata_are_those_of_the_tables():
    """In cards of weights that are the measured ones, and in no others."""
    for name, about in CHECKPOINTS.items():
        results = ModelCard.load(ROOT / "model_cards" / f"{name}.md").data.eval_results or []
        told = [(f"{result.metric_value} %", result.source_name) for result in results]
        whole = about.weights == "original" and about.model_class == "HiViTForImageClassification"
        assert told == [(value, f"paper ({paper})") for _, value, paper in PAPER_RESULTS.get(name, []) if whole]


def test_every_file_that_cards_name_exists():
    recipes = {f"hivit-{name}": f"supervised_{name}_300ep" for name in ("tiny", "small", "base")}
    recipes |= {"hivit-base-mae-1600ep-ft100ep": "finetune_base_100ep", "hivit-base-mae-1600ep": "mae_base_1600ep"}
    for name, recipe in recipes.items():
        assert f"examples/recipes/{recipe}.yaml" in (ROOT / "model_cards" / f"{name}.md").read_text()
    for path in (ROOT / "model_cards").glob("*.md"):
        for named in re.findall(r"(?:examples|conversion)/[\w/]+\.(?:py|yaml)", path.read_text()):
            assert (ROOT / named).is_file(), (path.name, named)


def test_results_of_any_paper_are_linked():
    about = dataclasses.replace(CHECKPOINTS["hivit-base"], paper_results=(PaperResult("top-1", "80 %", "2010.11929"),))
    card = render_card(about, HiViTConfig(**about.arguments))
    assert "| top-1 | 80 % | paper ([arXiv 2010.11929](https://arxiv.org/abs/2010.11929)) |" in card


def test_an_uploaded_checkpoint_is_pinned():
    about = dataclasses.replace(CHECKPOINTS["hivit-base-mae-1600ep-ft100ep"], revision="0123abc")
    card = render_card(about, HiViTConfig(**about.arguments))
    assert f'"{about.repo_id}", trust_remote_code=True, revision="0123abc"' in card
    assert "Not uploaded yet" not in card
    assert ModelCard(card).data.eval_results[0].metric_value == 84.6


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"license": "beer"}, "license is 'beer'"), ({"license": "MIT"}, "choose from apache-2.0")],
)
def test_cards_outside_the_lists_are_refused(changes, words):
    about = Checkpoint("T", "t", "HiViTModel", "d", "t", **changes)
    with pytest.raises(ValueError, match=words):
        render_card(about, HiViTConfig())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pipeline_tag: image-guessing", "pipeline_tag"),
        ("tags: [cats]", "tags is 'cats'"),
        ("library_name: timm", "library_name"),
    ],
)
def test_what_hand_edits_may_break_is_noticed(line, words):
    card = (ROOT / "model_cards" / "hivit-tiny.md").read_text()
    key = line.partition(":")[0]
    broken = re.sub(rf"^{key}:.*\n(- .*\n)*", f"{line}\n", card, count=1, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=words):
        check_card(broken)
