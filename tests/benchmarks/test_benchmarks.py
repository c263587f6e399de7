"""The benchmarks compare equal things: the model in the original's order of operations gives the numbers of ours."""

import copy
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling
from original_order import reorder


ROOT = Path(__file__).parents[2]
# on a GPU only
BY_HAND = {"training.py"}


def test_make_bench_runs_every_benchmark_with_flags_that_it_has(monkeypatch, capsys):
    """And the browser page after the models that it opens."""
    made = subprocess.run(["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"^\S+python (benchmarks/\w+\.py)(.*)$", made, flags=re.MULTILINE)
    written = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "write(" in path.read_text()} - {
        "measure.py"
    }
    assert {Path(script).name for script, _ in commands} == written - BY_HAND | {"table.py"}
    assert made.index("browser/models/classifier") < made.index("benchmarks/browser.py")
    assert commands[-1] == ("benchmarks/table.py", "")
    for script, flags in commands:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        help_text = capsys.readouterr().out
        assert all(flag in help_text for flag in re.findall(r"--\w+", flags)), (script, flags)


@pytest.mark.parametrize("bias", [True, False])
def test_original_order_equals_ours(bias, tiny_config, redraw):
    config = tiny_config(use_relative_position_bias=bias)
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    ours = redraw(HiViTForMaskedImageModeling(config))
    original = reorder(copy.deepcopy(ours))
    expected, output = ours(pixel_values, noise=noise), original(pixel_values, noise=noise)
    assert type(original.hivit.stages[0].merge) is not type(ours.hivit.stages[0].merge)
    assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    classifier = redraw(HiViTForImageClassification(tiny_config(use_relative_position_bias=bias)))
    expected = classifier(pixel_values).logits
    assert_close(reorder(classifier)(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)
