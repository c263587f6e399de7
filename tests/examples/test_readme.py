"""The README says what is so: its code runs, its figures are those of the result files and of the network."""

import importlib
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hivit_hf import ARCHITECTURES, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
ROOMS = ("training", "pretraining", "classification", "segmentation", "detection")


def test_benchmark_tables_are_those_of_the_result_files():
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), "--check"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_reading_is_as_fast_as_the_result_file_says():
    sets = json.loads((ROOT / "benchmarks" / "results" / "loader_cpu.json").read_text())["sets"]
    told = re.search(
        r"reduction .*?: ([\d.]+) times .*? 500x375 px, ([\d.]+) times on 12", README, flags=re.DOTALL
    ).groups()
    measured = [sets[name]["ours_is_faster_by"]["ImageFolder"] for name in ("500x375", "4000x3000")]
    assert list(told) == [f"{factor:.1f}" for factor in measured]


def test_architecture_table_is_that_of_the_network():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| ([\d, ]+) \| (\d+) \| ([\d,]+) \|", README, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(ARCHITECTURES)
    for name, channels, depths, heads, parameters in rows:
        config = HiViTConfig.from_architecture(name, num_labels=1000)
        written = int(channels), [int(d) for d in depths.split(",")], int(heads)
        assert (config.hidden_size, config.depths, config.num_attention_heads) == written
        with torch.device("meta"):
            model_class = HiViTForMaskedImageModeling if name == "base-mae" else HiViTForImageClassification
            model = model_class(config)
        assert f"{model.num_parameters():,}" == parameters


def test_the_code_under_use_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"## Use\n\n```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].shape == (2, 3, 224, 224)
    assert names["classifier"].config.num_labels == 10
    shapes = [tuple(feature_map.shape) for feature_map in names["backbone"](names["pixel_values"]).feature_maps]
    assert f"# {shapes}" in code


def test_every_example_has_a_line_and_a_command_that_its_flags_allow(monkeypatch, capsys):
    page = (ROOT / "examples" / "README.md").read_text()
    scripts = [path.name for path in SCRIPTS]
    commands = re.search(r"```\n(.*?)```", page, flags=re.DOTALL).group(1).splitlines()
    assert sorted(re.findall(r"^\| \[`(\w+\.py)`\]", page, flags=re.MULTILINE)) == scripts
    assert sorted(re.search(r"examples/(\w+\.py)", command).group(1) for command in commands) == scripts
    for command in commands:
        words = command.split()
        script = ROOT / next(word for word in words if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        help_text = capsys.readouterr().out
        for flag in (word for word in words if word.startswith("--")):
            assert flag in help_text, (command, flag)
        for path in (word for word in words if word.startswith("examples/")):
            assert (ROOT / path).exists(), path


def argument_classes() -> list[type]:
    """All dataclasses of arguments in the package and in the scripts."""
    modules = [importlib.import_module(f"hivit_hf.{room}.arguments") for room in ROOMS]
    modules += [importlib.import_module(path.stem) for path in SCRIPTS]
    kinds = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    found = {kind for kind in kinds if is_dataclass(kind) and kind.__name__.endswith("Arguments")}
    return sorted(found - {TrainingArguments}, key=str)


@pytest.mark.parametrize("kind", argument_classes(), ids=lambda kind: kind.__name__)
def test_help_texts_are_phrases_that_end(kind):
    """Those of our own fields: from a capital letter to a full stop, in the words of the field."""
    names = {name for base in kind.__mro__ if base.__module__ != "transformers.training_args" for name in vars(base)}
    ours = [field for field in fields(kind) if field.name in names & set(kind.__annotations__)]
    for field in ours:
        text = field.metadata["help"]
        assert (text[0].isupper() or text.startswith("timm")) and text.endswith((".", "...")), (field.name, text)
        assert not re.search(r"so many|pictures?\b|judge|learn from", text), (field.name, text)
