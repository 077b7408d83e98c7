"""Exported programs run without TensorFlow, by JAX's PJRT client: on a CPU, a GPU or a TPU.

Knows the files that `Engine.export` writes; must not know models, and must not import TensorFlow.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from perjac.errors import FileFormatError, InputError, missing_extra, nearest

_FORMAT = "perjac program 1"


def load(path: str | pathlib.Path, device: Any = None) -> Program:
    """Compile an exported program for a device of this machine.

    Parameters
    ----------
    path : str or path
        What `Engine.export` wrote, its manifest and variables beside it.
    device : jax.Device, optional
        Where to run; JAX's first one by default, a GPU where there is one.

    Returns
    -------
    Program
        Call it with arrays of the inputs.

    Raises
    ------
    FileFormatError
        If the files are not there, or not what `Engine.export` writes.
    MissingExtraError
        If JAX is not installed: `pip install "perjac[pjrt]"`.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj, tempfile, pathlib
    >>> from perjac import pjrt
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> x = np.ones((8, 4), "float32")
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "jacobian.stablehlo"
    >>> rows = pjrt.load(pj.Engine(model).export(path, x))(x)
    >>> rows["top/kernel"].shape
    (8, 3, 4, 3)
    """
    path = pathlib.Path(path)
    files = [path, path.with_suffix(".json"), path.with_suffix(".npz")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileFormatError(f"There is no {', no '.join(missing)}.")
    try:
        manifest = json.loads(files[1].read_text())
    except ValueError as failure:
        raise FileFormatError(f"{files[1]} is no manifest: {failure}") from failure
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise FileFormatError(f"{files[1]} is no manifest of format {_FORMAT!r}.")
    with np.load(files[2], allow_pickle=False) as values:
        variables = {each["name"]: values[each["name"]] for each in manifest["variables"]}
    return Program(path.read_bytes(), manifest, variables, device)


class Program:
    """A compiled program, with the variables' values on its device.

    Parameters
    ----------
    code : bytes
        StableHLO.
    manifest : dict
        What its arguments and results are.
    variables : mapping of str to array
        The values of those that follow the inputs.
    device : jax.Device, optional
        Where to run.

    Attributes
    ----------
    manifest : dict
        As given: "job", "inputs", "variables" and "outputs", each with name, shape and dtype.
    """

    def __init__(
        self,
        code: bytes,
        manifest: Mapping[str, Any],
        variables: Mapping[str, np.ndarray],
        device: Any = None,
    ):
        try:
            import jax
        except ImportError as cause:
            raise missing_extra("perjac.pjrt", "pjrt", cause) from cause
        self._jax = jax
        self.device = device or jax.devices()[0]
        self.manifest = dict(manifest)
        self._executable = _compiled(code, self.device)
        self._variables = {n: self._put(v) for n, v in variables.items()}

    def __call__(self, *inputs: Any, variables: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the program's results for a batch, by name, as JAX arrays on the device.

        Parameters
        ----------
        *inputs : array
            Of the shapes that the program was exported for, in the manifest's order.
        variables : mapping of str to array, optional
            In place of some of the values exported.

        Raises
        ------
        InputError
            If shapes or names do not fit.
        """
        given = self._checked(self.manifest["inputs"], inputs)
        held = dict(self._variables)
        specs = {each["name"]: each for each in self.manifest["variables"]}
        for name, value in (variables or {}).items():
            if name not in specs:
                raise InputError(f"There is no variable {name!r}. {nearest(name, specs)}")
            (held[name],) = self._checked([specs[name]], [value])
        arguments = [*given, *(held[name] for name in specs)]
        shards = self._executable.execute_sharded(arguments)
        results = [each[0] for each in shards.disassemble_into_single_device_arrays()]
        names = [each["name"] for each in self.manifest["outputs"]]
        return dict(zip(names, results, strict=True))

    @property
    def memory(self) -> int:
        """Bytes that a call takes, by the compiler's count: arguments, results and temporaries."""
        counted = self._executable.get_compiled_memory_stats()
        return (
            counted.argument_size_in_bytes
            + counted.output_size_in_bytes
            + counted.temp_size_in_bytes
        )

    def _checked(self, specs: list[dict[str, Any]], arrays: Any) -> list[Any]:
        if len(arrays) != len(specs):
            raise InputError(f"Expected {len(specs)} inputs. Received: {len(arrays)}.")
        for spec, array in zip(specs, arrays, strict=True):
            if list(np.shape(array)) != spec["shape"]:
                raise InputError(
                    f"Expected {spec['name']!r} of shape {tuple(spec['shape'])}, which the program "
                    f"was exported for. Received: {np.shape(array)}."
                )
        return [self._put(array, spec["dtype"]) for spec, array in zip(specs, arrays, strict=True)]

    def _put(self, array: Any, dtype: str | None = None) -> Any:
        if isinstance(array, self._jax.Array) and dtype in (None, array.dtype.name):
            return self._jax.device_put(array, self.device)
        wide = np.asarray(array, dtype and self._jax.numpy.dtype(dtype))
        with self._jax.enable_x64(True):  # float64 stays what it is
            return self._jax.device_put(wide, self.device)


def _compiled(code: bytes, device: Any) -> Any:
    """Return what executes a program on a device.

    JAX has no public way to run StableHLO that it did not write. `Client.compile_and_load` (jaxlib
    0.7 on) takes it; earlier ones called it `compile`.
    """
    from jaxlib import xla_client

    client, options = device.client, xla_client.CompileOptions()
    if hasattr(client, "compile_and_load"):
        where = xla_client.DeviceList((device,))
        return client.compile_and_load(code, where, options)
    return client.compile(code, options)
