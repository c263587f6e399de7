"""Several processes take the steps that one takes, with DDP, with FSDP2 and with DeepSpeed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import load_file
from torch.testing import assert_close

import kill_test
from hivit_hf import HiViTForMaskedImageModeling
from hivit_hf.pretraining.arguments import PretrainRecipe
from hivit_hf.pretraining.checkpoint import check_resumption
from hivit_hf.pretraining.zero import configure_deepspeed


ROOT = Path(__file__).parents[2]
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason='DeepSpeed is not installed: pip install "hivit-hf[deepspeed]"'
)


def launch(processes, script, *arguments):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, str(ROOT / "tests" / script), *map(str, arguments)]
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


@pytest.mark.parametrize(
    ("plugin", "numbers", "message"),
    [
        ({"zero_stage": 3}, {}, "zero_stage must be 1 or 2, got 3"),
        ({"offload_optimizer_device": "cpu"}, {}, "offload_optimizer_device must be none, got cpu"),
        ({}, {"mixed_precision": "fp16"}, "must be bf16 or no"),
        ({}, {"compile": True}, "compile is not for DeepSpeed"),
        ({"gradient_accumulation_steps": 3}, {}, "gradient_accumulation_steps is 3 for DeepSpeed, but 2"),
        ({"gradient_clipping": 1.0}, {}, "gradient_clipping is 1.0 for DeepSpeed, but 0.0"),
    ],
)
def test_deepspeed_is_refused_where_it_is_not_the_recipe(plugin, numbers, message):
    plugin = DeepSpeedPlugin(**{"zero_stage": 2, **plugin})
    numbers = {"dataset_name": ["none"], "images_per_epoch": 16, "batch_size": 4, "effective_batch_size": 16} | numbers
    with pytest.raises(ValueError, match=message):
        configure_deepspeed(SimpleNamespace(deepspeed_plugin=plugin, num_processes=2), PretrainRecipe(**numbers))


def test_deepspeed_resumes_with_as_many_processes_only():
    manifest = {"recipe": {}, "topology": {"processes": 2}, "sharded_by": "DeepSpeed"}
    now = {**manifest, "topology": {"processes": 4}}
    with pytest.raises(ValueError, match="2 processes, now there are 4"):
        check_resumption(Path("step"), manifest, now, allow_topology_change=True)
    manifest["sharded_by"] = now["sharded_by"] = "FSDP"
    assert check_resumption(Path("step"), manifest, now, allow_topology_change=True)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeed_takes_the_steps_of_ddp(tmp_path):
    flags = ["--clip", "--precision", "bf16"]
    losses, weights = take_steps(tmp_path / "ddp", 2, *flags)
    for stage in ("1", "2"):
        zero_losses, zero_weights = take_steps(tmp_path / stage, 2, *flags, "--zero", stage)
        assert zero_losses == pytest.approx(losses, rel=1e-6)
        assert set(weights) == set(zero_weights)
        for name, tensor in weights.items():
            assert_close(zero_weights[name], tensor, atol=2e-5, rtol=1e-4)  # unclipped ones are 8e-5 away


@needs_deepspeed
@pytest.mark.slow
def test_a_run_under_deepspeed_loses_a_checkpoint_and_goes_on_exactly(tmp_path):
    data = kill_test.write_images(tmp_path / "data", "tar")
    for name, steps, *flags in [("whole", 12), ("part", 7, "--lose_write"), ("part", 12)]:
        finished = launch(2, "parallel_run.py", data, tmp_path / name, steps, "--zero", "2", *flags)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert ("step 5 could not be written" in finished.stderr) == bool(flags)
    assert "resumed step-00000007" in finished.stdout
    assert kill_test.compare(tmp_path / "whole", tmp_path / "part") == (12, 0)
    averages = [(tmp_path / name / "model_ema" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert averages[0] == averages[1]
    HiViTForMaskedImageModeling.from_pretrained(tmp_path / "part" / "model")


@pytest.mark.slow
def test_a_run_under_fsdp2_with_unequal_shares_goes_on_exactly(tmp_path):
    output = tmp_path / "whole"
    data = kill_test.write_images(tmp_path / "data", "tar")
    for number in range(2, 7):
        (data / f"{number}.tar").unlink()  # of shards with 20, 20 and 13 images one process has two, the other one
    for name, steps, flags in [
        ("ddp", 7, []),
        ("whole", 12, ["--fsdp"]),
        ("part", 7, ["--fsdp"]),
        ("part", 12, ["--fsdp"]),
    ]:
        finished = launch(2, "parallel_run.py", data, tmp_path / name, steps, *flags)
        assert finished.returncode == 0, finished.stderr[-3000:]
    assert "resumed step-00000007" in finished.stdout
    assert kill_test.compare(tmp_path / "whole", tmp_path / "part") == (12, 0)
    for copied, sharded in zip(kill_test.records(tmp_path / "ddp"), kill_test.records(output)):
        for step, (record,) in copied.items():
            assert float.fromhex(record["loss"]) == pytest.approx(float.fromhex(sharded[step][0]["loss"]), rel=2e-6)
    read = [{name for (record,) in steps.values() for name in record["samples"]} for steps in kill_test.records(output)]
    assert len(read[0] | read[1]) == 53  # nothing left out, and nobody waited for the other
    HiViTForMaskedImageModeling.from_pretrained(tmp_path / "part" / "model")
