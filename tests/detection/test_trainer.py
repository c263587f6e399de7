"""`DetectionTrainer`: schedules, distributed evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

import finetune_detection
from hivit_hf.training.optim import stepped_learning_rate
from support.detection import SMOKE, data_flags, trainer_for


def test_the_learning_rate_falls_in_steps():
    rates = [stepped_learning_rate(step, 4, [10, 15], 0.1, 2.0) for step in range(20)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[9] == 2.0
    assert_close(rates[10:], [0.2] * 5 + [0.02] * 5)
    assert stepped_learning_rate(0, 0, [], 0.1, 2.0) == 2.0


def factors(scenes: Path, output: Path, **changes) -> list[float]:
    """The factor of the peak learning rate in each of six steps, two per epoch."""
    trainer = trainer_for(scenes, output, **changes)
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    return [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(6)]


def test_steps_of_the_schedule_come_from_epochs(scenes, tmp_path):
    """The recipe's: a warmup of two steps, and a step down after two epochs."""
    assert_close(factors(scenes, tmp_path), [0.5, 1.0, 1.0, 1.0, 0.1, 0.1])
    found = factors(scenes, tmp_path, decay_epochs=[1, 2], decay_factor=0.5, warmup_steps=0)
    assert_close(found, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25])
    assert_close(factors(scenes, tmp_path, max_steps=6), [0.5, 1.0, 1.0, 1.0, 0.1, 0.1])


def test_other_schedules_are_those_of_transformers(scenes, tmp_path):
    recipe = "".join(line for line in SMOKE.open() if not line.startswith("decay_epochs"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    changes = {"config": tmp_path / "recipe.yaml", "lr_scheduler_type": "linear"}
    assert_close(factors(scenes, tmp_path / "run", **changes), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25])


def test_all_before_the_main_stage_is_one_layer(scenes, tmp_path):
    lines = trainer_for(scenes, tmp_path, detector="faster_rcnn").layer_table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert "rcnn.backbone.pyramid.norms" not in lines[1] and "0.7290" in lines[1] and "stages.0" in lines[1]


@pytest.mark.slow
def test_two_processes_evaluate_every_image_once(scenes, tmp_path):
    results = []
    for number in (1, 2):
        output = tmp_path / str(number)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if number == 2 else []
        arguments = ["--per_device_train_batch_size", str(4 // number), "--stop_after_steps", "1"]
        arguments += ["--per_device_eval_batch_size", "1", "--learning_rate", "1e-9", "--warmup_steps", "0"]
        program = [finetune_detection.__file__, "--config", str(SMOKE), "--output_dir", str(output)]
        done = subprocess.run(
            [sys.executable, *launcher, *program, *arguments, *data_flags(scenes)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        states = [path.name for path in (output / "checkpoint-1").glob("rng_state*")]
        assert len(states) == number  # one for each process
        results.append(json.loads((output / "eval_results.json").read_text()))
    for name in ("eval_box_ap", "eval_box_ap50", "eval_mask_ap"):
        assert_close(results[0][name], results[1][name], rtol=0, atol=1e-4)
