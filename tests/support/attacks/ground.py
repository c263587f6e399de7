"""What the attacked scripts need beside the attack: images, a classifier, command lines that would run."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.image_processing import evaluation_processor


ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "examples" / "recipes"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": 2}


def png(number: int) -> bytes:
    file = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


class Ground:
    """A folder with 40 images, their labels, and a small classifier."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.images = scratch / "images"
        self.images.mkdir(parents=True)
        self.write_parquet(self.images, list(range(2)) * 20)
        self.classifier = self.write_classifier(scratch / "classifier")
        self.count = 0

    def write_parquet(self, folder: Path, labels: list) -> Path:
        folder.mkdir(exist_ok=True, parents=True)
        for split in ("train", "test"):
            rows = [{"bytes": png(number), "path": f"{number}.png"} for number in range(len(labels))]
            table = pa.table({"image": rows, "label": labels})
            pq.write_table(table, folder / f"{split}-00000.parquet")
        return folder

    def write_classifier(self, folder: Path) -> Path:
        config = HiViTConfig(**NETWORK, id2label={0: "0", 1: "1"}, label2id={"0": 0, "1": 1})
        HiViTForImageClassification(config).save_pretrained(folder)
        evaluation_processor(32).save_pretrained(folder)
        return folder

    def write_tar(self, path: Path, entries: dict[str, bytes]) -> Path:
        path.parent.mkdir(exist_ok=True, parents=True)
        with tarfile.open(path, "w") as tar:
            for name, content in entries.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return path

    def new_folder(self) -> Path:
        """A folder that does not exist yet."""
        self.count += 1
        return self.scratch / f"out{self.count}"

    def line(self, script: str, **changes) -> tuple:
        """A command line that would run within seconds, with flags changed; None leaves one out."""
        out, images = self.new_folder(), {"dataset_name": self.images}
        annotations = {"train_annotations": out, "eval_annotations": out}
        trained = {"dataloader_num_workers": 0, "report_to": "none", "output_dir": out}
        flags = {
            "pretrain_mim": images
            | {"config": RECIPES / "smoke_cpu.yaml", "num_train_epochs": 1, "warmup_epochs": 0, **trained},
            "finetune_classification": images
            | {"config": RECIPES / "finetune_smoke_cpu.yaml", "eval_split_name": "test", **trained},
            "evaluate_classification": images | {"model_name_or_path": self.classifier, "output_dir": out},
            "extract_features": images
            | {"model_name_or_path": self.classifier, "dataloader_num_workers": 0, "output_file": out / "f.parquet"},
            "linear_probe": images
            | {"model_name_or_path": self.classifier, "dataloader_num_workers": 0, "output_dir": out},
            "finetune_segmentation": images
            | {"config": RECIPES / "segmentation_scenes.yaml", "model_name_or_path": self.classifier, **trained},
            "finetune_detection": {"config": RECIPES / "detection_smoke_cpu.yaml", **annotations, **trained},
        }[script]
        return tuple(f"--{name}={value}" for name, value in {**flags, **changes}.items() if value is not None)
