"""Data behind URIs, through pyarrow's file systems for this disk and for tests."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import fs

from pipeline.data import files
from pipeline.data.cifar import Cifar10
from pipeline.data.files import DamagedDataError, Remote, find_shards, find_splits, fingerprint
from pipeline.data.parquet import Layout
from pipeline.data.row_groups import read_index
from pipeline.data.splits import Share, locate
from pipeline.data.streaming import Streamed

NAME = "{}-00000-of-00001.parquet"


@pytest.fixture
def cifar(tmp_path: Path, encode: Callable, write: Callable) -> Path:
    images, labels = [encode(seed=seed) for seed in range(20)], [i % 10 for i in range(20)]
    for split in ("train", "test"):
        write(tmp_path / "root" / "cifar10" / NAME.format(split), images, labels)
    return tmp_path / "root"


@pytest.fixture
def store(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    """A store in memory that answers for ``s3://bucket``."""
    mock = fs._MockFileSystem()
    mock.create_dir("bucket/some/cifar10")
    for file in (cifar / "cifar10").iterdir():
        with mock.open_output_stream(f"bucket/some/cifar10/{file.name}") as out:
            out.write(file.read_bytes())
    monkeypatch.setattr(files, "filesystem", lambda uri: (mock, "bucket"))
    return mock


@pytest.mark.parametrize("root", ["file://{}", "s3://bucket/some"])
def test_data_behind_a_uri_are_those_of_the_folder(
    cifar: Path, store: fs.FileSystem, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    here = Cifar10(path=str(cifar / "cifar10"), validation=0.5).load(seed=0)
    if root.startswith("file"):
        monkeypatch.undo()
    monkeypatch.setenv("ROBUST_MOE_CACHE", str(cifar / "other cache"))
    monkeypatch.setenv("ROBUST_MOE_DATA", root.format(cifar))
    there = Cifar10(validation=0.5).load(seed=0)
    assert there.sha256 == here.sha256
    assert torch.equal(there.test.pixels_NCHW, here.test.pixels_NCHW)
    assert Cifar10(path=f"{root.format(cifar)}/cifar10").load(seed=0).sha256 == here.sha256


def test_a_stream_reads_from_a_store(store: fs.FileSystem, cifar: Path) -> None:
    layout, found = Layout("label", 10), []
    for folder in (cifar / "cifar10", Remote("s3://bucket/some/cifar10")):
        index = read_index(find_shards(folder, "train"), layout)
        stream = Streamed(index, torch.arange(20).numpy(), layout, 16, 0.2, "threads")
        found.append(next(stream.batches(Share(seed=0, epoch=0, first=0, batch_size=10))))
    assert torch.equal(found[0][0], found[1][0])


def test_what_is_missing_in_a_store_is_named_by_its_uri(store: fs.FileSystem) -> None:
    folder = Remote("s3://bucket/some/cifar10")
    assert find_splits(folder) == ["train", "test"]
    with pytest.raises(DamagedDataError, match="data folder s3://bucket/none does not exist; set"):
        find_shards(Remote("s3://bucket/none"), "train")
    message = (
        r"no valid split in s3://bucket/some/cifar10: looked for valid-\*\.parquet, found test"
    )
    with pytest.raises(DamagedDataError, match=message):
        find_shards(folder, "valid")


class Closed:
    """A store that lets nobody in."""

    def get_file_info(self, where: object) -> None:
        raise OSError("When reading: AWS Error ACCESS_DENIED\nand a page of XML")


@pytest.mark.parametrize("error", [OSError("no route\nto host"), pa.ArrowInvalid("no such scheme")])
def test_a_store_that_cannot_be_reached_is_one_line_with_its_uri(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(uri: str) -> None:
        raise error

    monkeypatch.setattr(files, "filesystem", fail)
    with pytest.raises(DamagedDataError, match=r"^s3://b/cifar10 cannot be read: no [a-z ]+$"):
        find_shards(Remote("s3://b") / "cifar10", "train")
    monkeypatch.setattr(files, "filesystem", lambda uri: (Closed(), "b"))
    with pytest.raises(DamagedDataError, match=r"^gs://b/x cannot be read: .*ACCESS_DENIED$"):
        find_shards(Remote("gs://b/x"), "train")


def test_secrets_of_a_uri_are_used_but_never_shown() -> None:
    folder = Remote("s3://key:secret@bucket/a?endpoint_override=localhost:9000&scheme=http") / "b"
    assert folder.uri == "s3://key:secret@bucket/a/b?endpoint_override=localhost:9000&scheme=http"
    assert str(folder) == "s3://bucket/a/b"


def test_a_uri_that_pyarrow_does_not_know_is_named() -> None:
    with pytest.raises(DamagedDataError, match=r"^ftp://host/x cannot be read: Unrecognized"):
        find_shards(locate("ftp://host/x", ""), "train")


def test_large_sets_are_hashed_by_name_size_and_footer(
    cifar: Path, encode: Callable, write: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cifar / "cifar10" / NAME.format("train")
    whole = fingerprint([file])
    monkeypatch.setattr(files, "WHOLE", 10)
    large = fingerprint([file])
    assert large != whole
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # a pixel: found when the row is read, not here
    file.write_bytes(data)
    assert fingerprint([file]) == large
    write(file, [encode(seed=s) for s in range(20)], [9 - i % 9 for i in range(20)])
    assert fingerprint([file]) != large
    renamed = file.rename(file.with_name(NAME.format("valid")))
    assert fingerprint([renamed]) != large
    renamed.write_bytes(b"PAR1 and no end")
    with pytest.raises(DamagedDataError, match="it has no footer"):
        fingerprint([renamed])
