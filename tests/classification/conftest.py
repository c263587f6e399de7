"""Folders that the tests of evaluation share."""

from pathlib import Path

import pytest

from support.digit_folders import save_classifiers, save_digits


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The digits as saved datasets: all, a few, and with several labels per image."""
    return save_digits(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory) -> list[str]:
    return save_classifiers(tmp_path_factory.mktemp("classifiers"))
