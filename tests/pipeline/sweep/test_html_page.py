"""The answer as a page: whole by itself, escaped, and readable without its picture."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.sweep import write_answer
from pipeline.sweep.__main__ import run
from tests.helpers.sweeps import Store, shares

EVIL = "<script>alert('$x$')</script>|`[a](b)"


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside, self.text = False, ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def all(self, tag: str, key: str) -> list[str]:
        return [value for name, own in self.tags if name == tag and (value := own.get(key))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def folder(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answer of a sweep whose every text tries to break out."""
    parent = store.sweep(EVIL, preset=EVIL, name=EVIL, tier=EVIL)
    store.trial(parent, 0, shares(0.50, 0.30), gmac=0.2, name=EVIL, tags={"hardware": EVIL})
    store.trial(parent, 1, shares(0.48, 0.28), gmac=0.1)
    store.trial(parent, EVIL, shares(0.40, 0.29), gmac=0.05)
    store.trial(parent, 2, shares(0.40, 0.20), gmac=0.3)
    store.trial(parent, 3, {"sa": 0.3, "ra": 0.2}, status="stopped", reason=EVIL)
    store.trial(parent, 4, gmac=0.4, status="infeasible", reason=EVIL)
    folder = tmp_path_factory.mktemp("answer")
    write_answer(parent, folder, store.uri)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "front.html")


def test_text_of_runs_is_escaped(page: Page, folder: Path) -> None:
    assert EVIL in page.text
    assert page.count("script") == len(page.scripts) == 1
    assert "alert" not in page.scripts[0]
    text = (folder / "answer.md").read_text()
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "infeasible" in row}
    assert len(widths) == 1


def test_policy_lets_run_its_own_script_and_load_nothing(page: Page) -> None:
    (policy,) = page.all("meta", "content")[:1]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"\son\w+=", page.source.partition("<script>")[0])


def test_page_refers_to_nothing_outside(page: Page) -> None:
    for tag, own in page.tags:
        for key in ("src", "href", "xlink:href", "action"):
            value = own.get(key) or "#"
            assert value.startswith(("#", "data:image/")), (tag, key, value)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert "@import" not in page.source
    assert set(re.findall(r"https?://[^\s\"'<]*", page.source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_marks_lead_to_rows(page: Page) -> None:
    rows = set(page.all("tr", "id"))
    assert rows == {f"trial-{place}" for place in range(6)}
    links = page.all("a", "xlink:href")
    assert {link[1:] for link in links} == rows
    assert len(links) == 2 * len(rows) - 1  # in both panels, the infeasible one over cost alone
    ids = [own["id"] for _, own in page.tags if own.get("id")]
    assert len(ids) == len(set(ids))


def test_tables_are_tables(page: Page, folder: Path) -> None:
    heads = [own for tag, own in page.tags if tag == "th"]
    assert {own.get("scope") for own in heads} == {"col", "row"}
    assert all(page.all("div", "aria-label"))
    for row in csv.DictReader((folder / "front.csv").open()):
        if row["val/ra_worst"]:
            assert f"{100 * float(row['val/ra_worst']):.1f} (" in page.text


def test_same_sweep_makes_the_same_files(store: Store, tmp_path: Path) -> None:
    parent = store.sweep("again", keys=("algorithm.beta",))
    for number, beta in enumerate((1, 3)):
        settings = {"algorithm.beta": beta}
        store.trial(parent, number, shares(0.5, 0.3), settings=settings)
    first = write_answer(parent, tmp_path / "first", store.uri)
    second = write_answer(parent, tmp_path / "second", store.uri)
    assert [file.name for file in first] == [file.name for file in second]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_command_writes_the_newest_sweep_and_puts_it_on_the_parent_run(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = store.sweep("newest")
    store.trial(parent, 0, shares(0.5, 0.3))
    out = tmp_path / "out"
    assert run(["latest", f"tracking_uri={store.uri}", f"folder={out}", "--upload"]) == 0
    said = capsys.readouterr().out
    assert "Sweep newest on adv_moe_cifar10_small" in said
    assert "1 trials are too few to tell" not in said  # one trial has nothing to compare
    names = {"front.csv", "answer.md", "front.png", "front.html"}
    assert {file.name for file in out.iterdir()} == names
    kept = store.client.list_artifacts(parent, "answer")
    assert {file.path for file in kept} == {f"answer/{name}" for name in names}
    with pytest.raises(ValueError, match="which sweep"):
        run([])
    with pytest.raises(ValueError, match="no key 'out', only folder, experiment, tracking_uri"):
        run(["latest", "out=there"])
    with pytest.raises(ValueError, match="no experiment 'nothing'"):
        run(["latest", f"tracking_uri={store.uri}", "experiment=nothing"])
