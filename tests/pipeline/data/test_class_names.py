"""Labels mean the same classes in all files, or are refused with the likely cause."""

import ast
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import data_tool
from pipeline.data.class_names import ClassNamesError, check_same_classes
from pipeline.data.image_folder import scan
from pipeline.data.parquet import Layout, load_parquet
from pipeline.data.validate import check_names

NFD = unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("names", "other", "cause"),
    [
        (["b", "a"], ["a", "b"], "the names are the same in another order"),
        (["1", "10", "2"], ["1", "2", "10"], "one of them orders numbers as words"),
        (["Cat", "dog"], ["cat", "dog"], "they differ in upper and lower case"),
        ([NFD, "x"], [unicodedata.normalize("NFC", NFD), "x"], "Unicode form"),
        (["sea lion", "x"], ["sea_lion", "x"], "blanks, dashes or underscores"),
        (["a", "b"], ["c", "d"], "no name in common"),
        (["a", "b"], ["a", "b", "c"], "has 2 classes, there has 3"),
        (["a", "a"], ["a", "b"], "two classes are called 'a'"),
    ],
)
def test_lists_that_differ_are_refused_with_the_likely_cause(
    names: list[str], other: list[str], cause: str
) -> None:
    with pytest.raises(ClassNamesError) as found:
        check_same_classes("here", names, "there", other)
    assert cause in str(found.value)


def test_equal_and_unknown_names_pass() -> None:
    check_same_classes("here", ["a", "b"], "there", ["a", "b"])
    check_same_classes("here", [], "there", ["a", "b"])
    check_same_classes("here", ["0", "1"], "there", ["a", "b"])  # numbers in place of names


def write(file: Path, names: list[str], kind: Any = None) -> None:
    """One black image of each class, as ``datasets`` exports them."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": "x.png"}] * len(names)
    struct = pa.struct([("bytes", kind or pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, struct), "label": list(range(len(names)))})
    info = {"info": {"features": {"label": {"names": names}}}}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), file)


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ],
)
def test_shards_and_splits_with_other_orders_are_refused(
    tmp_path: Path, files: tuple[str, str]
) -> None:
    for file, names in zip(files, (["a", "b"], ["b", "a"]), strict=True):
        write(tmp_path / file, names)
    paths = [tmp_path / file for file in files]
    with pytest.raises(ClassNamesError, match=r"label 0 is 'a' in .* and 'b' in "):
        check_names(paths, "label")
    splits = sorted({file.partition("-")[0] for file in files}, reverse=True)
    with pytest.raises(ClassNamesError, match="the same in another order"):
        load_parquet(tmp_path, splits, Layout("label", num_classes=2, size=4))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_bytes_are_read_however_arrow_calls_them(tmp_path: Path, kind: Any) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", ["a", "b"], kind)
    stored = load_parquet(tmp_path, ["train"], Layout("label", num_classes=2, size=4))
    assert stored.images[0].labels_N.tolist() == [0, 1]
    assert stored.class_names == ("a", "b")


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    return folder


def test_class_has_the_images_of_the_folders_below_it(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/a/more/2.png", "train/a/more/deep/3.png", "train/b/1.png")
    (tmp_path / "train/b/notes.txt").write_text("x")
    (tmp_path / "train/b/.DS_Store").write_text("x")
    found = scan(tmp_path)
    assert [found.label_of[file] for file in found.splits["train"]] == [0, 0, 0, 1]
    assert found.ignored == {".txt": 1, "hidden": 1}


def test_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "train/b/2.png").symlink_to("/nowhere/annexed.png")
    with pytest.raises(ValueError, match=r"2\.png is a link to /nowhere/annexed\.png"):
        scan(tmp_path)


def test_numbered_classes_are_ordered_by_number(tmp_path: Path) -> None:
    put(tmp_path, *(f"train/{number}/1.png" for number in (10, 9, 2, 1, 0)))
    assert scan(tmp_path).class_names == ("0", "1", "2", "9", "10")


@pytest.mark.parametrize(
    ("other", "cause"),
    [("A", "upper and lower case"), ("c", "label 0 is 'b'"), ("more", "label 0 is 'b'")],
)
def test_splits_of_other_classes_are_refused(tmp_path: Path, other: str, cause: str) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", f"test/{other}/1.png", "test/b/1.png")
    with pytest.raises(ValueError, match="splits must have the same class folders") as found:
        scan(tmp_path)
    assert cause in str(found.value)


def test_old_split_of_other_classes_is_named_by_import_and_refused_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = put(tmp_path / "1", "train/ant/1.png", "train/bee/1.png", "test/ant/1.png")
    put(first, "test/bee/1.png")
    second = put(tmp_path / "2", "train/aardvark/1.png", "train/bee/1.png")
    to = ["--to", str(tmp_path / "out")]
    assert data_tool.main(["import", str(first), "mine", *to]) == 0
    assert data_tool.main(["import", str(second), "mine", *to]) == 1
    assert "import its split again" in capsys.readouterr().err
    assert data_tool.main(["check", str(tmp_path / "out" / "mine")]) == 1
    assert "'aardvark'" in capsys.readouterr().err


def test_class_names_are_compared_in_one_place_alone() -> None:
    """Whoever compares names by hand forgets the causes, and the next kind of file."""
    root = Path(__file__).parents[3] / "pipeline"
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                sides = ast.unparse(node)
                by_hand = sides.count("class_names") > 1 and "len(" not in sides
                assert not by_hand or file.name == "class_names.py", f"{file}: {sides}"
