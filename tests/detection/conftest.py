"""Fixtures of the tests of detection."""

from pathlib import Path

import pytest

from scenes.data import write_coco


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Eight training scenes and four test scenes, 64x80 px, as COCO files."""
    folder = tmp_path_factory.mktemp("scenes")
    write_coco(folder, {"train": 8, "test": 4}, height_px=64, width_px=80)
    return folder
