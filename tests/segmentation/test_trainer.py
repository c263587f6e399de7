"""`SegmentationTrainer`: schedule, memory of evaluations, batch norms of several GPUs, refusal of sharded weights."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Subset
from transformers import Trainer

from hivit_hf.segmentation.modeling import share_batch_norms
from hivit_hf.segmentation.trainer import SegmentationTrainer
from hivit_hf.training import dense
from hivit_hf.training.optim import poly_learning_rate
from scenes.data import map_names
from support.segmentation import trainer_for


def test_the_schedule_falls_from_the_first_step_and_warms_up():
    values = [poly_learning_rate(step, 100, 10, 2.0, 1.0) for step in range(101)]
    assert values[0] == 0 and values[100] == 0 and values[5] == 2.0 * 0.95 * 0.5 and values[10] == 2.0 * 0.9
    assert values[50] == 1.0 and poly_learning_rate(50, 100, 10, 2.0, 2.0) == 0.5
    with pytest.raises(ValueError, match="warmup_steps must be at least 0 and less than total_steps 100"):
        poly_learning_rate(0, 100, 100, 1.0, 1.0)


def test_other_schedules_are_those_of_transformers(small_scenes, tmp_path):
    trainer = trainer_for(small_scenes, tmp_path / "run", lr_scheduler_type="constant_with_warmup", warmup_steps=4)
    trainer.create_optimizer_and_scheduler(num_training_steps=320)
    assert [trainer.lr_scheduler.lr_lambdas[0](step) for step in (0, 2, 4, 300)] == [0.0, 0.5, 1.0, 1.0]


def test_memory_does_not_grow_with_the_images_of_an_evaluation(small_scenes, tmp_path, monkeypatch):
    trainer, process, used = trainer_for(small_scenes, tmp_path / "run", num_overlays=0), psutil.Process(), []
    true = np.random.default_rng(0).integers(0, len(map_names()), (512, 683))
    wrong = torch.nn.functional.one_hot(torch.from_numpy((true + 1) % len(map_names()))).permute(2, 0, 1).byte()
    item = {"pixel_values": torch.zeros(3, 8, 8), "labels": torch.from_numpy(true)}

    def predict(model, pixel_values):
        used.append(process.memory_info().rss)
        return wrong.clone()

    monkeypatch.setattr(trainer, "predict_image", predict)
    scores = trainer.measure([[item]] * 30, Subset(trainer.eval_dataset, range(30)))
    assert scores["mean_iou"] == 0 and len(used) == 30
    assert used[-1] - used[2] < 50 * 2**20


def test_batch_norms_are_shared_on_several_gpus_only(small_scenes, tmp_path, monkeypatch):
    trainer, made = trainer_for(small_scenes, tmp_path / "run"), []
    model, before = trainer.model, list(trainer.model.state_dict())
    plain = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    for number, device in ((1, "cuda"), (2, "cpu")):
        assert share_batch_norms(model, number, torch.device(device)) is model

    def keep_model(trainer, args, **keywords):
        made.append(keywords["model"])

    monkeypatch.setattr(dense.DenseTrainer, "__init__", keep_model)
    SegmentationTrainer(SimpleNamespace(world_size=2, device=torch.device("cuda")), model=model, predict=None)
    shared = sum(isinstance(module, torch.nn.SyncBatchNorm) for module in made[0].modules())
    assert shared == plain > 0 and list(made[0].state_dict()) == before


def test_sharded_parameters_are_refused(small_scenes, tmp_path, monkeypatch):
    make = Trainer.create_accelerator_and_postprocess

    def make_sharded(trainer):
        make(trainer)
        trainer.is_fsdp_enabled = True  # which no process on CPUs can have

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", make_sharded)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed are refused"):
        trainer_for(small_scenes, tmp_path / "run")
