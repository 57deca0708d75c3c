"""Workers that go on together, or stop together."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.context import Session
from tests.helpers.pair import run_pair


def items(count: int, damaged: int = -1) -> Iterator[int]:
    for i in range(count):
        if i == damaged:
            raise ValueError(f"row {i} is damaged")
        yield i


def take(session: Session, source: Iterator[int]) -> str:
    taken = []
    try:
        taken = [*session.in_step(source)]
    except ValueError as error:
        return str(error)
    return str(taken)


def work(rank: int, folder: str) -> None:
    session = Session(rank=rank, world=2)
    lines = [
        take(session, items(3)),
        take(session, items(3, damaged=1 if rank else -1)),
        take(session, items(3 + rank)),
    ]
    Path(folder, str(rank)).write_text("\n".join(lines))


def test_an_error_of_one_worker_ends_all_of_them_with_its_reason(tmp_path: Path) -> None:
    run_pair(work, tmp_path)
    for rank in range(2):
        assert Path(tmp_path, str(rank)).read_text().splitlines() == [
            "[0, 1, 2]",
            "row 1 is damaged",
            "1 of 2 workers had no batch",
        ]


def test_alone_items_and_errors_pass_through() -> None:
    assert list(Session().in_step(items(3))) == [0, 1, 2]
    with pytest.raises(ValueError, match="row 1"):
        list(Session().in_step(items(3, damaged=1)))
