"""Feature extraction: stage features, the cache, the folder's processor, embeddings as Parquet."""

import pytest
import torch
from datasets import DatasetDict, load_dataset
from PIL import Image
from torch.testing import assert_close
from transformers import BitImageProcessor
from transformers.image_utils import PILImageResampling

import extract_features
import linear_probe
from digits.experiment import digits_config
from hivit_hf import HiViTBackbone, HiViTForMaskedImageModeling
from hivit_hf.image_processing import evaluation_processor
from hivit_hf.probing import features
from hivit_hf.probing.features import extract, load_encoder, stage_features
from support.refusals import refusal


def test_features_are_the_means_of_the_stages(random_encoder):
    encoder = load_encoder(str(random_encoder))
    pixel_values = torch.randn(3, 3, 32, 32)
    found = stage_features(encoder.model, pixel_values)
    backbone = HiViTBackbone.from_pretrained(random_encoder, out_features=list(features.STAGES)).eval()
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
    for name, feature_map in zip(features.STAGES, maps):
        assert_close(found[name], feature_map.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    assert_close(found["fused"], torch.cat([found[name] for name in features.STAGES[1:]], dim=1))


def test_features_are_of_the_pixels_of_the_folders_processor(random_encoder, data, tmp_path):
    """Size and crop too, as in evaluations; a folder without one, or another size, has the published transform."""
    config, folder = digits_config(), tmp_path / "encoder"
    HiViTForMaskedImageModeling(config).save_pretrained(folder)
    normal = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    own = BitImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}, resample=PILImageResampling.NEAREST, **normal
    )
    own.save_pretrained(folder)
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(4))
    encoder = load_encoder(str(folder))
    found = extract(encoder, images, "image")["stage3"]
    inputs = own([image.convert("RGB") for image in images["image"]], return_tensors="pt")["pixel_values"]
    assert_close(found, stage_features(encoder.model, inputs)["stage3"], atol=1e-5, rtol=1e-4)
    smaller = load_encoder(str(folder), image_size=16).processor.to_dict()
    published = evaluation_processor(16, *normal.values()).to_dict()
    assert smaller == published
    (folder / "preprocessor_config.json").unlink()
    assert load_encoder(str(folder)).processor.to_dict() == evaluation_processor(32).to_dict()


def test_embeddings_as_parquet(random_encoder, data, tmp_path):
    path = tmp_path / "new" / "embeddings.parquet"
    arguments = f"--model_name_or_path {random_encoder} --dataset_name {data / 'few'} --split_name test".split()
    arguments += f"--output_file {path} --features stage3 stem --dataloader_num_workers 0".split()
    arguments += ["--per_device_eval_batch_size", "100"]
    assert extract_features.main(arguments) == 0
    table = load_dataset("parquet", data_files=str(path), split="train")
    images = DatasetDict.load_from_disk(data / "few")["test"]
    assert table.column_names == ["label", "stage3", "stem"] and table["label"] == images["label"]
    encoder = load_encoder(str(random_encoder))
    expected = extract(encoder, images, "image", batch_size=80)
    assert_close(torch.tensor(table["stage3"][:]), expected["stage3"], atol=1e-5, rtol=1e-4)
    assert not torch.equal(expected["stage3"][0], expected["stage3"][1])
    assert torch.tensor(table["stem"][:]).shape == (80, 32)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_no_file_is_replaced(random_encoder, data, tmp_path, capsys, monkeypatch):
    """Above all not the data."""
    monkeypatch.setattr(extract_features, "load_encoder", None)  # it is found before images are encoded
    images = tmp_path / "data" / "train.parquet"
    images.parent.mkdir()
    DatasetDict.load_from_disk(data / "few")["train"].to_parquet(images)
    content = images.read_bytes()
    arguments = ("--model_name_or_path", random_encoder, "--dataset_name", images.parent, "--output_file", images)
    said = refusal(extract_features.main, capsys, *arguments)
    assert "train.parquet exists, and is not overwritten: give another --output_file, or remove it" in said
    assert images.read_bytes() == content
    said = refusal(extract_features.main, capsys, *arguments[:-1], images / "new" / "x.parquet")
    assert "cannot be written" in said


def test_bad_input(random_encoder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract_features, "load_encoder", None)  # all is found before images are encoded
    few = DatasetDict.load_from_disk(data / "few")
    few["train"].add_column("stage3", range(len(few["train"]))).save_to_disk(tmp_path / "twice")
    digits, output = data / "digits", ("--output_dir", tmp_path / "out")
    probe, extraction = (linear_probe.main, output), (extract_features.main, ("--output_file", tmp_path / "y"))
    for (main, out), arguments, message in [
        (probe, (digits, "--neighbors", "0"), "neighbors must be a positive number, got 0"),
        (probe, (digits, "--methods", "svm"), "methods must be some of lbfgs, lars, knn, got svm"),
        (probe, (data / "several",), "holds lists"),
        (probe, (digits, "--image_size", "30"), "multiple of patch_size 8"),
        (extraction, (digits, "--split_name", "x"), "no split 'x'"),
        (extraction, (tmp_path / "x",), "There is no folder"),
        (extraction, (digits, "--output_file", tmp_path), "is a folder: give the name"),
        (extraction, (tmp_path / "twice",), "a column 'stage3' already: rename it, or leave out --features stage3"),
        (extraction, (digits, "--dataloader_num_workers", "-1"), "num_workers must not be negative, got -1"),
    ]:
        arguments = ("--model_name_or_path", random_encoder, *out, "--dataset_name", *arguments)
        assert message in refusal(main, capsys, *arguments)


def test_images_that_cannot_be_read_are_one_sentence(random_encoder, tmp_path, capsys):
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/1", "test/b/1"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    path = tmp_path / "data" / "train" / "b" / "2.png"
    path.write_bytes(b"no image")
    arguments = ("--model_name_or_path", random_encoder, "--dataset_name", tmp_path / "data")
    for workers, check in ((0, 0), (1, 0), (0, 10)):
        flags = (*arguments, "--dataloader_num_workers", workers, "--check_images", check)
        for main, output in ((linear_probe.main, "--output_dir"), (extract_features.main, "--output_file")):
            said = refusal(main, capsys, *flags, output, tmp_path / "out")
            assert said.startswith(f"error: Image 3 of train ({path}) cannot be read")


def test_a_damaged_cache_is_named(random_encoder, data, tmp_path):
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(4))
    encoder = load_encoder(str(random_encoder))
    found, _ = features.cached_features(encoder, images, "image", tmp_path)
    again, cached = features.cached_features(encoder, images, "image", tmp_path)
    assert cached and all(torch.equal(again[name], found[name]) for name in found)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"The features in {path} cannot be read .*: delete the file"):
        features.cached_features(encoder, images, "image", tmp_path)
