"""Several ranks take the steps that one takes, with DDP and with FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import kill_test
from hivit_hf import HiViTForMaskedImageModeling


ROOT = Path(__file__).parents[2]


def launch(processes, script, *arguments):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(ROOT / name) for name in ("src", "tests", "examples")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(ROOT / "tests" / "support" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def take_steps(output, processes, *flags):
    finished = launch(processes, "parallel_steps.py", output, *flags)
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


@pytest.mark.slow
def test_fsdp2_in_bfloat16_sees_the_pixels_and_masks_of_ddp(tmp_path):
    losses, weights = take_steps(tmp_path / "ddp", 2, "--bf16")
    fsdp_losses, fsdp_weights = take_steps(tmp_path / "fsdp", 2, "--bf16", "--fsdp")
    assert fsdp_losses == pytest.approx(losses, rel=2e-5)  # 65 times as much with pixels and loss in bfloat16
    for name, tensor in weights.items():
        assert_close(fsdp_weights[name], tensor, atol=5e-4, rtol=1e-3)  # after 8 steps of 1e-3


@pytest.mark.slow
def test_a_run_under_fsdp2_with_data_of_unequal_size_resumes_exactly(tmp_path):
    output = tmp_path / "whole"
    data = kill_test.write_images(tmp_path / "data", "tar")
    for number in range(2, 7):
        (data / f"{number}.tar").unlink()  # of shards with 20, 20 and 13 images one rank has two, the other one
    for name, steps, flags in [
        ("ddp", 7, []),
        ("whole", 12, ["--fsdp"]),
        ("part", 7, ["--fsdp"]),
        ("part", 12, ["--fsdp"]),
    ]:
        finished = launch(2, "parallel_run.py", data, tmp_path / name, steps, *flags)
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert "resumes from step-00000007" in finished.stdout
    assert kill_test.compare(tmp_path / "whole", tmp_path / "part") == (12, 0)
    for copied, sharded in zip(kill_test.records(tmp_path / "ddp"), kill_test.records(output)):
        for step, (record,) in copied.items():
            assert float.fromhex(record["loss"]) == pytest.approx(float.fromhex(sharded[step][0]["loss"]), rel=2e-6)
    read = [{name for (record,) in steps.values() for name in record["samples"]} for steps in kill_test.records(output)]
    assert len(read[0] | read[1]) == 53  # nothing left out, and no rank waited for the other
    HiViTForMaskedImageModeling.from_pretrained(tmp_path / "part" / "model")
