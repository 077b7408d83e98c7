"""The order of the house: imports go down only, and private names stay in one room."""

from __future__ import annotations

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

import perjac

HOUSE = pathlib.Path(perjac.__file__).parent
ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(HOUSE.rglob("*.py"))

# docs/architecture: from the roof to the ground. A room is a package or a module at the top, or a
# package of `_core`. Each imports from its own floor's room and from those below.
FLOORS = [
    {"cli"},
    {"callbacks"},
    {"saliency", "data"},
    {"engine"},
    {"_core.runtime"},
    {"fisher", "_core.planning"},
    {"jacobian", "gradients"},
    {"_rows"},
    {"_core.autodiff"},
    {"_core.rules"},
    {"_core.graph"},
    {"_core.factors"},
    {"_core.model"},
    {"_core.backend"},
    {"progress", "pjrt", "_drawing"},
    {"errors"},
    {"_version"},
]
FLOOR = {room: n for n, floor in enumerate(FLOORS) for room in floor}
PRIVATE = ("tensorflow.python", "tensorflow.compiler", "keras.src")
LINES = 700  # a file is one idea, and may be as long as that needs
HEAVY = ("matplotlib", "zarr", "ray", "rich", "typer", "PIL", "jinja2", "sklearn", "skimage")


def name_of(path: pathlib.Path) -> str:
    """Return a module's name below perjac; nothing for perjac itself."""
    return (
        ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix("__init__").strip(".")
    )


def room_of(module: str) -> str:
    """Return the room that a module belongs to."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "_core" and rest else first


def imported(path: pathlib.Path, *, lazily: bool) -> set[str]:
    """Return the full names that a file imports: at any depth, or only when it is loaded."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else tree.body
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor they lead to"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def doors() -> dict[str, set[str]]:
    """Return for each module the modules of perjac that it imports, at once or later."""
    known = {name_of(path) for path in MODULES}

    def module(name: str) -> str:
        inner = name.removeprefix("perjac.")
        return inner if inner in known else inner.rpartition(".")[0]

    found = {}
    for path in MODULES:
        names = imported(path, lazily=True)
        found[name_of(path)] = {module(n) for n in names if n.startswith("perjac.")} - {""}
    return found


each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: name_of(p) or "perjac")


@each_module
def test_every_module_belongs_to_a_room(path):
    name = name_of(path)
    assert name in ("", "_core") or room_of(name) in FLOOR


@each_module
def test_imports_go_down_only(path):
    name = name_of(path)
    if name in ("", "_core"):  # perjac itself names what is public, when it is asked for
        return
    own = room_of(name)
    up = {
        other
        for other in doors()[name]
        if room_of(other) != own and FLOOR[room_of(other)] <= FLOOR[own]
    }
    assert not up, f"{name} reaches up to {', '.join(sorted(up))}"


def test_imports_do_not_go_in_circles():
    """Packages aside: their `__init__` gathers what their modules give."""
    packages = {name_of(path) for path in MODULES if path.name == "__init__.py"}
    open_doors = {name: known - packages for name, known in doors().items() if name not in packages}
    done: set[str] = set()
    while free := {n for n, known in open_doors.items() if n not in done and known <= done}:
        done |= free
    assert done == open_doors.keys(), sorted(open_doors.keys() - done)


@each_module
def test_private_names_of_tensorflow_and_keras_stay_in_the_backend(path):
    if room_of(name_of(path)) == "_core.backend":
        return
    assert not {name for name in imported(path, lazily=True) if name.startswith(PRIVATE)}
    text = path.read_text()
    assert not [name for name in PRIVATE if f"{name}." in text]


@each_module
def test_modules_say_what_they_are_and_stay_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= LINES


def test_there_is_no_utils():
    assert not [p for p in MODULES if p.stem.strip("_") in ("utils", "util", "helpers", "misc")]


def test_the_command_line_does_not_wait_for_tensorflow():
    slow = ("tensorflow", "keras", "numpy", "matplotlib", "sklearn")
    for name in ("__init__", "errors", "cli/__init__", "cli/main", "cli/screen"):
        path = HOUSE / f"{name}.py"
        heavy = {n for n in imported(path, lazily=False) if n.split(".")[0] in slow}
        assert not heavy, f"{name} loads {heavy} at once"


def test_nothing_below_the_engine_knows_screens_plots_or_stores():
    lower = [p for p in MODULES if FLOOR.get(room_of(name_of(p)), 0) > FLOOR["engine"]]
    for path in lower:
        allowed = ("matplotlib",) if path.stem in ("_drawing", "figures") else ()
        allowed += ("zarr",) if path.stem == "_tiles" else ()
        known = {n.split(".")[0] for n in imported(path, lazily=True)}
        assert not known & set(HEAVY) - set(allowed), path


def test_the_engine_loads_nothing_heavy_that_tensorflow_and_keras_do_not_load():
    code = (
        "import sys, tensorflow, keras\nbefore = set(sys.modules)\nimport perjac.engine\n"
        f"print(sorted(set({HEAVY!r}) & (sys.modules.keys() - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def shown() -> list[pathlib.Path]:
    """Return what strangers read and copy from."""
    return [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.py")]


@pytest.mark.parametrize("path", shown(), ids=lambda p: p.name)
def test_what_strangers_copy_imports_public_names_only(path):
    for line in re.findall(r"^\s*(?:>>> )?((?:from|import) perjac\b.*)$", path.read_text(), re.M):
        assert not re.search(r"[ .]_(?!_)", line), line


def test_the_picture_of_the_house_is_drawn_from_it():
    script = ROOT / "docs" / "scripts" / "architecture.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0
