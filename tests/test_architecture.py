"""Imports point one way, nothing imports a command, and heavy packages stay in their rooms."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of pipeline/: a room may import rooms of the floors below it.
FLOORS = (
    ("seeding", "attacks", "context", "nearest_names"),
    ("optimization", "data"),
    ("algorithms", "measures"),
    ("config", "cli"),
    ("presets", "checkpoint", "tracking"),
    ("optim", "storage", "report"),
    ("evaluation", "sweep"),
    ("end_of_run",),
    ("loop",),
    ("distributed",),
    ("bench", "certify", "dual", "export", "grid", "serving", "study", "tune"),
)
COMMANDS = ("train", "evaluate", "data_tool", "doctor", "serve", "submit")
LEVEL = {room: level for level, rooms in enumerate((*FLOORS, COMMANDS)) for room in rooms}
ONLY = {
    "ray": {"distributed", "tune", "grid", "data.streaming", "serving"},
    "mlflow": {"tracking", "report", "sweep"},
}
SAME_NAME = {"__init__", "__main__", "base"}
"""Modules that may stand in several rooms: a room's protocol of its components is its base."""
OURS = {"moe", "pipeline", "tune_spaces", "cluster", "tests"}
HEAVY = (
    *("ray", "mlflow", "pyarrow", "matplotlib", "safetensors", "sklearn", "rich", "PIL", "scipy"),
    "torchvision",
)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens as soon as it is imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            for alias in node.names:  # a name of a package may be a module of it
                path = f"{node.module}.{alias.name}"
                inside = (ROOT / f"{path.replace('.', '/')}.py").exists()
                yield path if inside else node.module, id(node) not in later


def room(file: Path) -> str:
    """A module's room: its path below pipeline, ``data.streaming`` or ``loop``."""
    parts = file.relative_to(ROOT / "pipeline").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def shown(file: Path) -> str:
    return str(file.relative_to(ROOT))


PIPELINE = [pytest.param(file, id=shown(file)) for file in modules("pipeline")]
MOE = [pytest.param(file, id=shown(file)) for file in modules("moe")]


@pytest.mark.parametrize("file", MOE)
def test_moe_is_plain_torch(file: Path) -> None:
    roots = {name.partition(".")[0] for name, _ in imports(file)}
    assert roots <= {"moe", "torch", "safetensors"} | sys.stdlib_module_names


@pytest.mark.parametrize("file", MOE)
def test_backbones_build_on_moe_and_not_the_other_way_round(file: Path) -> None:
    if "backbones" not in file.parts:
        assert not [name for name, _ in imports(file) if name.startswith("moe.backbones")]


@pytest.mark.parametrize("file", PIPELINE)
def test_pipeline_imports_point_one_way(file: Path) -> None:
    own = room(file).partition(".")[0]
    if own == "":
        assert not list(imports(file)), "the package itself imports nothing"
        return
    assert own in LEVEL, f"a new room: give {own} its floor in FLOORS"
    for name, _ in imports(file):
        root, _, rest = name.partition(".")
        if root == "pipeline":
            other = rest.partition(".")[0]
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} must not import {other}"
        assert root not in OURS - {"moe", "pipeline", "tune_spaces"}
        assert root != "tune_spaces" or own == "tune"


@pytest.mark.parametrize("file", PIPELINE)
def test_nothing_imports_a_command(file: Path) -> None:
    for name, _ in imports(file):
        assert not name.endswith("__main__")
        assert name not in {f"pipeline.{command}" for command in COMMANDS}


def test_module_names_are_unique() -> None:
    """One word, one meaning; a search space alone is named as the algorithm that it searches."""
    names = [file.stem for file in (*modules("pipeline"), *modules("moe"))]
    assert not {name for name in names if names.count(name) > 1} - SAME_NAME


def test_public_class_names_are_unique() -> None:
    names = [
        node.name
        for file in (*modules("pipeline"), *modules("moe"), *modules("tune_spaces"))
        for node in ast.parse(file.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert not {name for name in names if names.count(name) > 1}


def test_few_modules_lie_flat_in_pipeline() -> None:
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 20


@pytest.mark.parametrize("file", PIPELINE)
@pytest.mark.parametrize("package", ONLY)
def test_package_stays_in_its_rooms(file: Path, package: str) -> None:
    used = package in {name.partition(".")[0] for name, _ in imports(file)}
    own = room(file)
    assert not used or own in ONLY[package] or own.partition(".")[0] in ONLY[package]


@pytest.mark.parametrize("file", PIPELINE)
def test_mlflow_and_optional_packages_are_imported_where_they_are_used(file: Path) -> None:
    at_once = {name.partition(".")[0] for name, at_once in imports(file) if at_once}
    assert not at_once & {"mlflow", "matplotlib", "safetensors", "sklearn"}


ONE_PLACE = {
    r"[\"']sqlite:///[\"'{]|\.as_uri\(\)": ("tracking.database_file", "tracking.client"),
    r"json\.loads?\(.*read": (
        "checkpoint",
        "tracking.image_pyfunc",
        "sweep.trials",
        "grid.cell_process",
    ),
    r"dataset_sha256\W+[!=]=|[!=]= .*dataset_sha256": ("data.identity",),
    r"class_names [!=]=|[!=]= .*class_names": ("data.class_names",),
    r"getexif|exif_transpose\(": ("data.decode",),
    r"ray\.init\(": ("distributed.cluster", "distributed.preflight"),
    r"\bload_file\(|safe_open\(": ("checkpoint", "export.hub_model"),  # of files that we wrote
}
"""What was wrong in many places once is done in one: nobody can forget it in the next."""


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_what_was_wrong_in_many_places_is_done_in_one(pattern: str) -> None:
    found = {
        room(file): line.strip()
        for file in modules("pipeline")
        for line in file.read_text("utf-8").splitlines()
        if re.search(pattern, line)
    }
    assert set(found) <= set(ONE_PLACE[pattern]), found


def test_no_two_modules_import_each_other() -> None:
    """Within a room too."""
    edges: dict[str, set[str]] = {}
    for file in modules("pipeline"):
        edges[dotted(file)] = {name for name, _ in imports(file) if name.startswith("pipeline.")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def dotted(file: Path) -> str:
    return ".".join(part for part in ("pipeline", *room(file).split(".")) if part)


BLOCKED = """
import importlib.abc, importlib.machinery, sys
class Blocked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("blocked: " + spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_loop_runs_with_torch_and_numpy_alone() -> None:
    """Every module below the loop, a model and an attack, without any other package."""
    code = BLOCKED.format(blocked=HEAVY) + (
        "import moe, moe.export, pipeline.loop, torch\n"
        "from pipeline.config import Config\n"
        "from pipeline.measures.runner import judge, suite, summarize\n"
        "from pipeline.data.synthetic import Synthetic\n"
        "config = Config(dataset=Synthetic(size=8, test_images=2))\n"
        "images = config.dataset.load(0).test\n"
        "measures = suite(config.evaluation, dense=False)\n"
        "model = config.backbone.build(10, 8)\n"
        "judge(model, images, {'ra': measures['ra_pgd50']}, seed=0, device=torch.device('cpu'))\n"
    )
    finished = run(code)
    assert finished.returncode == 0, finished.stderr


def test_importing_does_nothing_but_import(tmp_path: Path) -> None:
    """No folder, no environment read, no seed, no output: workers import at any time."""
    code = (
        "import os, sys, torch\n"
        "state, variables = torch.get_rng_state(), dict(os.environ)\n"
        "import moe.export, pipeline.loop, pipeline.presets, pipeline.tracking\n"
        "assert torch.equal(torch.get_rng_state(), state)\n"
        "assert dict(os.environ) == variables\n"
        "assert not {'ray', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
