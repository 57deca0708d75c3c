"""What a user sees of a sweep in MLflow's own pages, in a real headless browser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pipeline.sweep import write_answer
from tests.helpers.servers import Mlflow
from tests.helpers.sweeps import Store, shares

playwright = pytest.importorskip("playwright.sync_api", reason="no package playwright")

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (  # a browser that looks for nothing outside, and runs as root in a container
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
NOBODY = "/mlflow/users/current"  # asked for by every page; 404 where nobody logs in
PATIENCE = 120_000  # ms; of a page on a busy machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def runs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A sweep with its answer on the parent run."""
    parent = store.sweep(name="tune-adv_moe-pages")
    found = {"parent": parent}
    for number in range(8):
        found[str(number)] = store.trial(
            parent,
            number,
            shares(0.40 + 0.02 * number, 0.33 - 0.01 * number),
            gmac=0.05 + 0.02 * (number % 3),
            settings={"backbone.ratio": 0.25 * (1 + number % 3), "algorithm.beta": 1 + number},
            name=f"trial-of-pages-{number}",
        )
    folder = tmp_path_factory.mktemp("answer")
    write_answer(parent, folder, store.uri)
    store.client.log_artifacts(parent, str(folder), "answer")
    store.client.set_terminated(parent)
    return found


@pytest.fixture(scope="module")
def server(store: Store, runs: dict[str, str]) -> Iterator[str]:
    """MLflow's server over the store, on loopback."""
    server = Mlflow(store.uri, store.folder)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield browser
        browser.close()


class Tab:
    """A page, and what went wrong on it."""

    def __init__(self, browser: Any, server: str):
        self.server, self.wrong = server, list[str]()
        self.page = browser.new_page(viewport={"width": 1500, "height": 950})
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("response", self.heard)

    def heard(self, response: Any) -> None:
        ours = response.url.startswith(self.server) and not response.url.endswith(NOBODY)
        if ours and response.status >= 400:
            self.wrong.append(f"{response.status} {response.url}")

    def open(self, path: str) -> Any:
        self.page.goto(f"{self.server}/#{path}")
        return self.page

    def show(self, text: str) -> None:
        """Wait until a text can be seen."""
        self.page.get_by_text(text, exact=False).first.wait_for(state="visible")

    def keep(self, name: str) -> None:
        """Take a screenshot where the environment asks for them."""
        if folder := os.environ.get("ROBUST_MOE_SCREENSHOTS"):
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def tab(browser: Any, server: str) -> Iterator[Tab]:
    tab = Tab(browser, server)
    yield tab
    tab.page.close()


def test_experiment_lists_the_sweep_and_its_trials(
    tab: Tab, store: Store, runs: dict[str, str]
) -> None:
    tab.open("/experiments")
    tab.show("robust-moe")
    tab.open(f"/experiments/{store.experiment}/runs")
    tab.show("tune-adv_moe-pages")
    tab.page.get_by_text("9 matching runs").wait_for(state="visible")
    tab.keep("list")
    assert tab.wrong == []


def test_two_trials_are_compared(tab: Tab, store: Store, runs: dict[str, str]) -> None:
    chosen = quote(json.dumps([runs["0"], runs["5"]]))
    within = quote(json.dumps([store.experiment]))
    tab.open(f"/compare-runs?runs={chosen}&experiments={within}")
    for text in ("trial-of-pages-0", "trial-of-pages-5", "val/ra_worst", "algorithm.beta"):
        tab.show(text)
    tab.keep("compare")
    assert tab.wrong == []


def test_front_is_shown_as_an_artifact(tab: Tab, store: Store, runs: dict[str, str]) -> None:
    path = f"/experiments/{store.experiment}/runs/{runs['parent']}/artifacts/answer/front.html"
    page = tab.open(path)
    frame = page.frame_locator("iframe").first
    frame.get_by_role("heading", name="Sweep adv_moe").wait_for(state="visible")
    assert frame.locator("figure svg").is_visible()
    assert frame.locator("svg a").count() == 16  # 8 trials in two panels
    said = frame.locator("svg a title").all_text_contents()
    assert any(text.startswith("trial 0; SA 40.0 (35.3 to 44.9); RA worst 33.0") for text in said)
    assert frame.locator("svg a:not([tabindex='-1'])").count() == 8  # the tab key stops once each
    frame.locator("svg a").first.hover()
    assert frame.locator("tbody tr.on").count() == 1
    heading = frame.get_by_role("heading", name="Pareto front, 8 trial(s)")
    heading.wait_for(state="visible")
    first = frame.locator("tbody tr").first
    assert first.locator("th").inner_text() == "0"
    frame.get_by_role("button", name="SA", exact=True).first.click()
    assert frame.locator("tbody tr").first.locator("th").inner_text() == "7"  # the script runs
    tab.keep("front")
    assert tab.wrong == []
