"""The README says what is so: its code runs, its figures are those of the result files and of the network."""

import argparse
import json
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from hivit_hf import ARCHITECTURES, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.classification.arguments_old import FinetuneRecipe
from hivit_hf.detection.arguments import DetectionRecipe
from hivit_hf.segmentation.arguments import SegmentationRecipe


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
IMPERATIVES = """
    Accumulate Apply Begin Blend Change Choose Compile Compute Count Crop Cut Decay Decode Divide Draw Drop End
    Evaluate Fill Find Flip Hide Hold Jitter Keep Learn Limit Look Lower Make Mix Multiply Name Print Probe Reach
    Read Resize Resume Save Say Scale Seed Set Shuffle Skip Spread Start Stop Subtract Take Track Train Upload Write
"""


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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_texts_are_sentences(script, monkeypatch):
    """Every flag of every script: from a capital letter to a full stop."""
    parsers = []

    def seize(parser: argparse.ArgumentParser, *arguments, **keywords):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", seize)
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    actions = [action for action in parsers[0]._actions if action.dest != "help"]
    assert actions
    for action in actions:
        assert action.help and action.help[0].isupper() and action.help.endswith("."), action


@pytest.mark.parametrize("recipe", [FinetuneRecipe, SegmentationRecipe, DetectionRecipe])
def test_help_texts_of_recipes_say_what_to_do(recipe):
    for field in fields(recipe):
        assert field.metadata["help"].split()[0] in IMPERATIVES.split(), field.name
