"""The documentation: its commands and code run, its links and names resolve."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_architecture import LEVEL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- runnable(?P<slow>: slow)? -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "mlruns", "mlartifacts")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``runnable`` where the comment before it says so."""

    page: Path
    kind: str
    text: str
    runnable: bool
    slow: bool


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    for found in BLOCK.finditer(page.read_text("utf-8")):
        runnable = found.group().startswith("<!-- runnable")
        yield Block(page, found["kind"], found["text"], runnable, bool(found["slow"]))


RUNNABLE = [
    pytest.param(
        block,
        id=f"{shown(page)}-{turn}-{block.kind}",
        marks=[pytest.mark.slow, pytest.mark.timeout(1800)] if block.slow else [],
    )
    for page in PAGES
    for turn, block in enumerate(blocks(page))
    if block.runnable
]


def run(command: list[str], home: Path) -> str:
    """Run a command in ``home``, with this project and this Python first in their paths."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        command,
        cwd=home,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("block", RUNNABLE)
def test_marked_block_runs(block: Block, tmp_path: Path) -> None:
    """A shell block line by line, and one that installs the project in a copy of it."""
    home = tmp_path / "home"
    if "pip install" in block.text:
        shutil.copytree(ROOT, home, ignore=NOT_COPIED)
    else:
        home.mkdir()
    if block.kind == "python":
        run([sys.executable, "-c", block.text], home)
    else:
        run(["bash", "-euo", "pipefail", "-c", block.text], home)


def test_algorithm_of_the_readme_trains(tmp_path: Path) -> None:
    code = "".join(b.text for b in blocks(ROOT / "README.md") if b.kind == "python")
    script = tmp_path / "mine.py"
    script.write_text(
        code
        + """
from pathlib import Path
from pipeline.config import override
from pipeline.loop import fit
from pipeline.presets import PRESETS

changes = {"algorithm": "mine", "algorithm.attack.steps": 1, "dataset": "synthetic"}
changes |= {"dataset.size": 8, "epochs": 3, "workers": 1, "evaluation.steps": 1}
print(fit(override(PRESETS["quickstart"](), changes), Path("run"))["test/sa"])
"""
    )
    accuracy = float(run([sys.executable, str(script)], tmp_path).splitlines()[-1])
    assert accuracy > 0.5, "ten classes, patterns that any network learns"


def test_components_of_the_extending_page_work_together(tmp_path: Path) -> None:
    """Every Python block of the page, in order, in one process."""
    script = tmp_path / "extending.py"
    page = ROOT / "docs" / "extending.md"
    script.write_text("".join(b.text for b in blocks(page) if b.kind == "python"))
    run([sys.executable, str(script)], tmp_path)


def test_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@functools.cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text, found, seen = BLOCK.sub("", page.read_text("utf-8")), set(), Counter[str]()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", title.lower())
        slug = plain.strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_named_files_and_commands_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for path in re.findall(r"`((?:moe|pipeline|tune_spaces|tests|docs|cluster)/[\w./-]+)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"(?:`|python -m )((?:pipeline|tests)(?:\.\w+)+)", text):
        assert importlib.util.find_spec(module), module


def test_floors_of_the_architecture_page_are_in_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", page, re.MULTILINE)
    levels = [[LEVEL[room] for room in re.findall(r"`(\w+)`", row)] for row in rows]
    assert len(levels) > 5
    for above, below in itertools.pairwise(levels):
        assert min(above) > max(below)
