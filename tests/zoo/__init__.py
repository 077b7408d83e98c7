"""The zoo: many models, and a test that perjac's Jacobians agree with the oracle on all of them.

An entry is a model at a float type and two examples for it. Nothing but the test knows perjac.
"""

import importlib
import pathlib


def everything() -> None:
    """Import every module of the zoo, so that each enters its models into `entry.ENTRIES`."""
    for module in pathlib.Path(__path__[0]).glob("[!_]*.py"):
        importlib.import_module(f"zoo.{module.stem}")
