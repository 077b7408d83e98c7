"""The peers' environments, under .bench/ at the project's root: made once, and found again.

    python benchmarks/environments.py            makes all of them
    python benchmarks/environments.py torch      makes this one

Versions are pinned, so that figures can be compared from month to month. The libraries for torch
share one environment: torch alone takes 5 GB, and they differ in nothing that they need.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent.parent / ".bench"


class NoEnvironment(Exception):
    """An environment that is not there, with the reason."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """Packages, in a Python of their own or beside the project's.

    Attributes
    ----------
    packages : tuple of str
        With their versions.
    beside : bool
        Whether they are put beside the project's own packages, without what they depend on: for
        libraries that run on TensorFlow, which the project has.
    """

    packages: tuple[str, ...]
    beside: bool = False


ENVIRONMENTS = {
    "torch": Environment(
        (
            "torch==2.14.1",
            "backpack-for-pytorch==1.7.1",
            "captum==0.9.0",
            "curvlinops-for-pytorch==3.0.1",
            "keras==3.15.1",  # models that only Keras can say, on its torch backend
            "nngeometry==0.4",
            "opacus==1.6.0",
        )
    ),
    "xplique": Environment(
        (
            "xplique==2.0.2",
            "opencv-python-headless",
            "deprecated",
            "wrapt",
            "tensorflow-probability==0.25.0",
            "tf-keras==2.21.0",
            "dm-tree",
            "decorator",
            "cloudpickle",
            "einops",
        ),
        beside=True,
    ),
    # The last JAX that has the names which its structured derivatives look for.
    "neural-tangents": Environment(
        (
            "neural-tangents==0.6.5",
            "jax==0.4.25",
            "jaxlib==0.4.25",
            "numpy==1.26.4",
            "scipy==1.12.0",
        )
    ),
    "tf-keras-vis": Environment(("tf-keras-vis==0.8.7", "deprecated", "wrapt"), beside=True),
}


def found(name: str | None, given: dict[str, str] | None = None) -> tuple[list[str], dict]:
    """Return the command that starts an environment's Python, and the variables it needs.

    Parameters
    ----------
    name : str or None
        None for the project's own Python.
    given : dict of str to str, optional
        Pythons to take in place of those under .bench/, by the environment's name.

    Raises
    ------
    NoEnvironment
        If it has not been made, or could not be.
    """
    if name is None:
        return [sys.executable], {}
    if given and name in given:
        if not shutil.which(given[name]):
            raise NoEnvironment(f"there is no Python at {given[name]}")
        return [given[name]], {}
    place = FOLDER / name
    failure = _failure_note(name)
    if failure.exists():
        raise NoEnvironment(failure.read_text().strip())
    if not (place / "made").exists():
        raise NoEnvironment(f"not made: python benchmarks/environments.py {name}")
    if ENVIRONMENTS[name].beside:
        return [sys.executable], {"PYTHONPATH": str(place)}
    return [str(place / "bin" / "python")], {}


def make(name: str) -> None:
    """Make an environment, unless it is there already in these versions.

    Raises
    ------
    NoEnvironment
        If it cannot be made; the reason is kept for whoever looks for it later.
    """
    environment, place = ENVIRONMENTS[name], FOLDER / name
    mark, wanted = place / "made", "\n".join(environment.packages)
    if mark.exists() and mark.read_text() == wanted:
        return
    mark.unlink(missing_ok=True)
    FOLDER.mkdir(exist_ok=True)
    _failure_note(name).unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if environment.beside:
        shutil.rmtree(place, ignore_errors=True)
        _step(name, [*pip, "--no-deps", "--target", str(place), *environment.packages])
    else:
        # What is there already stays: pip adds what is new, and torch is not fetched again.
        _step(name, [sys.executable, "-m", "venv", str(place)])
        own = [str(place / "bin" / "python"), *pip[1:]]
        _step(name, [*own, *environment.packages])
    mark.write_text(wanted)


def _step(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason was given"]
        reason = f"could not be made: {lines[-1][:200]}"
        _failure_note(name).write_text(reason + "\n")
        raise NoEnvironment(reason)


def _failure_note(name: str) -> pathlib.Path:
    return FOLDER / f"{name}.failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENVIRONMENTS)}")
    for name in parser.parse_args().names or ENVIRONMENTS:
        if name not in ENVIRONMENTS:
            parser.error(f"Expected one of {', '.join(ENVIRONMENTS)}. Received: {name!r}.")
        print(f"{name} …", flush=True)
        try:
            make(name)
        except NoEnvironment as failure:
            print(f"{name} is left out: {failure}")


if __name__ == "__main__":
    main()
