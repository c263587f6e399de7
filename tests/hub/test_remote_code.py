"""An exported folder works where the package is not: in another process, in another folder, offline."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

import hivit_hf
from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.auto_registration import AUTO_MAP, AUTO_MODELS
from hivit_hf.hub.repository import CODE_FILES, export
from hivit_hf.image_processing import evaluation_processor
from support.patience import PATIENCE_S


# a fresh process in which hivit_hf and the other named packages cannot be imported
WITHOUT_PACKAGES = """
import json, sys
from importlib.machinery import PathFinder

absent, find_spec = sys.argv[1].split(","), PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in absent else find_spec(name, *rest)
)
for name in absent:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
"""
USES = """
import torch
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling,
    AutoModelForPreTraining, AutoBackbone, BitImageProcessor, Trainer, TrainingArguments, logging, pipeline)

logging.set_verbosity_error()
classifier, autoencoder, encoder, image = sys.argv[2:]
remote = {"trust_remote_code": True}
found = {}

config = AutoConfig.from_pretrained(classifier, **remote)
found["config"] = [type(config).__name__, type(config).__module__.partition(".")[0], config.id2label[1]]
for name, auto, folder in [
    ("model", AutoModel, classifier),
    ("encoder", AutoModel, encoder),
    ("classification", AutoModelForImageClassification, classifier),
    ("masked", AutoModelForMaskedImageModeling, autoencoder),
    ("pretraining", AutoModelForPreTraining, autoencoder),
]:
    model = auto.from_pretrained(folder, **remote)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found[name] = type(model).__name__
found["backbone"] = type(AutoBackbone.from_config(config, **remote)).__name__

pixel_values = torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
model = AutoModelForImageClassification.from_pretrained(classifier, **remote)
with torch.no_grad():
    found["logits"] = model(pixel_values).logits.tolist()
model.save_pretrained("again")
BitImageProcessor.from_pretrained(classifier).save_pretrained("again")
found["files_again"] = sorted(path.name for path in __import__("pathlib").Path("again").iterdir())
again = AutoModelForImageClassification.from_pretrained("again", **remote)
with torch.no_grad():
    found["logits_again"] = again(pixel_values).logits.tolist()
found["auto_map_again"] = {key: value.rpartition("--")[2] for key, value in again.config.auto_map.items()}

for folder in (classifier, "again"):
    answers = pipeline("image-classification", model=folder, **remote)(image, top_k=2)
    found["pipeline", folder == "again"] = answers
features = pipeline("image-feature-extraction", model=encoder, **remote)(image)
found["features"] = [len(features), len(features[0]), len(features[0][0])]

masked = AutoModelForMaskedImageModeling.from_pretrained(autoencoder, **remote)
mask = masked.draw_mask(pixel_values)
image_back = masked.reconstruct(pixel_values, bool_masked_pos=mask)
first_unit = (image_back - pixel_values)[~mask[:, 0], :, :16, :16]
found["kept"] = bool((first_unit == 0).all())
data = [{"pixel_values": pixel_values[0], "labels": n % 2} for n in range(4)]
arguments = TrainingArguments("trainer", max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
                              disable_tqdm=True, save_strategy="no")
trainer = Trainer(model=again, args=arguments, train_dataset=data)
trainer.train()
found["steps"] = trainer.state.global_step
found["versions"] = [__import__("transformers").__version__, torch.__version__]
print(json.dumps({str(key): value for key, value in found.items()}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_network):
    """Folders of a classifier, an autoencoder and an encoder, an image, and the classifier itself."""
    root = tmp_path_factory.mktemp("exported")
    classifier = tiny_network(HiViTForImageClassification, id2label={0: "tench", 1: "goldfish"})
    autoencoder = tiny_network(HiViTForMaskedImageModeling)
    export(classifier, root / "classifier", onnx=False)
    export(autoencoder, root / "autoencoder", onnx=False)
    export(tiny_network(HiViTModel), root / "encoder", onnx=False)
    Image.effect_noise((90, 70), 80).convert("RGB").save(root / "image.png")
    return root, classifier


def run_without(code, arguments, absent, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-c", WITHOUT_PACKAGES + code, ",".join(absent), *map(str, arguments)]
    finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("absent", [("hivit_hf",), ("hivit_hf", "torchvision")], ids=["all", "no torchvision"])
def test_remote_code(exported, absent, tmp_path):
    root, classifier = exported
    folders = [root / name for name in ("classifier", "autoencoder", "encoder", "image.png")]
    found = run_without(USES, folders, absent, tmp_path)
    assert found["config"] == ["HiViTConfig", "transformers_modules", "goldfish"]
    classes = [found[name] for name in ("model", "encoder", "classification", "masked", "pretraining", "backbone")]
    assert classes == [
        "HiViTModel",
        "HiViTModel",
        "HiViTForImageClassification",
        "HiViTForMaskedImageModeling",
        "HiViTForMaskedImageModeling",
        "HiViTBackbone",
    ]
    with torch.no_grad():
        expected = classifier(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)).logits
    assert found["logits"] == found["logits_again"]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-5)
    assert found["auto_map_again"] == AUTO_MAP
    assert {"config.json", "model.safetensors", "modeling_hivit.py", "configuration_hivit.py"} <= set(
        found["files_again"]
    )
    assert [guess["label"] in ("tench", "goldfish") for guess in found["('pipeline', False)"]] == [True, True]
    assert found["('pipeline', False)"] == found["('pipeline', True)"]
    assert found["features"] == [1, 16, 32]
    assert found["kept"] is True
    assert found["steps"] == 2


@pytest.mark.slow
def test_the_handler_needs_nothing_of_the_package(exported, tmp_path):
    root, _ = exported
    code = """
import importlib.util
sys.path.insert(0, sys.argv[2])  # as the endpoint toolkit does
spec = importlib.util.spec_from_file_location("handler", f"{sys.argv[2]}/handler.py")
handler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(sys.argv[2])
print(json.dumps(endpoint({"inputs": open(sys.argv[3], "rb").read(), "parameters": {"top_k": 1}})))
"""
    answer = run_without(code, [root / "classifier", root / "image.png"], ("hivit_hf", "torchvision"), tmp_path)
    assert len(answer) == 1
    assert answer[0]["label"] in ("tench", "goldfish")


LOADS = """
import torch
from transformers import (AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
    logging, pipeline)

logging.set_verbosity_error()
folder, image = sys.argv[2:]
remote = {"trust_remote_code": True}
model = AutoModelForImageClassification.from_pretrained(folder, **remote)
with torch.no_grad():
    logits = model(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)).logits.tolist()
config = AutoConfig.from_pretrained(folder, **remote)
others = [auto.from_pretrained(folder, **remote) for auto in (AutoModel, AutoModelForPreTraining)]
others.append(AutoBackbone.from_config(config, **remote))
answers = pipeline("image-classification", model=folder, **remote)(image)
print(json.dumps([logits, [type(other).__name__ for other in others], [answer["label"] for answer in answers]]))
"""


@pytest.mark.slow
def test_what_a_trainer_saves_needs_nothing_of_the_package(tiny_network, tmp_path):
    """The folder that `Trainer.push_to_hub` uploads."""
    model = tiny_network(HiViTForImageClassification, id2label={0: "tench", 1: "goldfish"})
    data = [{"pixel_values": torch.randn(3, 64, 64), "labels": n % 2} for n in range(4)]
    arguments = TrainingArguments(tmp_path / "saved", max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=evaluation_processor(64))
    trainer.train()
    trainer.save_model(_internal_call=True)
    Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / "image.png")
    arguments = [tmp_path / "saved", tmp_path / "image.png"]
    logits, others, labels = run_without(LOADS, arguments, ("hivit_hf",), tmp_path)
    with torch.no_grad():
        expected = model.eval()(torch.linspace(-2, 2, 2 * 3 * 64 * 64).view(2, 3, 64, 64)).logits
    torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=1e-5)
    assert others == ["HiViTModel", "HiViTForMaskedImageModeling", "HiViTBackbone"]
    assert sorted(labels) == ["goldfish", "tench"]


class OfAUser(HiViTModel):
    """A class that the file of the network does not define."""


@pytest.mark.parametrize("kind", sorted(set(AUTO_MODELS.values())))
def test_every_model_is_saved_with_its_code(kind, tiny_network, tmp_path):
    tiny_network(getattr(hivit_hf, kind)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("configuration_hivit.py", "modeling_hivit.py"):
        assert (tmp_path / name).read_text() == (Path(hivit_hf.__file__).parent / name).read_text()


def test_a_class_of_a_user_is_saved_without_code(tiny_network, tmp_path):
    tiny_network(OfAUser).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_the_traveling_files_import_nothing_else_of_the_package():
    """Each from the folder: the network as a package, as transformers imports it; the handler as plain files."""
    siblings = {"modeling_hivit.py": ["configuration_hivit"], "handler.py": ["image_reading"]}
    for name in CODE_FILES:
        relative = []
        for node in ast.walk(ast.parse((Path(hivit_hf.__file__).parent / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                relative.append(node.module)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(module.partition(".")[0] == "hivit_hf" for module in names)
        assert relative == siblings.get(Path(name).name, [])
