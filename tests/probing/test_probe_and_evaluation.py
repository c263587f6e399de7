"""Frozen features, embeddings, evaluation, robustness and soups; and what pre-training on digits is worth."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict, Value, load_dataset
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import top_k_accuracy_score
from torch.testing import assert_close
from transformers import BitImageProcessor, set_seed
from transformers.image_utils import PILImageResampling

import evaluate_classification
import extract_features
import finetune_classification
import linear_probe
from digits.data import DigitPixels, digits_dataset, digits_processor
from digits.experiment import DemoSettings, digits_config, pretrain_digits
from digits.labels import PROPERTIES, several_labels
from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.classification.evaluation import accuracy_of, load_for_evaluation, targets_for
from hivit_hf.classification.figures import calibration_figure, robustness_figure
from hivit_hf.classification.metrics import areas_under_curve, calibration, top_k_accuracy
from hivit_hf.classification.robustness import CORRUPTIONS, piece_counts, robustness, shuffle_pieces
from hivit_hf.classification.soup import soup
from hivit_hf.image_processing import evaluation_processor
from hivit_hf.probing import features as features
from hivit_hf.probing.features import extract, load_encoder, stage_features
from hivit_hf.probing.linear import probe_lars, probe_lbfgs
from hivit_hf.probing.neighbors import nearest_neighbors


EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = ["--recipe", str(EXAMPLES / "recipes" / "finetune_digits.yaml")]
SMALL = {"patch_size": 8, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}
MULTI, THRESHOLD = "multi_label_classification", 0.915


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The digits as a saved dataset, with one and with several labels."""
    folder = tmp_path_factory.mktemp("data")
    splits = digits_dataset()
    splits.save_to_disk(folder / "digits")
    DatasetDict(
        {name: splits[name].select(range(count)) for name, count in (("train", 200), ("test", 80))}
    ).save_to_disk(folder / "few")
    several_labels(splits).save_to_disk(folder / "several")
    return folder


def save_start(folder: Path) -> Path:
    digits_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_start(tmp_path_factory) -> Path:
    set_seed(0)
    folder = tmp_path_factory.mktemp("random") / "start"
    HiViTForMaskedImageModeling(digits_config()).save_pretrained(folder)
    return save_start(folder)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "start"
    pixels = DigitPixels.from_dataset(digits_dataset()["train"], digits_processor())
    pretrain_digits(pixels, DemoSettings(pretrain_epochs=16), folder)
    return save_start(folder)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory) -> list[str]:
    """Three small classifiers of digits that differ a little, the last one a lot."""
    config = HiViTConfig(
        image_size=32, patch_size=8, hidden_size=32, depths=[1, 1, 1], num_attention_heads=2,
        id2label={i: str(i) for i in range(10)}, label2id={str(i): i for i in range(10)},
    )  # fmt: skip
    set_seed(0)
    first, folders = HiViTForImageClassification(config), []
    for index, noise in enumerate((0.0, 0.01, 0.5)):
        model = HiViTForImageClassification(config)
        model.load_state_dict({k: v + noise * torch.randn_like(v) for k, v in first.state_dict().items()})
        folder = tmp_path_factory.mktemp("classifier") / str(index)
        model.save_pretrained(folder)
        digits_processor().save_pretrained(folder)
        folders.append(str(folder))
    return folders


# -- what pre-training is worth -------------------------------------------------------------------------------------


def probe(start: Path, dataset: Path, output: Path, *flags: str) -> dict:
    arguments = ["--model_name_or_path", str(start), "--dataset_name", str(dataset), "--num_workers", "0"]
    assert linear_probe.main([*arguments, "--output_dir", str(output), *flags]) == 0
    return json.loads((output / "results.json").read_text())["accuracy"]


@pytest.mark.slow
def test_pretrained_features_beat_random_ones(pretrained, random_start, data, tmp_path):
    """Thresholds between the two: measured are 0.81 and 0.67 for neighbors, 0.86 and 0.70 for the linear probe."""
    flags = ("--features", "stage3", "fused", "--methods", "knn", "lars")
    for start, is_better in ((pretrained, True), (random_start, False)):
        accuracy = probe(start, data / "digits", tmp_path / str(is_better), *flags)
        assert (accuracy["stage3"]["knn"] > 0.74) == is_better
        assert (accuracy["fused"]["lars"] > 0.78) == is_better


@pytest.mark.slow
def test_several_labels_are_learned_from_a_pretraining(pretrained, random_start, data, tmp_path):
    """Whether digits are even, above four, prime, or have a hole, after two epochs: measured are 0.95 and 0.87."""
    areas = {}
    for name, start in (("pretrained", pretrained), ("random", random_start)):
        arguments = [*DIGITS, "--problem_type", MULTI, "--epochs", "2", "--dataset_name", str(data / "several")]
        arguments += ["--model_name_or_path", str(start), "--output_dir", str(tmp_path / name)]
        assert finetune_classification.main(arguments) == 0
        areas[name] = json.loads((tmp_path / name / "eval_results.json").read_text())
    assert set(areas["random"]) >= {f"eval_auc_{label}" for label in PROPERTIES}
    assert areas["pretrained"]["eval_mean_auc"] > THRESHOLD > areas["random"]["eval_mean_auc"]


# -- features -------------------------------------------------------------------------------------------------------


def test_features_are_the_means_of_the_stages(random_start):
    encoder = load_encoder(str(random_start))
    pixel_values = torch.randn(3, 3, 32, 32)
    found = stage_features(encoder.model, pixel_values)
    backbone = HiViTBackbone.from_pretrained(random_start, out_features=list(features.STAGES)).eval()
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
    for name, feature_map in zip(features.STAGES, maps):
        assert_close(found[name], feature_map.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    assert_close(found["fused"], torch.cat([found[name] for name in features.STAGES[1:]], dim=1))


def test_features_are_computed_once(random_start, data, tmp_path, capsys, monkeypatch):
    flags = ("--features", "stem", "--methods", "lbfgs")
    first = probe(random_start, data / "few", tmp_path, *flags)
    assert "features computed" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(features, "extract", lambda *arguments: pytest.fail("computed again"))
        assert probe(random_start, data / "few", tmp_path, *flags) == first
    assert "features kept" in capsys.readouterr().out
    probe(random_start, data / "few", tmp_path, *flags, "--random_weights")
    assert "features computed" in capsys.readouterr().out
    assert probe(random_start, data / "few", tmp_path, *flags, "--image_size", "16") != first


def test_features_are_of_what_the_folders_processor_makes(random_start, data, tmp_path):
    """Size and crop too, as in evaluations; a folder without one, or another size, has the published transform."""
    config, folder = digits_config(), tmp_path / "start"
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


def test_flags_of_the_probe(random_start, data, tmp_path):
    flags = ("--features", "stage3", "--methods", "lbfgs", "lars", "knn")
    plain = probe(random_start, data / "few", tmp_path, *flags)["stage3"]
    changed = ("--neighbors", "1", "--strength", "100", "--lars_epochs", "18")
    assert all(
        probe(random_start, data / "few", tmp_path, *flags, *changed)["stage3"][name] != plain[name] for name in plain
    )
    slower = probe(random_start, data / "few", tmp_path, *flags, "--lars_learning_rate", "0.1")["stage3"]
    assert slower["lars"] < plain["lars"] and slower["knn"] == plain["knn"]


def test_probes_learn_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 3
    rows = torch.nn.functional.one_hot(labels, 8).float() + 0.3 * torch.randn(200, 8, generator=generator)
    for method in (probe_lbfgs, probe_lars):
        assert top_k_accuracy(method(rows[:150], labels[:150], rows[150:]), labels[150:].numpy(), 1) > 0.9
    assert (nearest_neighbors(rows[:150], labels[:150], rows[150:]) == labels[150:]).float().mean() > 0.9
    skipped = torch.tensor([0, 2, 4]).repeat(50)  # classes 1 and 3 never occur
    assert probe_lbfgs(rows[:150], skipped, rows[150:]).shape == (50, 5)


def test_embeddings_as_parquet(random_start, data, tmp_path):
    path = tmp_path / "new" / "embeddings.parquet"
    arguments = ["--model_name_or_path", str(random_start), "--dataset_name", str(data / "few"), "--split", "test"]
    arguments += ["--output", str(path), "--features", "stage3", "stem", "--num_workers", "0", "--batch_size", "100"]
    assert extract_features.main(arguments) == 0
    table = load_dataset("parquet", data_files=str(path), split="train")
    images = DatasetDict.load_from_disk(data / "few")["test"]
    assert table.column_names == ["label", "stage3", "stem"] and table["label"] == images["label"]
    encoder = load_encoder(str(random_start))
    expected = extract(encoder, images, "image", batch_size=80)
    assert_close(torch.tensor(table["stage3"][:]), expected["stage3"], atol=1e-5, rtol=1e-4)
    assert not torch.equal(expected["stage3"][0], expected["stage3"][1])
    assert torch.tensor(table["stem"][:]).shape == (80, 32)


# -- evaluation -----------------------------------------------------------------------------------------------------


def judge(models: list[str], data: Path, output: Path, *flags: str) -> dict:
    arguments = ["--model_name_or_path", *models, "--dataset_name", str(data / "few")]
    assert evaluate_classification.main([*arguments, "--output_dir", str(output), *flags]) == 0
    return json.loads((output / "results.json").read_text())


def test_evaluation_through_evaluate(classifiers, data, tmp_path, capsys):
    results = judge(classifiers[:1], data, tmp_path, "--max_samples", "60", "--batch_size", "16")
    model, processor = load_for_evaluation(classifiers[0])
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(60))
    inputs = processor([image.convert("RGB") for image in images["image"]], return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(dim=1).numpy()
    labels = np.array(images["label"])
    assert results["images"] == 60
    assert results["accuracy"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean())
    assert results["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert results["samples_per_second"] > 0
    assert np.sum(results["confusion_matrix"]) == 60
    assert np.trace(results["confusion_matrix"]) == pytest.approx(60 * results["accuracy"])
    assert results["expected_calibration_error"] == pytest.approx(
        calibration(probabilities, labels)["expected_calibration_error"], abs=1e-4
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {"confusion_matrix.png", "calibration.png"}
    assert "accuracy" in capsys.readouterr().out


def test_labels_are_matched_by_name(classifiers, data):
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(20))
    model, _ = load_for_evaluation(classifiers[0])
    model.config.label2id = {str(i): 9 - i for i in range(10)}
    assert targets_for(model, images, "test").tolist() == [9 - label for label in images["label"]]


def test_bare_numbers_are_named_as_in_finetuning(data, tmp_path, capsys):
    """In reverse, so that a name in the wrong place would show."""
    names = [f"digit {number}" for number in range(9, -1, -1)]
    splits = DatasetDict.load_from_disk(data / "few").cast_column("label", Value("int64"))
    splits.save_to_disk(tmp_path / "few")
    flags = ["--dataset_name", str(tmp_path / "few"), "--label_names", *names]
    start = ["--from_scratch", "--architecture", "tiny", "--model", json.dumps(SMALL), "--image_size", "16"]
    small = ["--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0", "--batch_size", "50"]
    small += ["--effective_batch_size", "50", "--mixed_precision", "no", "--output_dir", str(tmp_path / "model")]
    assert finetune_classification.main([*start, *flags, *small]) == 0
    trained = json.loads((tmp_path / "model" / "eval_results.json").read_text())["eval_accuracy"]
    judged = judge([str(tmp_path / "model")], tmp_path, tmp_path / "out", "--label_names", *names)
    assert judged["accuracy"] == pytest.approx(trained)
    both = [str(tmp_path / "model")] * 2
    greedy = ("--soup", "greedy", "--soup_split", "test", "--label_names", *names)
    assert judge(both, tmp_path, tmp_path / "soup", *greedy)["soup"]["accuracy"][both[0]] == pytest.approx(trained)
    model, _ = load_for_evaluation(both[0])
    assert targets_for(model, splits["test"], "test", None, names).tolist() == list(splits["test"]["label"])
    assert targets_for(model, splits["test"], "test", None, names[::-1]).tolist() == [
        9 - label for label in splits["test"]["label"]
    ]
    arguments = (
        "--model_name_or_path",
        both[0],
        "--dataset_name",
        tmp_path / "few",
        "--output_dir",
        tmp_path / "other",
    )
    said = refusal(evaluate_classification.main, capsys, *arguments)
    assert "the label '0', which the model does not know; its labels are digit 9, digit 8, digit 7, digit 6" in said
    assert "name them with --class_names" in said
    assert "there are 2 classes, 0 to 1" in refusal(
        evaluate_classification.main, capsys, *arguments, "--label_names", *names[:2]
    )


def test_damage_of_images():
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for kind, (corrupt, strengths) in CORRUPTIONS.items():
        distances = []
        for strength in (strengths[0], strengths[-1]):
            damaged = corrupt(pixels, strength)
            assert damaged.shape == pixels.shape and damaged.dtype == torch.uint8, kind
            distances.append((damaged.float() - pixels.float()).abs().mean().item())
        assert distances[0] > 0, kind
        assert distances[1] > distances[0], kind
    shuffled = shuffle_pieces(pixels, 4)
    assert not torch.equal(shuffled, pixels)
    assert torch.equal(shuffled.flatten(1).sort(dim=1).values, pixels.flatten(1).sort(dim=1).values)
    corner = {
        tuple(piece.flatten().tolist()) for piece in pixels[0, 0].unfold(0, 28, 28).unfold(1, 28, 28).flatten(0, 1)
    }
    assert tuple(shuffled[0, 0, :28, :28].flatten().tolist()) in corner
    assert piece_counts(14) == [2, 7, 14] and piece_counts(4) == [2, 4]


def test_robustness_of_a_classifier(classifiers, data, tmp_path):
    results = judge(classifiers[:1], data, tmp_path, "--max_samples", "40", "--robustness", "--severities", "1", "5")
    assert results["settings"]["model_name_or_path"] == classifiers[:1] and results["settings"]["split"] == "test"
    table = results["robustness"]
    assert set(table) == {"none", "patch drop", "patch shuffle", *CORRUPTIONS}
    assert table["none"]["0"] == pytest.approx(results["accuracy"])
    assert set(table["jpeg"]) == {"1", "5"} and set(table["patch drop"]) == {"0.1", "0.9"}
    assert set(table["patch shuffle"]) == {"2", "4"}
    assert (tmp_path / "robustness.png").exists()
    model, processor = load_for_evaluation(classifiers[0])
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(20))
    seen = []
    model.hivit.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    again = robustness(model, processor, images, "image", targets_for(model, images, "test"), [5])
    masks = [mask for mask in seen if mask is not None]
    assert len(masks) == 1 and masks[0].sum(dim=1).tolist() == [14] * 20
    assert again["patch drop"].keys() == {"0.9"}


@pytest.mark.parametrize(
    "step",
    [
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.2, "image_std": 0.3},
    ],
    ids=["no normalization", "no rescaling", "another scale", "numbers"],
)
def test_robustness_sees_pixels_as_the_processor_makes_them(step, data):
    settings = digits_processor().to_dict() | step
    processor = BitImageProcessor(**{key: settings[key] for key in settings if key != "image_processor_type"})
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(4))
    seen = []
    model = HiViTForImageClassification(HiViTConfig(**SMALL, image_size=32, num_labels=10)).eval()
    model.hivit.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    robustness(model, processor, images, "image", torch.zeros(4, dtype=torch.long), [1])
    expected = processor([image.convert("RGB") for image in images["image"]], return_tensors="pt")
    assert_close(seen[0], expected["pixel_values"], atol=2e-4, rtol=1e-5)


# -- soups ----------------------------------------------------------------------------------------------------------


def test_uniform_soup_is_the_mean(classifiers, data, tmp_path):
    results = judge(classifiers, data, tmp_path, "--soup", "uniform", "--max_samples", "10")
    assert results["soup"]["ingredients"] == classifiers
    states = [load_file(Path(folder) / "model.safetensors") for folder in classifiers]
    stirred = load_file(tmp_path / "soup" / "model.safetensors")
    for name, tensor in stirred.items():
        assert_close(tensor, torch.stack([state[name] for state in states]).mean(dim=0))
    assert load_for_evaluation(str(tmp_path / "soup"))[1].size == digits_processor().size


def test_greedy_soup_takes_what_does_no_harm(classifiers, data, tmp_path):
    results = judge(classifiers, data, tmp_path, "--soup", "greedy", "--soup_split", "train", "--max_samples", "10")
    scores, taken = results["soup"]["accuracy"], results["soup"]["ingredients"]
    assert scores[taken[0]] == max(scores.values())
    held_out = DatasetDict.load_from_disk(data / "few")["train"]
    model, processor = load_for_evaluation(str(tmp_path / "soup"))
    reached = accuracy_of(model, processor, held_out, "image", targets_for(model, held_out, "train"))
    assert reached >= max(scores.values())
    states = [load_file(Path(folder) / "model.safetensors") for folder in taken]
    assert_close(model.classifier.weight.data, torch.stack([s["classifier.weight"] for s in states]).mean(dim=0))


def test_greedy_soup_leaves_out_what_harms(classifiers):
    weights = [load_file(Path(folder) / "model.safetensors")["classifier.weight"] for folder in classifiers]
    best = (weights[0] + weights[1]) / 2
    tried = []

    def closeness(model, processor) -> float:
        assert processor.size == digits_processor().size
        tried.append(-(model.classifier.weight - best).abs().sum().item())
        return tried[-1]

    model, _, made = soup([classifiers[i] for i in (2, 0, 1)], "greedy", closeness)
    assert set(made["ingredients"]) == set(classifiers[:2])
    assert_close(model.classifier.weight.data, best)
    assert len(tried) == 5


# -- what is refused ------------------------------------------------------------------------------------------------


def refusal(main, capsys, *arguments) -> str:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and "Traceback" not in "".join(said)
    return said[-1]


def test_figures_of_two_evaluations_do_not_mix(classifiers, data, tmp_path, capsys):
    judge(classifiers[:1], data, tmp_path, "--max_samples", "10")
    before = (tmp_path / "results.json").read_bytes()
    arguments = ("--model_name_or_path", classifiers[1], "--dataset_name", data / "digits", "--output_dir", tmp_path)
    assert "holds results.json of another evaluation" in refusal(evaluate_classification.main, capsys, *arguments)
    assert (tmp_path / "results.json").read_bytes() == before


def test_bad_input_of_the_scripts(classifiers, random_start, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extract_features, "load_encoder", None)  # all is found before images are encoded
    few = DatasetDict.load_from_disk(data / "few")
    few["train"].add_column("stage3", range(len(few["train"]))).save_to_disk(tmp_path / "twice")
    digits, output = data / "digits", ("--output_dir", tmp_path / "out")
    for arguments, message in [
        ((*classifiers, "--dataset_name", digits, *output), "make a soup: add --soup uniform"),
        ((classifiers[0], "--soup", "uniform", "--dataset_name", digits, *output), "needs two folders or more, got 1"),
        ((*classifiers, "--soup", "greedy", "--dataset_name", digits, *output), "There is no split 'validation'"),
        ((classifiers[0], random_start, "--soup", "uniform", "--dataset_name", digits, *output), "is no classifier"),
        ((random_start, "--dataset_name", digits, *output), "is no classifier: fine-tune it first"),
        ((classifiers[0], "--dataset_name", data / "several", *output), "holds lists: give --problem_type"),
        ((classifiers[0], "--dataset_name", digits, "--split", "val", *output), "There is no split 'val'"),
        (
            (classifiers[0], "--dataset_name", digits, "--batch_size", "0", *output),
            "--batch_size must be positive",
        ),
        ((tmp_path / "none", "--dataset_name", digits, *output), "There is no folder"),
    ]:
        said = refusal(evaluate_classification.main, capsys, "--model_name_or_path", *arguments)
        assert message in said
    model = ("--model_name_or_path", random_start)
    for main, arguments, message in [
        (linear_probe.main, (*model, "--dataset_name", digits, "--neighbors", "0", *output), "neighbors must be pos"),
        (linear_probe.main, (*model, "--dataset_name", data / "several", *output), "holds lists"),
        (
            linear_probe.main,
            (*model, "--dataset_name", digits, "--image_size", "30", *output),
            "multiple of patch_size 8",
        ),
        (extract_features.main, (*model, "--dataset_name", digits, "--split", "x", "--output", "y"), "no split 'x'"),
        (extract_features.main, (*model, "--dataset_name", tmp_path / "x", "--output", "y"), "There is no folder"),
        (extract_features.main, (*model, "--dataset_name", digits, "--output", tmp_path), "is a folder: give the name"),
        (
            extract_features.main,
            (*model, "--dataset_name", tmp_path / "twice", "--output", "y"),
            "a column 'stage3' already: rename it, or leave out --features stage3",
        ),
        (
            extract_features.main,
            (*model, "--dataset_name", digits, "--output", "y", "--num_workers", "-1"),
            "--num_workers must not be negative, got -1",
        ),
    ]:
        assert message in refusal(main, capsys, *arguments)


def test_images_that_cannot_be_read_are_one_sentence(random_start, tmp_path, capsys):
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/1", "test/b/1"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path)
    path = tmp_path / "data" / "train" / "b" / "2.png"
    path.write_bytes(b"no image")
    arguments = ("--model_name_or_path", random_start, "--dataset_name", tmp_path / "data")
    for workers, check in ((0, 0), (1, 0), (0, 10)):
        flags = (*arguments, "--num_workers", workers, "--check_images", check)
        for main, output in ((linear_probe.main, "--output_dir"), (extract_features.main, "--output")):
            said = refusal(main, capsys, *flags, output, tmp_path / "out")
            assert said.startswith(f"error: Image 3 of train ({path}) cannot be read")


def test_soups_of_other_networks(classifiers, data, tmp_path, capsys):
    other = HiViTForImageClassification(
        HiViTConfig(image_size=32, patch_size=8, hidden_size=32, depths=[1, 1, 2], num_attention_heads=2)
    )
    other.save_pretrained(tmp_path / "other")
    arguments = ("--model_name_or_path", classifiers[0], tmp_path / "other", "--soup", "uniform")
    arguments += ("--dataset_name", data / "digits", "--output_dir", tmp_path / "out")
    assert "have other networks or labels" in refusal(evaluate_classification.main, capsys, *arguments)


def test_soups_of_classifiers_that_see_images_otherwise(classifiers, data, tmp_path, capsys):
    usual = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    usual |= {"size": {"height": 32, "width": 32}}
    for field, changes in (
        ("image_mean", {"image_mean": [0.4, 0.5, 0.5]}),
        ("image_std", {"image_std": [0.5, 0.5, 0.4]}),
        ("size", {"size": {"height": 36, "width": 36}}),
        ("crop_size", {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}),
    ):
        other = tmp_path / field
        shutil.copytree(classifiers[0], other)
        BitImageProcessor(**usual | changes).save_pretrained(other)
        arguments = ("--model_name_or_path", classifiers[0], other, "--soup", "uniform")
        arguments += ("--dataset_name", data / "digits", "--output_dir", tmp_path / "out")
        said = refusal(evaluate_classification.main, capsys, *arguments)
        assert f"{classifiers[0]} and {other} have image processors of another {field}, " in said
    same = BitImageProcessor(**usual, crop_size={"height": 7, "width": 7})  # which it leaves out
    same.save_pretrained(other)
    assert soup([classifiers[0], str(other)], "uniform", None)[2]["ingredients"] == [classifiers[0], str(other)]


def test_metrics_of_edge_cases():
    assert top_k_accuracy(np.eye(3), np.arange(3), 5) == 1.0
    scores = np.array([[0.1, 0.2], [0.3, 0.1], [0.2, 0.9]])
    assert areas_under_curve(scores, np.array([[0, 1], [1, 1], [0, 1]])) == [1.0, None]
    sure = calibration(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert sure == {
        "expected_calibration_error": 0.5,
        "bins": [{"confidence": 1.0, "accuracy": 0.5, "count": 2}],
    }
    for draw in (lambda: calibration_figure([], 0.0), lambda: robustness_figure({})):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()
