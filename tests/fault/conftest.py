"""An undisturbed run to compare with, and commands that are ended with their test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import end_of_run
from tests.fault import faults


@pytest.fixture
def cheap_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the plots and the timing at the end of a run in this process."""
    monkeypatch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
    monkeypatch.setattr(end_of_run, "draw", lambda *_: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_run, "images_per_second", lambda models, *_: [1.0] * len(models))
        patch.setattr(end_of_run, "draw", lambda *_: None)
        faults.run(faults.TINY, folder)
    return folder


@pytest.fixture
def command(tmp_path: Path) -> Iterator[faults.Command]:
    made = faults.Command(tmp_path)
    yield made
    made.close()
