"""Several processes take the steps that one takes, with DDP and with FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close


ROOT = Path(__file__).parents[1]


def take_steps(output, processes, *flags):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(ROOT / "tests" / "parallel_steps.py"), str(output), *flags]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((output / "losses.json").read_text()), load_file(output / "model.safetensors")


@pytest.mark.slow
def test_one_process_two_with_ddp_and_two_with_fsdp2(tmp_path):
    losses, weights = take_steps(tmp_path / "one", 1)
    ddp_losses, ddp_weights = take_steps(tmp_path / "ddp", 2)
    fsdp_losses, fsdp_weights = take_steps(tmp_path / "fsdp", 2, "--fsdp")
    assert len(set(losses)) == 8
    assert ddp_losses == pytest.approx(losses, rel=1e-6)
    assert fsdp_losses == ddp_losses
    assert set(weights) == set(ddp_weights) == set(fsdp_weights)
    for name, tensor in weights.items():
        assert_close(ddp_weights[name], tensor, atol=2e-5, rtol=1e-4)
        assert torch.equal(fsdp_weights[name], ddp_weights[name]), name
