"""Small trainings of classifiers: images of one color in memory, and digits through the example's own functions."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import finetune_classification
from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.training.command_line import parse_arguments


SMOKE = Path(__file__).parents[2] / "examples" / "recipes" / "finetune_smoke_cpu.yaml"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "effective_batch_size": 16, "warmup_epochs": 0}
QUICK |= {"logging_steps": 1}


class Colors(list):
    """Images of one color, as a data set for `HiViTTrainer`: label 1 is bright, label 0 is dark."""

    epoch = 0

    def __init__(self, count: int = 16):
        super().__init__(
            {"pixel_values": torch.full((3, 16, 16), 0.8 if i % 2 else -0.8) + 0.01 * i, "labels": i % 2}
            for i in range(count)
        )


def flags(**values) -> list[str]:
    """Values as a command line; None is left out."""
    line = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            line += [f"--{name}", *map(str, value)]
        elif value is not None:
            line.append(f"--{name}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return line


def smoke_flags(data: Path | str, folder: Path, **changes) -> list[str]:
    """The command line of a run of the smoke recipe: 3 steps of 16 images."""
    values = {**QUICK, "dataset_name": data, "output_dir": folder, **changes}
    return ["--config", str(SMOKE), *flags(**values)]


def smoke_arguments(data: Path | str, folder: Path, **changes) -> tuple:
    """The arguments of such a run."""
    return parse_arguments(finetune_classification.ARGUMENTS, None, smoke_flags(data, folder, **changes))


def smoke_trainer(data: Path | str, folder: Path, **changes):
    """The trainer of such a run."""
    return finetune_classification.make_trainer(*smoke_arguments(data, folder, **changes))


def smoke_run(data: Path | str, folder: Path, **changes) -> dict[str, float]:
    """Such a run, from data to saved model; its metrics."""
    return finetune_classification.train(*smoke_arguments(data, folder, **changes))


def log_of(folder: Path) -> list[dict]:
    """The steps of a run's log."""
    return [record for record in history_of(folder) if "loss" in record]


def history_of(folder: Path) -> list[dict]:
    """All records of a run's log."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def outcome(metrics: dict[str, float], folder: Path) -> dict:
    """What can differ from one run to another."""
    records = log_of(folder)
    return {
        "losses": [record["loss"] for record in records],
        "rates": [record["learning_rate"] for record in records],
        "accuracy": metrics.get("eval_accuracy"),
        "eval_loss": metrics["eval_loss"],
        "weights": sum(weights.double().abs().sum().item() for weights in saved_weights(folder).values()),
    }


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's folder."""
    return load_file(folder / "model.safetensors")


def model_folder(folder: Path, kind=HiViTForMaskedImageModeling, **changes) -> str:
    """A folder with a model of random weights."""
    torch.manual_seed(3)
    kind(HiViTConfig(**{**NETWORK, **changes})).save_pretrained(folder)
    return str(folder)
