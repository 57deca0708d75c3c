"""Claims of SECURITY.md that no other test makes, and that the tests it names are there."""

import ast
import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import train
from pipeline.config import Config
from pipeline.config.overrides import override
from pipeline.data.decode import open_picture
from pipeline.data.files import DamagedDataError
from pipeline.data.parquet import Layout, load_parquet
from pipeline.distributed.cluster import ray_cluster

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "moe").rglob("*.py")), *sorted((ROOT / "pipeline").rglob("*.py"))]


def calls() -> Iterator[tuple[Path, str, ast.Call]]:
    """Every call of our code, by its dotted name."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield file, ast.unparse(node.func), node


def imported() -> Iterator[tuple[Path, str]]:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield file, node.module or ""


def given(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(k.value) for k in call.keywords if k.arg == name), None)


def test_nothing_is_unpickled() -> None:
    """No pickle module; torch and numpy read with pickle off."""
    forbidden = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    assert not [(file, name) for file, name in imported() if name.split(".")[0] in forbidden]
    loads = [call for _, name, call in calls() if name == "torch.load"]
    assert loads
    assert all(given(call, "weights_only") is True for call in loads)
    arrays = [call for _, name, call in calls() if name in ("np.load", "numpy.load")]
    assert arrays
    assert all(given(call, "allow_pickle") is False for call in arrays)
    assert not [file for file, name, _ in calls() if name == "read_pickle"]


def test_nothing_is_evaluated_or_given_to_a_shell() -> None:
    forbidden = ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
    assert not [(file, name) for file, name, _ in calls() if name in forbidden]
    assert not [file for file, _, call in calls() if given_shell(call)]
    loaded = [call for _, name, call in calls() if name.startswith("yaml.")]
    assert all(ast.unparse(call.func) == "yaml.safe_load" for call in loaded)


def given_shell(call: ast.Call) -> bool:
    return any(k.arg == "shell" for k in call.keywords)


def bomb(side: int) -> bytes:
    """A PNG of side x side grey pixels, all black: its size is a thousandth of theirs."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    squeezer, out = zlib.compressobj(9), io.BytesIO()
    row = b"\0" * (side + 1)
    for _ in range(min(side, 200)):  # the header alone decides; the rest need not be there
        out.write(squeezer.compress(row))
    out.write(squeezer.flush())
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", out.getvalue()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_picture_of_50000_by_50000_is_refused_before_it_is_decoded() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="pixels"):
            open_picture(bomb(50_000))
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()
    assert open_picture(bomb(100)).size == (100, 100), "the maker makes real pictures"


def test_picture_bomb_in_a_data_set_ends_with_its_row_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBUST_MOE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    pictures = [bomb(32), bomb(50_000)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": each, "path": "x.png"} for each in pictures], kind)
    table = pa.table({"img": column, "label": pa.array([0, 1])})
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    with pytest.raises(DamagedDataError, match=r"row 1: image .*pixels"):
        load_parquet(folder, ["train"], Layout("label", num_classes=2, size=32))
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.parametrize("key", ["name", "experiment"])
@pytest.mark.parametrize("value", ["../../etc", "/etc", "a/b", "a\\b", "..", ".", ".hidden", ""])
def test_name_that_leaves_the_folder_is_refused(tmp_path: Path, key: str, value: str) -> None:
    settings = [f"storage={tmp_path}/runs", f"{key}={value}"]
    with pytest.raises(ValueError, match=f"{key} must be a plain name"):
        train.run(settings)
    assert not list(tmp_path.iterdir())


def test_password_in_a_setting_is_refused_and_not_repeated() -> None:
    uri = "http://me:hunter2@mlflow:5000"
    with pytest.raises(ValueError, match="tracking_uri must hold no password") as caught:
        override(Config(), {"tracking_uri": uri})
    assert "hunter2" not in str(caught.value)
    assert override(Config(), {"tracking_uri": "http://mlflow:5000"}).tracking_uri


def test_workers_get_no_secret_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    seen: dict[str, Any] = {}
    for name in ("MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    monkeypatch.setattr(ray, "init", lambda **words: seen.update(words))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster(Config(), check=lambda _: None):
        pass
    assert seen["runtime_env"]["env_vars"]["ROBUST_MOE_DATA"]
    assert "hunter2" not in str(seen)


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    file, found = None, 0
    for path, name in re.findall(r"`(tests/[\w/.]+\.py)?(?:::(\w+))?`", text):
        if path:
            file = ROOT / path
            assert file.is_file(), path
        if name:
            assert file is not None
            assert f"def {name}(" in file.read_text(), name
            found += 1
    assert found > 10
