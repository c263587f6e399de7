"""What all tests share: no network, small networks, weights in which every tensor matters."""

import os
import subprocess
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# tests run side by side, and the threads of each would wait for the others'
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

from hivit_hf import HiViTConfig
from support.networks import TINY


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_pretrained(tmp_path_factory):
    """The folder with weights pre-trained as in `make demo`, for 16 epochs: for tests that compare them with others."""
    from digits.data import digits_dataset, write_parquet

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    run = shared / "digits_pretrained"
    with FileLock(shared / "digits_pretrained.lock"):
        if not (run / "model").exists():
            data = write_parquet(digits_dataset(), shared / "digits")
            # a process of its own: the weights depend on nothing that other tests have left behind
            command = [sys.executable, EXAMPLES / "pretrain_mim.py", "--config", EXAMPLES / "recipes/mae_digits.yaml"]
            command += ["--dataset_name", data, "--output_dir", run, "--num_train_epochs", "16"]
            subprocess.run([*command, "--dataloader_num_workers", "0", "--disable_tqdm"], check=True)
    return run / "model"


@pytest.fixture
def tiny_config():
    """A function that makes the configuration of a network small enough for the oracle."""
    return lambda **changes: HiViTConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def redraw():
    """A function that gives every parameter random values: zeros and ones would hide mistakes."""

    def draw(model):
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if name != "decoder.position_embeddings":
                scale = 1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale
        return model

    return draw


@pytest.fixture(scope="session")
def tiny_network(redraw):
    """A function that makes a network small enough for anything, all of whose parameters matter."""

    def make(model_class, **changes):
        arguments = {**TINY, **changes}
        if "id2label" in changes:
            arguments.pop("num_labels")
        return redraw(model_class(HiViTConfig(**arguments))).eval()

    return make


@pytest.fixture
def draw_masks():
    """A function that draws masks (batch, units), True = masked, the same number in each row."""

    def draw(batch_size, num_units, num_masked):
        order = torch.rand(batch_size, num_units).argsort(dim=1)
        return order < num_masked

    return draw
