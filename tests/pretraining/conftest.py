"""What the tests of pre-training share: images, and runs of the smoke recipe."""

import signal
from pathlib import Path

import pytest
from accelerate import Accelerator

import kill_test
from hivit_hf.pretraining.arguments import PretrainingArguments, PretrainingDataArguments, PretrainingModelArguments
from hivit_hf.pretraining.run import PretrainingRun
from hivit_hf.training.command_line import parse_arguments
from hivit_hf.training.output_folders import leave_folders
from support.accelerate_state import forget_accelerator


SMOKE = Path(__file__).parents[2] / "examples" / "recipes" / "smoke_cpu.yaml"
CLASSES = (PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of Parquet files with 153 images."""
    return kill_test.write_images(tmp_path_factory.mktemp("data") / "parquet", "parquet")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's state and the handlers of signals as in a new process."""
    forget_accelerator()
    yield
    forget_accelerator()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.fixture
def make_flags(data, tmp_path):
    """A function that makes a command line of the smoke recipe: 24 steps, a checkpoint every 5."""

    def make(**changes) -> list[str]:
        numbers = {"images_per_epoch": 48, "num_train_epochs": 8, "save_steps": 5, "log_samples": True}
        numbers |= {"dataset_name": str(data), "output_dir": str(tmp_path / "run"), "max_eval_samples": 16}
        flags = {**numbers, **changes}
        argv = [f"--config={SMOKE}"]
        for name, value in flags.items():
            if isinstance(value, list):
                argv += [f"--{name}", *map(str, value)]
            elif value is not None:
                argv.append(f"--{name}={value}")
        return argv

    return make


@pytest.fixture
def make_arguments(make_flags):
    """A function that makes the arguments of such a command line."""
    return lambda **changes: parse_arguments(CLASSES, None, make_flags(**changes))


@pytest.fixture
def make_run(make_arguments):
    """A function that makes such a run."""
    import pretrain_mim

    def make(accelerator: Accelerator | None = None, **changes) -> PretrainingRun:
        arguments = make_arguments(**changes)
        try:
            return pretrain_mim.prepare(accelerator or Accelerator(cpu=True), *arguments)
        except BaseException:
            leave_folders()  # as `run_script` does
            raise

    return make
