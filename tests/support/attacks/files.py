"""Datasets and models that are broken, empty or hostile."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from support.attacks import Attack
from support.attacks.ground import Ground, png


DATA_SCRIPTS = (
    "pretrain_mim",
    "finetune_classification",
    "evaluate_classification",
    "extract_features",
    "linear_probe",
)
MODEL_SCRIPTS = ("evaluate_classification", "extract_features", "linear_probe")
LABEL_SCRIPTS = ("finetune_classification", "evaluate_classification", "linear_probe")


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.system, (f"touch {self.made}",)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def images(**beside: bytes) -> dict[str, bytes]:
    """Twenty images, each with files beside it, `pth=...` for example."""
    return {
        f"{number:03d}.{suffix}": content
        for number in range(20)
        for suffix, content in {"png": png(number), "cls": b"0", **beside}.items()
    }


def tars(ran: Path) -> dict[str, bytes | dict[str, bytes]]:
    """Contents of a tar, as bytes or as entries."""
    hostile = pickle.dumps(Hostile(ran))
    return {
        "broken": b"\xff" * 5000,
        "empty file": b"",
        "zeros": bytes(10240),
        "no entries": {},
        "text in place of a tar": b"<html>404</html>",
        "a PyTorch file beside the images, damaged": images(pth=b"damaged"),
        "a PyTorch file beside the images, the last one damaged": images(pth=saved(1)) | {"019.pth": b"damaged"},
        "a PyTorch file beside the images, cut off": images(pth=saved({"x": torch.zeros(5)})[:200]),
        "a hostile PyTorch file beside the images": images(pth=saved(Hostile(ran))),
        "a hostile pickle beside the images": images(pth=hostile),
        "an array beside the images, damaged": images(npy=b"damaged"),
        "a hostile array beside the images": images(npy=b"\x93NUMPY" + hostile),
        "JSON beside the images, damaged": images(json=b"{"),
        "JSON beside the images, nested": images(json=b"[" * 100_000),
        "labels that are no numbers": images(cls=b"cat"),
        "text that is no text": images(txt=b"\xff\xfe\xff"),
        "names without suffix": {f"{number}": png(number) for number in range(20)},
        "the same file twice": {"a.png": png(0), "./a.png": png(1)},
        "no images": {f"{number}.txt": b"text" for number in range(20)},
        "empty images": {f"{number}.png": b"" for number in range(20)},
    }


# values of the column `label` -> words of the refusal
LABELS = [
    ([0, 10**15] * 20, "has the label 1000000000000000, but class numbers run from 0 to 999999 at most"),
    ([0, 2**62] * 20, "has the label 4611686018427387904, but class numbers run"),
    ([0, -7] * 20, "has the label -7|is less than|label"),
    ([None] * 40, "No row has a label|have no label|holds null"),
    ([0, None] * 20, "have no label"),
    ([[0], [1]] * 20, "holds lists"),
    ([{"a": 1}] * 40, "holds .* values, no labels"),
    ([b"x", b"y"] * 20, "Labels must be names or whole numbers"),
    ([0.5, 1.5] * 20, "Labels must be names or whole numbers"),
    ([[[0]], [[1]]] * 20, "holds lists|no labels"),
]


def dataset_attacks(ground: Ground) -> Iterator[Attack]:
    ran = ground.scratch / "ran"
    for number, (name, content) in enumerate(tars(ran).items()):
        folder = ground.scratch / f"tar{number}"
        if isinstance(content, bytes):
            folder.mkdir()
            (folder / "a.tar").write_bytes(content)
        else:
            ground.write_tar(folder / "a.tar", content)
        for script in DATA_SCRIPTS:
            flags = {"dataset_name": folder}
            if script != "pretrain_mim":  # its stream passes over what is beside the images, if it can be read
                flags |= {"train_val_split": 0.3} if "fine" in script or "probe" in script else {}
                flags |= {"eval_split_name": None} if "finetune" in script else {}
                flags |= {"eval_split_name": "train"} if "evaluate" in script else {}
            yield Attack(f"{script}: tar, {name}", script, ground.line(script, **flags), may_pass=True, never=ran)
    for number, (labels, words) in enumerate(LABELS):
        folder = ground.write_parquet(ground.scratch / f"labels{number}", labels)
        for script in LABEL_SCRIPTS:
            line = ground.line(script, dataset_name=folder)
            yield Attack(f"{script}: labels {labels[:2]}", script, line, words)
        flags = {"eval_dataset_name": folder, "label_column_name": "label"}
        words = "label of .* must hold class numbers from 0 on, got"
        yield Attack(f"pretrain_mim: labels {labels[:2]}", "pretrain_mim", ground.line("pretrain_mim", **flags), words)
    for name, content in {"garbage": b"PAR1garbagePAR1", "empty": b"", "zeros": bytes(5000)}.items():
        folder = ground.scratch / f"parquet {name}"
        folder.mkdir()
        (folder / "train-00000.parquet").write_bytes(content)
        for script in DATA_SCRIPTS:
            yield Attack(f"{script}: Parquet, {name}", script, ground.line(script, dataset_name=folder))


def configurations() -> dict[str, str]:
    """Contents of config.json."""
    good = {"model_type": "hivit", "architectures": ["HiViTForImageClassification"], "image_size": 32, "patch_size": 8}
    good |= {"hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}
    changes = [
        *({"depths": value} for value in ([10**8, 1, 1], "x", None, [], {}, [1.5, 1, 1], [[1], 1, 1])),
        *({"hidden_size": value} for value in (10**12, "x", None, -32, 1.5, [])),
        *({"num_labels": value} for value in (10**12, "x", [])),
        *({"model_type": value} for value in ("vit", 7, None, [], "x" * 5000)),
        *({"architectures": value} for value in ("x", 7, [7], {})),
        *({"id2label": value} for value in (7, "x", [1], {"a": 1})),
        {"image_size": 10**12},
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}},
    ]
    written = {json.dumps(change)[:60]: json.dumps(good | change) for change in changes}
    raw = {
        "list": "[]",
        "null": "null",
        "number": "7",
        "text": '"x"',
        "empty": "",
        "open": "{",
        "nested": "[" * 100_000,
    }
    return written | raw


def model_attacks(ground: Ground) -> Iterator[Attack]:
    ran = ground.scratch / "ran"
    sound = (ground.classifier / "model.safetensors").read_bytes()
    header = int.from_bytes(sound[:8], "little")
    weights = {
        "cut off in the middle": sound[: len(sound) // 2],
        "cut off by one byte": sound[:-1],
        "cut off in the header": sound[:50],
        "empty": b"",
        "zeros": bytes(5000),
        "a header of 10^18 bytes": (10**18).to_bytes(8, "little") + sound[8:],
        "a header that is no JSON": sound[:8] + b"x" * header + sound[8 + header :],
        "a pickle": pickle.dumps(Hostile(ran)),
        "an HTML page": b"<html>404</html>",
    }
    pickled = {
        "hostile": saved(Hostile(ran)),
        "hostile within": saved({"classifier.weight": Hostile(ran)}),
        "an old hostile pickle": pickle.dumps(Hostile(ran), protocol=2),
        "cut off": saved({"x": torch.zeros(5)})[:300],
        "empty": b"",
        "a list": saved([1, 2]),
        "zeros": bytes(5000),
    }
    files = [("model.safetensors", name, content, "") for name, content in weights.items()]
    files += [("pytorch_model.bin", name, content, "") for name, content in pickled.items()]
    files += [("config.json", name, content.encode(), "") for name, content in configurations().items()]
    for number, (file, name, content, words) in enumerate(files):
        folder = ground.scratch / f"model{number}"
        shutil.copytree(ground.classifier, folder)
        if file == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
        if "auto_map" in name:
            (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
        (folder / file).write_bytes(content)
        for script in MODEL_SCRIPTS:
            line = ground.line(script, model_name_or_path=folder)
            may_pass = file == "config.json"
            yield Attack(f"{script}: {file}, {name}", script, line, words, may_pass=may_pass, never=ran)
        line = ground.line(
            "finetune_classification",
            config=None,
            from_scratch=None,
            model_name_or_path=folder,
            do_train="false",
        )
        yield Attack(f"finetune_classification: {file}, {name}", "finetune_classification", line, words, may_pass, ran)
