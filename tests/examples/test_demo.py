"""The digits demonstration through its command line, with a handful of steps."""

import base64
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoImageProcessor, AutoModelForImageClassification

from digits.experiment import run_quietly
from hivit_hf import HiViTForMaskedImageModeling


REPOSITORY = Path(__file__).parents[2]
FIELDS = {
    "fast", "seeds", "network", "parameters", "images", "pretraining", "finetuning", "accuracy",
    "evaluation", "fresh_process", "predictions", "versions", "device", "seconds",
}  # fmt: skip


def run_demo(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "demo_digits.py"), *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "output"
    run = run_demo("--fast", "--seeds", "2", "--output_dir", str(folder))
    assert run.returncode == 0, run.stderr[-3000:]
    assert "index.html" in run.stdout
    return folder


@pytest.fixture(scope="module")
def metrics(output) -> dict:
    return json.loads((output / "metrics.json").read_text())


def numbers_in(value) -> list[float]:
    """All numbers anywhere inside a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_metrics_are_complete_and_finite(metrics):
    assert set(metrics) == FIELDS
    numbers = numbers_in(metrics)
    assert len(numbers) > 150
    assert all(math.isfinite(number) for number in numbers)
    assert metrics["images"] == {"train": 1347, "holdout": 450}
    assert set(metrics["seconds"]) >= {"pretraining", "finetuning", "total"}


def test_every_run_of_the_comparison_is_there(metrics):
    for labels in ("all_labels", "few_labels"):
        for start in ("pretrained", "scratch"):
            runs = metrics["finetuning"][labels][start]
            per_seed = metrics["accuracy"][labels][start]["per_seed"]
            assert [run["seed"] for run in runs] == metrics["seeds"] == [0, 1]
            assert [run["accuracy"] for run in runs] == per_seed
            assert metrics["accuracy"][labels][start]["mean"] == pytest.approx(sum(per_seed) / 2)


def test_confusion_matrix_counts_the_holdout(metrics):
    matrix = metrics["evaluation"]["confusion_matrix"]
    assert sum(map(sum, matrix)) == 450
    hits = sum(matrix[i][i] for i in range(10)) / 450
    assert hits == pytest.approx(metrics["evaluation"]["accuracy"])
    assert hits == pytest.approx(metrics["accuracy"]["all_labels"]["pretrained"]["per_seed"][0])


def test_the_page_begins_with_results(metrics, output):
    page = (output / "index.html").read_text()
    cards = re.findall(r'class="headline">.*?<b>(.*?)</b>', page)
    means = [metrics["accuracy"][labels]["pretrained"]["mean"] for labels in ("all_labels", "few_labels")]
    assert cards[:2] == [f"{100 * mean:.1f} %" for mean in means] and cards[3] == "450 of 450"
    assert "This was a fast run" in page


def test_page_is_self_contained(output):
    page = (output / "index.html").read_text()
    references = re.findall(r"""(?:src|href|srcset|data|poster)\s*=\s*["']([^"']*)""", page)
    assert len(references) >= 15
    for reference in references:
        kind, content = reference.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert "<script" not in page
    assert "<link" not in page
    assert "http" not in page


def test_saved_classifier_predicts_what_the_page_says(output, metrics):
    fresh = metrics["fresh_process"]
    assert fresh["images"] == 450
    assert fresh["labels_equal"]
    assert fresh["pipeline_labels_equal"]
    assert fresh["largest_probability_difference"] < 1e-5
    model = AutoModelForImageClassification.from_pretrained(output / "model")
    processor = AutoImageProcessor.from_pretrained(output / "model")
    images = load_from_disk(str(output / "holdout"))["image"]
    for example in metrics["predictions"][:3]:
        inputs = processor(images[example["index"]].convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            best = model(**inputs).logits.softmax(dim=1).max(dim=1)
        assert model.config.id2label[best.indices.item()] == example["pipeline"][0]["label"]
        assert best.values.item() == pytest.approx(example["pipeline"][0]["score"], abs=1e-4)


def test_the_three_lines_of_the_readme_run(output):
    code = re.search(r"```python\n(import hivit_hf .*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line]) == 3
    code = code.replace("demo_output", str(output))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "'label': '" in run.stdout


def test_pretrained_folder_holds_encoder_and_decoder(output):
    model, loading = HiViTForMaskedImageModeling.from_pretrained(output / "pretrained", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.config.patch_size == 8


def test_impossible_number_of_seeds_is_refused_at_once(tmp_path):
    run = run_demo("--seeds", "0", "--output_dir", str(tmp_path / "never"))
    assert run.returncode == 2
    assert "--seeds must be at least 1, got 0" in run.stderr
    assert not (tmp_path / "never").exists()


def test_ctrl_c_within_a_step_ends_the_demonstration():
    with pytest.raises(KeyboardInterrupt):
        run_quietly(lambda flags: 130, [])


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    run = run_demo("--fast", "--output_dir", str(tmp_path))
    assert run.returncode == 2 and f"{tmp_path} is not of an earlier demonstration" in run.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "model.safetensors"]
