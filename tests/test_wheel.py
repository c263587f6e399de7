"""What `pip install` puts on a machine, beside the modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_what_exported_folders_are_made_of(tmp_path):
    """The license lies in the package as a link, and the wheel must have the text itself."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    finished = subprocess.run([*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    package = ROOT / "src" / "hivit_hf"
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if name.startswith("hivit_hf/")}
        for name in ("LICENSE", "hub/card_template.md", "py.typed", "hub/handler.py", "modeling_hivit.py"):
            assert files.read(f"hivit_hf/{name}") == (package / name).read_bytes(), name
        assert b"Apache License" in files.read("hivit_hf/LICENSE")
    there = [path for path in (source / "src" / "hivit_hf").rglob("*") if path.is_file()]
    assert names == {path.relative_to(source / "src").as_posix() for path in there}
