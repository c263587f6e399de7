"""Saving, loading, the Auto classes, and what transformers' ecosystem does with a model."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import BitImageProcessor
from transformers.initialization import no_init_weights

import hivit_hf
from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel


def run_python(code, *arguments, **environment):
    """Runs code in a fresh process and returns what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def pretrained(tmp_path, tiny_config, redraw):
    """A masked autoencoder in a folder, and the model itself."""
    model = redraw(HiViTForMaskedImageModeling(tiny_config())).eval()
    model.save_pretrained(tmp_path / "pretrained")
    BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "pretrained"
    )
    return tmp_path / "pretrained", model


@pytest.mark.parametrize(
    "how", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"dtype": torch.float32}], ids=str
)
def test_round_trip_is_exact(how, pretrained):
    folder, model = pretrained
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    loaded = HiViTForMaskedImageModeling.from_pretrained(folder, **how)
    for name, tensor in model.state_dict().items():
        assert_close(loaded.state_dict()[name], tensor, atol=0, rtol=0)
    assert not loaded.decoder.position_embeddings.requires_grad
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    assert_close(loaded(pixel_values, noise=noise).logits, model(pixel_values, noise=noise).logits, atol=0, rtol=0)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_loads_in_bfloat16(pretrained):
    folder, _ = pretrained
    loaded = HiViTForMaskedImageModeling.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(torch.randn(1, 3, 64, 64)).loss.dtype == torch.float32


def test_the_encoder_loads_into_every_class(pretrained, recwarn, caplog):
    folder, model = pretrained
    pixel_values = torch.randn(2, 3, 64, 64)
    expected = model.hivit(pixel_values, output_stage_hidden_states=True)
    encoder, info = HiViTModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"layernorm.weight", "layernorm.bias"}
    assert not info["unexpected_keys"]
    assert_close(encoder(pixel_values).last_hidden_state, expected.last_hidden_state, atol=0, rtol=0)
    classifier, info = HiViTForImageClassification.from_pretrained(folder, num_labels=7, output_loading_info=True)
    assert {key.split(".")[-2] for key in info["missing_keys"]} == {"layernorm", "classifier"}
    assert not info["unexpected_keys"]
    assert_close(classifier.hivit(pixel_values).last_hidden_state, expected.last_hidden_state, atol=0, rtol=0)
    assert classifier(pixel_values).logits.shape == (2, 7)
    backbone, info = HiViTBackbone.from_pretrained(folder, out_features=["stage1", "stage3"], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(backbone(pixel_values).feature_maps[1].flatten(2).mT, expected.last_hidden_state, atol=0, rtol=0)


def test_weights_survive_offloading_to_disk(pretrained, tmp_path):
    from accelerate import disk_offload

    folder, model = pretrained
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    offloaded = HiViTForMaskedImageModeling.from_pretrained(folder)
    disk_offload(offloaded, offload_dir=str(tmp_path / "offload"), execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for p in offloaded.parameters())
    assert_close(offloaded(pixel_values, noise=noise).logits, model(pixel_values, noise=noise).logits, atol=0, rtol=0)


def test_lora_trains_saves_and_loads(tiny_config, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = HiViTForImageClassification(tiny_config())
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["classifier"])
    model = get_peft_model(base, lora)
    pixel_values, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.8
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        HiViTForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert_close(again.eval()(pixel_values).logits, model.eval()(pixel_values).logits)


def test_lora_of_the_relative_position_bias(tiny_config, redraw):
    from peft import LoraConfig, get_peft_model

    base = redraw(HiViTForImageClassification(tiny_config())).eval()
    pixel_values, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    expected = base(pixel_values).logits
    table = "attention.relative_position_bias_table"
    model = get_peft_model(base, LoraConfig(r=2, target_parameters=[table], init_lora_weights=False)).eval()
    output = model(pixel_values=pixel_values, labels=labels)
    assert not torch.equal(output.logits, expected)
    output.loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("attention.lora_" in name for name in trained)
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


def test_auto_classes_from_one_import(pretrained, tiny_config, tmp_path):
    folder, _ = pretrained
    HiViTForImageClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    code = """
import sys
import hivit_hf
from transformers import *
folder, classifier = sys.argv[1:]
print(type(AutoConfig.from_pretrained(folder)).__name__)
for auto in [AutoModel, AutoModelForPreTraining, AutoModelForMaskedImageModeling]:
    print(type(auto.from_pretrained(folder)).__name__)
print(type(AutoModelForImageClassification.from_pretrained(classifier)).__name__)
print(type(AutoBackbone.from_config(AutoConfig.from_pretrained(folder))).__name__)
print(type(AutoImageProcessor.from_pretrained(folder)).__name__.removesuffix("Fast").removesuffix("Pil"))
print(pipeline("image-classification", model=classifier, image_processor=folder).model.__class__.__name__)
"""
    assert run_python(code, folder, tmp_path / "classifier").split() == [
        "HiViTConfig",
        "HiViTModel",
        "HiViTForMaskedImageModeling",
        "HiViTForMaskedImageModeling",
        "HiViTForImageClassification",
        "HiViTBackbone",
        "BitImageProcessor",
        "HiViTForImageClassification",
    ]


def test_image_processors_are_found_without_a_warning(tiny_config, tmp_path):
    """Each backend has its class: transformers reports one that is not registered as not available."""
    HiViTForImageClassification(tiny_config()).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 64}).save_pretrained(tmp_path)
    code = """
import sys
import hivit_hf
from transformers import AutoImageProcessor, pipeline
for backend in [None, "torchvision", "pil"]:
    print(type(AutoImageProcessor.from_pretrained(sys.argv[1], backend=backend)).__name__)
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=600)
    assert ran.stdout.split() == ["BitImageProcessor", "BitImageProcessor", "BitImageProcessorPil"], ran.stderr
    assert "not available" not in ran.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import hivit_hf; from transformers import AutoModel",
        "from transformers import AutoModel; import hivit_hf",
        "from transformers import AutoConfig; import hivit_hf; from transformers import AutoModel",
        "from hivit_hf.modeling_hivit import HiViTModel; from transformers import AutoModel",
        "from hivit_hf import HiViTConfig; from transformers import AutoModel",
        "from hivit_hf import *; from transformers import AutoModel",
    ],
)
def test_any_order_of_imports_registers(imports):
    code = f"{imports}\nfrom hivit_hf import HiViTConfig\n"
    code += "print(type(AutoModel.from_config(HiViTConfig(hidden_size=16, depths=[1, 1, 1], num_attention_heads=1))))"
    assert "HiViTModel" in run_python(code)


def test_import_is_light_and_needs_no_extras():
    """`import hivit_hf` imports no torch; the network needs none of torchvision, datasets and accelerate."""
    code = """
import sys, time

from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
extras = ("torchvision", "datasets", "accelerate", "evaluate", "matplotlib", "sklearn", "peft")
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.split(".")[0] in extras else find_spec(name, *rest)
)
import transformers
start = time.perf_counter()
import hivit_hf
seconds = time.perf_counter() - start
assert "torch" not in sys.modules
import torch
from hivit_hf import HiViTConfig, HiViTForImageClassification
from transformers import AutoModelForImageClassification
config = HiViTConfig(hidden_size=16, depths=[1, 1, 1], num_attention_heads=1, image_size=32)
print(AutoModelForImageClassification.from_config(config)(torch.zeros(1, 3, 32, 32)).logits.shape[1], seconds)
"""
    labels, seconds = run_python(code).split()
    assert labels == "2"
    assert float(seconds) < 0.3


def test_public_names():
    assert set(hivit_hf.__all__) <= set(dir(hivit_hf))
    for name in hivit_hf.__all__:
        assert getattr(hivit_hf, name) is getattr(hivit_hf, name)
    with pytest.raises(AttributeError, match="no attribute 'HiVit'"):
        hivit_hf.HiVit  # noqa: B018


def test_a_saved_file_may_hold_what_a_user_attached(tiny_config, tmp_path, caplog):
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "my_note": "kept"}))
    assert HiViTConfig.from_pretrained(tmp_path).my_note == "kept"


def test_what_trainer_writes_is_loaded_without_a_warning(tiny_config, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = HiViTForMaskedImageModeling(tiny_config(encoder_stride=8))
    model.config.use_cache = False
    model.save_pretrained(tmp_path)
    loaded = HiViTConfig.from_pretrained(tmp_path)
    assert loaded.encoder_stride == 8
    assert not caplog.records
    with pytest.raises(ValueError, match="no keyword 'use_cache'"):
        HiViTConfig(use_cache=False)


def test_encoder_stride_is_the_patch_size_unless_it_is_set(tiny_config):
    config = tiny_config(patch_size=8)
    assert config.encoder_stride == 8
    config.update({"image_size": 32, "patch_size": 16, "encoder_stride": 32})  # as transformers' run_mim.py does
    assert HiViTForMaskedImageModeling(config)(torch.randn(1, 3, 32, 32)).logits.shape == (1, 4, 16 * 16 * 3)
    with pytest.raises(ValueError, match="encoder_stride must be positive, got 0"):
        tiny_config(encoder_stride=0)


@pytest.mark.parametrize("num_on_the_first", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("model_class", [HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone])
def test_parts_on_several_devices(model_class, num_on_the_first, tiny_config):
    """Fake tensors know their device and refuse to be mixed, so what `device_map` does is tested without a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
        model = model_class(tiny_config(out_features=["stem", "stage1", "stage2", "stage3"]))
        whole = (*model._no_split_modules, "HiViTMerge")
        parts = [name for name, module in model.named_modules() if type(module).__name__ in whole]
        parts = [name for name in parts if not name.startswith("decoder.")] + ["hivit.layernorm", "classifier"]
        devices = {name: f"cuda:{int(index >= num_on_the_first)}" for index, name in enumerate(parts)}
        for name, parameter in list(model.named_parameters()):
            device = next((devices[part] for part in parts if name.startswith(f"{part}.")), "cuda:0")
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = torch.nn.Parameter(parameter.detach().to(device))
        for name, module in model.named_modules():
            if name in devices:
                add_hook_to_module(module, AlignDevicesHook(execution_device=devices[name]))
        add_hook_to_module(model, AlignDevicesHook(execution_device="cuda:0", io_same_device=True))
        output = model(torch.zeros(2, 3, 64, 64))
    assert all(tensor.device.type == "cpu" for tensor in output.to_tuple() if isinstance(tensor, torch.Tensor))


def test_the_original_names_of_the_early_layers_are_taken(tmp_path):
    config = HiViTConfig(stem_mlp_ratio=2.0, stem_blocks_per_depth=1)
    assert (config.early_mlp_ratio, config.early_blocks_per_depth) == (2.0, 1)
    assert (config.stem_mlp_ratio, config.stem_blocks_per_depth) == (2.0, 1)
    config.save_pretrained(tmp_path)
    loaded = HiViTConfig.from_pretrained(tmp_path, stem_mlp_ratio=4.0)
    assert (loaded.early_mlp_ratio, loaded.early_blocks_per_depth) == (4.0, 1)
    with pytest.raises(ValueError, match="early_mlp_ratio"):
        HiViTConfig(stem_mlp_ratio=-1.0)
