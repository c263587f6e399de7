"""
Outputs of the original code, recorded with random weights in which every tensor matters: the network gives the same
numbers. Each file of tests/golden holds weights under our names, inputs, outputs and gradients; its metadata name the
configuration and the commit of the original repository.
"""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from torch.testing import assert_close

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling


GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # the recorded float32 is up to 3e-6 from float64


def load(name, model_class):
    """A model with the recorded weights, and the other recorded tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = HiViTConfig(**json.loads(file.metadata()["config"]))
    model = model_class(config).eval()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    return model, tensors


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["masked_autoencoder", "masked_autoencoder_bias_last_stage"])
def test_masked_autoencoder(name, implementation):
    model, golden = load(name, HiViTForMaskedImageModeling)
    model.set_attn_implementation(implementation)
    for run, mask_ratio in [("mask50", 0.5), ("mask75", 0.75)]:
        model.config.mask_ratio = mask_ratio
        output = model(golden["pixel_values"], noise=golden[f"{run}.noise"])
        assert_close(output.logits, golden[f"{run}.logits"], **TOLERANCE)
        assert_close(output.loss, golden[f"{run}.loss"], **TOLERANCE)
    output.loss.backward()
    gradients = [key.removeprefix("gradient.") for key in golden if key.startswith("gradient.")]
    assert len(gradients) >= 6
    for key in gradients:
        assert_close(model.get_parameter(key).grad, golden[f"gradient.{key}"], atol=1e-6, rtol=1e-4)
    model.config.norm_pix_loss = False
    plain = model(golden["pixel_values"], noise=golden["mask75.noise"]).loss
    assert_close(plain, golden["mask75.loss_without_norm_pix"], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_classifier(implementation):
    model, golden = load("classifier", HiViTForImageClassification)
    model.set_attn_implementation(implementation)
    assert_close(model(golden["pixel_values"]).logits, golden["logits"], **TOLERANCE)
    output = model.hivit(golden["pixel_values"], output_stage_hidden_states=True)
    assert_close(output.pooler_output, golden["pooled"], **TOLERANCE)
    for stage, hidden_states in zip(["stage1", "stage2", "stage3"], output.stage_hidden_states[1:]):
        assert_close(hidden_states, golden[stage], **TOLERANCE)
