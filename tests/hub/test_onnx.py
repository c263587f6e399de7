"""ONNX files give PyTorch's numbers, at every batch and size, and what they cannot do is refused."""

import json

import numpy as np
import onnx
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch.testing import assert_close
from transformers import BitImageProcessor

import export_onnx as command
from hivit_hf import ARCHITECTURES, HiViTBackbone, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.hub import onnx as onnx_export
from hivit_hf.hub.onnx import OPSET, cpu_session, export_onnx, tasks_of
from support.nonsense import noise


def run(path, **inputs):
    found = cpu_session(path).run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in found]


@pytest.fixture(scope="module")
def classifier(tiny_network):
    return tiny_network(HiViTForImageClassification, id2label={0: "dark", 1: "light"})


@pytest.fixture(scope="module")
def autoencoder(tiny_network):
    return tiny_network(HiViTForMaskedImageModeling)


def test_classification_of_any_batch(classifier, tmp_path):
    path = tmp_path / "model.onnx"
    difference = export_onnx(classifier, path, "classification")
    assert 0 < difference < 1e-4
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]  # one file, weights included
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    for batch_size in (1, 4, 7):
        pixel_values = torch.randn(batch_size, 3, 64, 64)
        with torch.no_grad():
            assert_close(run(path, pixel_values=pixel_values)[0], classifier(pixel_values).logits, atol=1e-4, rtol=0)
    assert classifier.config._attn_implementation == "sdpa"  # the model is as it was


@pytest.mark.slow
def test_features_of_any_size(tiny_network, tmp_path):
    model = tiny_network(HiViTModel)
    export_onnx(model, tmp_path / "model.onnx", "features", dynamic_size=True)
    for size in [(64, 64), (32, 32), (48, 112), (160, 32), (96, 96)]:
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(pixel_values)
        hidden, pooled = run(tmp_path / "model.onnx", pixel_values=pixel_values)
        assert_close(hidden, expected.last_hidden_state, atol=1e-4, rtol=0)
        assert_close(pooled, expected.pooler_output, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", ["pixels", "normalized pixels"])
def test_reconstruction(target, tiny_network, tmp_path):
    model = tiny_network(HiViTForMaskedImageModeling, norm_pix_loss=target != "pixels", mask_ratio=0.6)
    export_onnx(model, tmp_path / "model.onnx", "reconstruction")
    for batch_size in (1, 3):
        pixel_values, random = torch.randn(batch_size, 3, 64, 64), torch.rand(batch_size, 16).round(decimals=1)
        filled, mask = run(tmp_path / "model.onnx", pixel_values=pixel_values, noise=random)
        assert torch.equal(mask, model.draw_mask(pixel_values, random))  # equal noise among it: the order is stable
        assert_close(filled, model.reconstruct(pixel_values, noise=random), atol=1e-4, rtol=0)


def test_features_of_an_autoencoder_have_no_pooling(autoencoder, tmp_path):
    export_onnx(autoencoder, tmp_path / "model.onnx", "features")
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = autoencoder.hivit(pixel_values).last_hidden_state
    (hidden,) = run(tmp_path / "model.onnx", pixel_values=pixel_values)
    assert_close(hidden, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_class", [HiViTForImageClassification, HiViTBackbone, HiViTForMaskedImageModeling])
def test_pytorchs_own_exporter_takes_the_models_as_they_are(model_class, tiny_network, tmp_path):
    """With SDPA and the relative position bias; masks are drawn with the sort that ONNX knows."""
    model = tiny_network(model_class)
    assert model.config._attn_implementation == "sdpa" and model.config.use_relative_position_bias
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    if model_class is HiViTForMaskedImageModeling:
        inputs["noise"] = torch.rand(2, 16).round(decimals=1)  # some are equal
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, external_data=False, verbose=False)
    with torch.no_grad():
        expected = model(**inputs).to_tuple()
    expected = [tensor for entry in expected for tensor in (entry if isinstance(entry, tuple) else [entry])]
    found = run(path, **inputs)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert_close(one, other, atol=1e-4, rtol=0)


def test_what_a_model_cannot_do_is_refused(classifier, autoencoder, tiny_network, tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.onnx"
    refusals = [
        ("cannot be exported for 'reconstruction'", lambda: export_onnx(classifier, path, "reconstruction")),
        ("cannot be exported for 'classification'", lambda: export_onnx(autoencoder, path, "classification")),
        ("has a fixed size", lambda: export_onnx(autoencoder, path, "reconstruction", dynamic_size=True)),
        ("float32 models on the CPU",
         lambda: export_onnx(tiny_network(HiViTModel).to(torch.bfloat16), path, "features")),
    ]  # fmt: skip
    for words, call in refusals:
        with pytest.raises(ValueError, match=words):
            call()
    assert not path.parent.exists()
    assert tasks_of(tiny_network(HiViTBackbone)) == ["features"]
    monkeypatch.setattr(onnx_export, "TOLERANCE", 1e-12)
    with pytest.raises(ValueError, match="onnxruntime differs from PyTorch"):
        export_onnx(classifier, path, "classification")
    assert not path.exists()


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Dark and light images in a folder each."""
    for number in range(6):
        for name, level in (("dark", 0.3), ("light", 1.0)):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            noise(64, 64).point(lambda value, level=level: value * level).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    return tmp_path / "images"


@pytest.fixture
def model_folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "model")
    size = {"height": 64, "width": 64}
    BitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_command(classifier, model_folder, images, tmp_path, capsys):
    out = tmp_path / "onnx"
    assert command.main([str(model_folder), str(out), "--task", "classification", "--int8", str(images)]) == 0
    record = json.loads((out / "onnx.json").read_text())
    cost = record["files"]["classification_int8.onnx"]
    assert record["opset"] == OPSET and record["files"]["classification.onnx"]["largest_difference"] < 1e-4
    assert cost["images"] == 12
    processor = BitImageProcessor.from_pretrained(model_folder)
    for name in ("float32", "int8"):
        session = cpu_session(out / f"classification{'_int8' * (name == 'int8')}.onnx")
        hits = 0
        for label, kind in enumerate(("dark", "light")):
            for path in sorted((images / kind).iterdir()):
                pixel_values = processor(Image.open(path), return_tensors="np").pixel_values
                hits += int(np.argmax(session.run(None, {"pixel_values": pixel_values})[0]) == label)
        assert cost[f"accuracy_{name}"] == pytest.approx(hits / 12)
    assert cost["drop"] == pytest.approx(cost["accuracy_float32"] - cost["accuracy_int8"])
    types = {tensor.data_type for tensor in onnx.load(out / "classification_int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert f"a drop of {cost['drop']:.2%}" in capsys.readouterr().out
    assert {"config.json", "preprocessor_config.json"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_networks_as_deep_as_base_take_any_size(tiny_network, tmp_path):
    """Twenty layers whose relative bias is interpolated for each size, in one file."""
    depths = ARCHITECTURES["base"]["depths"]
    model = tiny_network(HiViTForImageClassification, depths=depths)
    assert model.config.use_relative_position_bias
    model.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), str(tmp_path / "onnx"), "--task", "classification", "--size", "dynamic"]
    assert command.main(arguments) == 0
    for size in [(48, 112), (96, 80)]:
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(pixel_values).logits
        assert expected.std() > 0.1
        assert_close(
            run(tmp_path / "onnx" / "classification.onnx", pixel_values=pixel_values)[0], expected, atol=1e-4, rtol=0
        )


@pytest.mark.slow
def test_labeled_images_are_read_a_batch_at_a_time(classifier, model_folder, images, tmp_path, monkeypatch):
    export_onnx(classifier, tmp_path / "model.onnx", "classification")
    read, seen = [], []
    processor = BitImageProcessor.from_pretrained(model_folder)

    def counting(image, **options):
        read.append(image)
        return processor(image, **options)

    class Session:
        def __init__(self, path):
            self.session = cpu_session(path)

        def run(self, names, inputs):
            seen.append((len(read), len(inputs["pixel_values"])))
            return self.session.run(names, inputs)

    labeled = onnx_export.labeled_images(images, classifier, counting)
    assert (sorted(labeled.targets.tolist()), read) == ([0] * 6 + [1] * 6, [])
    monkeypatch.setattr(onnx_export, "cpu_session", Session)
    cost = onnx_export.int8_cost(tmp_path / "model.onnx", tmp_path / "int8.onnx", labeled, 5)
    assert seen == [(5, 5)] * 2 + [(10, 5)] * 2 + [(12, 2)] * 2 and cost["images"] == 12
    (images / "dark" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"0\.png\) cannot be read, no image: .*: repair it or leave it out"):
        onnx_export.int8_cost(tmp_path / "model.onnx", tmp_path / "int8.onnx", labeled)


@pytest.mark.slow
def test_the_command_refuses(classifier, autoencoder, model_folder, tmp_path, capsys):
    autoencoder.save_pretrained(tmp_path / "mae")
    (tmp_path / "empty").mkdir()
    names = ClassLabel(names=["cat", "dog"])
    features = Features({"image": ImageFeature(), "label": names})
    pixels = np.zeros((8, 8, 3), np.uint8)
    Dataset.from_dict({"image": [pixels], "label": [0]}, features=features).save_to_disk(tmp_path / "cats")
    for arguments, words in [
        (["nowhere", "out"], "no folder of a model"),
        ([model_folder, "out", "--task", "reconstruction"], "cannot be exported for 'reconstruction'"),
        ([tmp_path / "mae", "out", "--task", "features", "--int8", "x"], "for classifiers"),
        ([model_folder, "out", "--int8", tmp_path / "empty"], "holds no labeled images"),
        ([model_folder, "out", "--int8", tmp_path / "nowhere"], "holds no labeled images"),
        (
            [model_folder, "out", "--int8", tmp_path / "cats"],
            "the label 'cat', which the model does not know; its labels are dark, light",
        ),
        ([tmp_path / "mae", "out", "--task", "reconstruction", "--opset", "3"], "opset"),
    ]:
        assert command.main(list(map(str, arguments))) == 2, words
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as refusal:
        command.main([str(model_folder), "out", "--task", "guess"])
    assert refusal.value.code == 2
