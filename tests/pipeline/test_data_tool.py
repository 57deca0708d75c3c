"""The data tool, command by command, on files made here."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from PIL import Image

from pipeline import data_tool
from pipeline.data.cifar import Cifar10, Cifar100
from pipeline.data.imagenet import ImageNet
from pipeline.data.write_parquet import write_parquet


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUST_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ROBUST_MOE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def picture(seed: int, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


class FakeCifar:
    """What torchvision's CIFAR classes look like from outside."""

    classes = tuple(f"class {i:02}" for i in range(10))

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        assert Path(root).is_dir()
        count = 40 if train else 20
        draw = np.random.default_rng(int(train))
        self.data = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % len(self.classes) for i in range(count)]


class FakeCifar100(FakeCifar):
    classes = tuple(f"class {i:02}" for i in range(100))


def test_fetched_cifar10_loads_as_what_was_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    assert data_tool.main(["fetch", "cifar10"]) == 0
    splits = Cifar10(validation=0.5).load(seed=0)
    assert splits.class_names == FakeCifar.classes
    want = torch.from_numpy(FakeCifar("/", False, True).data).permute(0, 3, 1, 2)
    assert torch.equal(splits.test.pixels_NCHW, want)
    assert len(splits.train) + len(splits.validation) == 40
    files = sorted(path.name for path in (tmp_path / "data" / "cifar10").iterdir())
    assert files == ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]


def test_fetched_cifar100_has_fine_and_coarse_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCifar100)
    assert data_tool.main(["fetch", "cifar100", "--to", str(tmp_path / "here")]) == 0
    file = tmp_path / "here" / "cifar100" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    assert table.column_names == ["img", "fine_label", "coarse_label"]
    assert table["coarse_label"].to_pylist()[:5] == [4, 1, 14, 8, 0]  # apple is a fruit
    assert len(Cifar100(path=str(file.parent)).load(seed=0).class_names) == 100


def test_a_failed_download_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(**_: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    assert data_tool.main(["fetch", "cifar10"]) == 1
    assert capsys.readouterr().err == "cifar10 could not be fetched: no route to host\n"
    assert not (tmp_path / "data").exists()


def make_folder(root: Path, splits: tuple[str, ...]) -> dict[str, bytes]:
    """Make an image folder of classes bee and ant, and return its files by name."""
    files = {}
    for seed, (split, kind) in enumerate((s, k) for s in splits for k in ("bee", "ant")):
        folder = root / split / kind
        folder.mkdir(parents=True)
        for i, suffix in enumerate((".png", ".JPEG")):
            data = picture(10 * seed + i, (30, 20), "PNG" if suffix == ".png" else "JPEG")
            (folder / f"{kind}{i}{suffix}").write_bytes(data)
            files[f"{split}/{kind}{i}{suffix}"] = data
    return files


@pytest.mark.parametrize("splits", [("train", "val"), ("",)])
def test_imported_folders_keep_their_bytes(
    tmp_path: Path, splits: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    files = make_folder(tmp_path / "mine", splits)
    (tmp_path / "mine" / "notes.txt").write_text("not an image")
    assert data_tool.main(["import", str(tmp_path / "mine"), "insects"]) == 0
    printed = capsys.readouterr().out
    assert "2 classes: ant, bee" in printed
    assert "ignored 1 files" in printed
    for split in splits:
        name = f"{split or 'train'}-00000-of-00001.parquet"
        table = pq.read_table(tmp_path / "data" / "insects" / name)
        assert table["label"].to_pylist() == [0, 0, 1, 1]
        for row in table["image"].to_pylist():
            assert row["bytes"] == files[f"{split}/{row['path']}"]
    assert data_tool.main(["check", "insects"]) == 0
    assert "30 x 20: 4" in capsys.readouterr().out


def test_imported_cifar100_has_the_label_column_it_is_read_by(tmp_path: Path) -> None:
    make_folder(tmp_path / "mine", ("train",))
    assert data_tool.main(["import", str(tmp_path / "mine"), "cifar100"]) == 0
    table = pq.read_table(tmp_path / "data" / "cifar100" / "train-00000-of-00001.parquet")
    assert table.column_names == ["image", "fine_label"]


def test_a_damaged_image_is_not_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "mine", ("train",))
    bad = tmp_path / "mine" / "train" / "bee" / "bee0.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    assert data_tool.main(["import", str(tmp_path / "mine"), "insects"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{bad}: image cannot be decoded")
    assert error.count("\n") == 1
    assert not list((tmp_path / "data" / "insects").iterdir())


def test_folders_of_another_layout_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "mine", ("train",))
    (tmp_path / "mine" / "train" / "cat").mkdir()
    assert data_tool.main(["import", str(tmp_path / "mine"), "x"]) == 1
    assert "class folder" in capsys.readouterr().err
    assert data_tool.main(["import", str(tmp_path / "mine" / "train" / "bee"), "x"]) == 1
    assert "must hold <split>/<class>/<image>" in capsys.readouterr().err


def test_another_export_of_a_split_is_never_mixed_with_a_new_one(tmp_path: Path) -> None:
    make_folder(tmp_path / "mine", ("train",))
    (tmp_path / "data" / "insects").mkdir(parents=True)
    (tmp_path / "data" / "insects" / "train-00000-of-00002.parquet").write_text("old")
    assert data_tool.main(["import", str(tmp_path / "mine"), "insects"]) == 1


def test_check_shows_counts_and_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [(picture(seed), None) for seed in range(5)]
    for split in ("train", "test"):
        labels, names = {"label": [0, 1, 1, 1, 3]}, {"label": ["a", "b", "c", "d"]}
        write_parquet(tmp_path / "some", split, images, labels, names)
    assert data_tool.main(["check", str(tmp_path / "some")]) == 0
    printed = capsys.readouterr().out
    for want in ("3 of 4", "1-3", "32 x 32: 5", "RGB: 5", " train\n", " all\n"):
        assert want in printed


def test_check_names_file_and_row_of_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [(picture(0), None), (picture(1)[:-50], None)]
    file = write_parquet(tmp_path, "train", images, {"label": [0, 1]}, {"label": ["a", "b"]})
    assert data_tool.main(["check", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{file}: row 1: image cannot be decoded")
    assert error.count("\n") == 1
    assert data_tool.main(["check", "cifar10"]) == 1
    assert "set ROBUST_MOE_DATA" in capsys.readouterr().err


def test_check_knows_datasets_without_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_tool.main(["check", "digits"]) == 0
    assert "1295" in capsys.readouterr().out
    assert data_tool.main(["fetch", "digits"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_list_shows_every_dataset_and_the_rows_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"label": [str(i) for i in range(10)]}
    for split in ("train", "test"):
        folder = tmp_path / "data" / "cifar10"
        write_parquet(folder, split, [(picture(0), None)] * 3, {"label": [0, 1, 2]}, names)
    assert data_tool.main(["list"]) == 0
    printed = capsys.readouterr().out
    for want in ("digits", "synthetic", "train 3, test 3", "not there"):
        assert want in printed


def make_archive(root: Path) -> dict[str, bytes]:
    """Lay out what Tiny-ImageNet's archive holds: two classes, of which one is in valid."""
    files = {}
    for wnid in ("n02", "n01"):
        folder = root / "tiny-imagenet-200" / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            files[f"{wnid}_{i}.JPEG"] = picture(len(files), (64, 64), "JPEG")
            (folder / f"{wnid}_{i}.JPEG").write_bytes(files[f"{wnid}_{i}.JPEG"])
    val = root / "tiny-imagenet-200" / "val"
    (val / "images").mkdir(parents=True)
    files["val_0.JPEG"] = picture(9, (64, 64), "JPEG")
    (val / "images" / "val_0.JPEG").write_bytes(files["val_0.JPEG"])
    (val / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t63\t63\n")
    return files


def test_fetched_tiny_imagenet_keeps_its_bytes_and_sorts_its_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files: dict[str, bytes] = {}

    def download(url: str, root: str, md5: str) -> None:
        assert url.endswith("tiny-imagenet-200.zip")
        assert len(md5) == 32
        files.update(make_archive(Path(root)))

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", download)
    assert data_tool.main(["fetch", "tiny_imagenet"]) == 0
    folder = tmp_path / "data" / "tiny-imagenet"
    found = {}
    for split in ("train", "valid"):
        table = pq.read_table(folder / f"{split}-00000-of-00001.parquet")
        found[split] = table["label"].to_pylist()
        for row in table["image"].to_pylist():
            assert row["bytes"] == files[row["path"]]
    assert found == {"train": [0, 0, 1, 1], "valid": [1]}


def test_fetched_imagenette_has_imagenets_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fake(root: str, size: str, download: bool) -> None:
        for split in ("train", "val"):
            for wnid in ("n03888257", "n01440764"):
                folder = Path(root) / "imagenette2-320" / split / wnid
                folder.mkdir(parents=True)
                (folder / "one.JPEG").write_bytes(picture(len(wnid), (50, 40), "JPEG"))

    monkeypatch.setattr(torchvision.datasets, "Imagenette", fake)
    assert data_tool.main(["fetch", "imagenette"]) == 0
    dataset = ImageNet(variant="imagenette", image_size=16, validation=0.5)
    splits = dataset.load(seed=0)
    assert sorted(splits.test.labels_N.tolist()) == [0, 701]
    assert (splits.class_names[0], splits.class_names[701]) == ("tench", "parachute")


def test_imagenet_is_not_fetched_but_explained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert data_tool.main(["fetch", "imagenet"]) == 1
    error = capsys.readouterr().err
    assert "terms have to be accepted" in error
    assert f"put them in {tmp_path}/data/imagenet;" in error
    assert error.count("\n") == 1


def test_imported_imagenet_is_mixed_and_complete(tmp_path: Path) -> None:
    """Rows sorted by class would be streamed in windows of few classes."""
    for kind in range(4):
        folder = tmp_path / "mine" / "train" / f"n{kind}"
        folder.mkdir(parents=True)
        for i in range(6):
            (folder / f"{kind}{i}.jpg").write_bytes(picture(10 * kind + i, (30, 20), "JPEG"))
    assert data_tool.main(["import", str(tmp_path / "mine"), "imagenet"]) == 0
    file = tmp_path / "data" / "imagenet" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    labels = table["label"].to_pylist()
    assert sorted(labels) == [i // 6 for i in range(24)]
    assert labels != sorted(labels)
    assert all(
        int(row["path"][0]) == y for row, y in zip(table["image"].to_pylist(), labels, strict=True)
    )
    first = file.read_bytes()
    assert data_tool.main(["import", str(tmp_path / "mine"), "imagenet"]) == 0
    assert file.read_bytes() == first, "always in the same order"


def test_row_groups_are_bounded_in_bytes(tmp_path: Path) -> None:
    """A stream holds whole row groups."""
    images = [(bytes(6 << 20), None)] * 7
    file = write_parquet(tmp_path, "train", images, {"label": [0] * 7}, {"label": ["a"]})
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(g).num_rows for g in range(3)] == [3, 3, 1]


def test_data_behind_a_uri_are_listed_and_checked_but_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"label": [str(i) for i in range(1000)]}
    for split in ("train", "val"):
        folder = tmp_path / "data" / "imagenet"
        write_parquet(folder, split, [(picture(0), None)] * 3, {"label": [0, 1, 2]}, names)
    monkeypatch.setenv("ROBUST_MOE_DATA", f"file://{tmp_path}/data")
    assert data_tool.main(["list"]) == 0
    assert "train 3, val 3" in capsys.readouterr().out
    for target in ("imagenet", f"file://{tmp_path}/data/imagenet"):
        assert data_tool.main(["check", target]) == 0
        assert "3 of 1000" in capsys.readouterr().out
    assert data_tool.main(["fetch", "cifar10"]) == 1
    assert "cannot be written: give a folder by --to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "cifar11"], "no folder and no dataset 'cifar11', only digits, synthetic,"),
        (["fetch", "mnist"], "no dataset 'mnist', only digits, synthetic, cifar10, cifar100"),
        (["import", "/no/such", "mine"], "folder /no/such does not exist"),
        (["import", ".", "../mine"], "NAME must be letters"),
        (["bogus"], "invalid choice: 'bogus'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        data_tool.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        data_tool.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for want in ("list", "fetch", "import", "check", "ROBUST_MOE_DATA"):
        assert want in printed
