"""What ends a command is one line that names the thing and what helps, whoever raised it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow.exceptions import MlflowException
from PIL import UnidentifiedImageError
from ray.exceptions import RaySystemError
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from pipeline.cli.arguments import HELP, explain, from_library, main


def raising(error: BaseException) -> Any:
    def run(argv: list[str]) -> int:
        raise error

    return run


def ended(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as found:
        main(raising(error))
    return int(found.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("lr must be above 0, got 0"), 2, "lr must be above 0, got 0"),
        (ConnectionError("no MLflow at http://a:1"), 1, "no MLflow at http://a:1"),
        (TimeoutError(), 1, "TimeoutError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MlflowException("run `mlflow db upgrade\n sqlite:///a.db`"), 1, "upgrade sqlite:///a.db"),
        (RaySystemError("the object store\nis full"), 1, "the object store is full"),
        (SafetensorError("header too large"), 1, "SafetensorError: header too large"),
        (OperationalError("select", {}, Exception("password")), 1, "password"),
        (pa.ArrowNotImplementedError("no codec zz"), 1, "no codec zz"),
        (UnidentifiedImageError("a.png"), 1, "a.png"),
    ],
)
def test_error_of_a_setting_or_a_library_is_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, line = ended(error, capsys)
    assert found == code
    assert line.startswith("error: ")
    assert said in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("ours"), RuntimeError("torch's"), KeyError("a")])
def test_bug_keeps_its_traceback(error: Exception) -> None:
    assert not from_library(error)
    with pytest.raises(type(error)):
        main(raising(error))


def test_error_of_a_class_derived_from_a_library_s_is_that_library_s() -> None:
    class Own(MlflowException): ...

    assert from_library(Own("a"))


@pytest.mark.parametrize("number", sorted(HELP))
def test_error_about_a_file_names_it_and_what_helps(number: int) -> None:
    text = explain(OSError(number, "words", "/somewhere/x"))
    assert text == f"words: /somewhere/x{HELP[number]}"


def test_error_without_help_names_the_file_alone() -> None:
    assert explain(OSError(errno.EIO, "Input/output error", "a")) == "Input/output error: a"
    assert explain(OSError("only words")) == "only words"


def test_real_errors_of_the_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        try:
            path.mkdir()
        except OSError as error:
            code, line = ended(error, capsys)
            assert code == 1
            assert str(path) in line
            assert ("storage= must be a folder" in line) or ("a shorter name=" in line)
