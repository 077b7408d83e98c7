"""The order of the house: imports go down only, private names of the host stay in one room."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

import perjac

HOUSE = pathlib.Path(perjac.__file__).parent
ROOMS = sorted(HOUSE.rglob("*.py"))

# docs/architecture: "imports go down only", from the roof to the ground. Rooms that it does not
# name have their place by what they import and who imports them.
FLOORS = [
    {"cli"},
    {"commands"},
    {"demo"},
    {"report"},
    {"saliency", "dataset", "data", "callbacks", "keep"},
    {"engine"},
    {"fisher"},
    {"examined", "tuning"},
    {"jobs"},
    {"chunks"},
    {"plan", "schedules"},
    {"device", "routing"},
    {"costs", "route"},
    {"sweep", "folded", "tape", "jacobian", "gradients"},
    {"rules"},
    {"factors", "sites", "pullback"},
    {"trace"},
    {"host", "errors", "compiling", "cache", "padding"},
]
PRIVATE = ("tensorflow.python", "tensorflow.compiler", "keras.src")
LINES = 600  # a file is one idea, and may be as long as that needs


def room_of(path: pathlib.Path) -> str:
    """Return the module or package at the top of the house that a file belongs to."""
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


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
def plan_of_the_house() -> dict[str, set[str]]:
    """Return for each room the rooms it imports, at once or later."""
    doors: dict[str, set[str]] = {}
    for path in ROOMS:
        names = {n for n in imported(path, lazily=True) if n.startswith("perjac.")}
        doors.setdefault(room_of(path), set()).update(n.split(".")[1] for n in names)
    return {room: known - {room, "_version"} for room, known in doors.items() if room != "__init__"}


def below(room: str, doors: dict[str, set[str]]) -> set[str]:
    """Return every room that can be reached from `room` through imports."""
    reached, to_visit = set(), [room]
    while to_visit:
        new = doors.get(to_visit.pop(), set()) - reached
        reached |= new
        to_visit += new
    return reached


each_room = pytest.mark.parametrize("path", ROOMS, ids=lambda p: str(p.relative_to(HOUSE)))


@pytest.mark.parametrize("level", range(1, len(FLOORS)), ids=lambda n: "-".join(sorted(FLOORS[n])))
def test_imports_go_down_only(level):
    doors = plan_of_the_house()
    above = set().union(*FLOORS[:level])
    for room in FLOORS[level] & doors.keys():
        up = below(room, doors) & above
        assert not up, f"{room} reaches up to {', '.join(sorted(up))}"


def test_imports_do_not_go_in_circles():
    doors = plan_of_the_house()
    circling = {room for room in doors if room in below(room, doors)}
    assert not circling


@each_room
def test_private_names_of_tensorflow_and_keras_stay_in_host(path):
    private = {name for name in imported(path, lazily=True) if name.startswith(PRIVATE)}
    if room_of(path) == "host":
        return
    assert not private
    text = path.read_text()
    mentioned = [name for name in PRIVATE if f"{name}." in text]
    assert not mentioned


@each_room
def test_rooms_say_what_they_are_and_stay_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= LINES


def test_there_is_no_utils():
    assert not [p for p in ROOMS if p.stem.strip("_") in ("utils", "util", "helpers", "misc")]


def test_the_command_line_does_not_wait_for_tensorflow():
    slow = ("tensorflow", "keras", "matplotlib", "sklearn")
    for room in ("cli", "__init__", "errors"):
        for path in (p for p in ROOMS if room_of(p) == room):
            heavy = {n for n in imported(path, lazily=False) if n.split(".")[0] in slow}
            assert not heavy, f"{path.name} loads {heavy} at once"


def test_nothing_below_the_engine_knows_screens_or_losses():
    above = ("keras.losses", "zarr", "rich", "typer", "matplotlib", "PIL", "jinja2")
    lower = set().union(*FLOORS[FLOORS.index({"engine"}) + 1 :])
    for path in (p for p in ROOMS if room_of(p) in lower):
        known = {n for n in imported(path, lazily=True) if n.startswith(above)}
        assert not known, f"{path.name} knows {known}"
