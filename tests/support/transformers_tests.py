"""
transformers' own common tests, of the version that is installed.

They are in its source distribution, which pip downloads once to build/transformers_tests; what they import and the
source distribution lacks (tests of generation and of exporters, values of a configuration) has a stand-in here.
"""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers
from filelock import FileLock


PACKAGE = "transformers_tests"
DOWNLOADS = Path(__file__).parents[2] / "build" / PACKAGE
# a value other than the default, of the fields that all configurations have
COMMON_FIELDS = {
    "architectures": ["HiViTModel"],
    "chunk_size_feed_forward": 2,
    "dtype": "float16",
    "id2label": {0: "first", 1: "second"},
    "label2id": {"first": 0, "second": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def source_distribution() -> Path | None:
    """The unpacked source distribution of transformers; None if it cannot be downloaded."""
    name = f"transformers-{transformers.__version__}"
    folder, archive = DOWNLOADS / name, DOWNLOADS / f"{name}.tar.gz"
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    with FileLock(DOWNLOADS / "lock"):
        if not archive.exists():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            # pip keeps the archive only if it can read its metadata, with the setuptools that this version asks for
            command += ["--dest", str(DOWNLOADS), name.replace("-", "==")]
            subprocess.run(command, capture_output=True, timeout=600)
            if not archive.exists():
                return None
        if not folder.exists():
            with tarfile.open(archive) as file:
                members = [member for member in file if member.name.startswith(f"{name}/tests/")]
                file.extractall(DOWNLOADS, members, filter="data")
    return folder


def common_tests(folder: Path, *names: str) -> list[ModuleType]:
    """Modules of the source distribution's `tests`, imported as a package of another name than ours."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder / "tests")]
    sys.modules[PACKAGE] = package
    stand_ins = {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": COMMON_FIELDS},
    }
    for name, values in stand_ins.items():
        module = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(values)
        sys.modules[f"{PACKAGE}.{name.split('.')[0]}"] = ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
        sys.modules[module.__name__] = module
    # they look for the sources of transformers beside them
    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
