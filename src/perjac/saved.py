"""A SavedModel's signature → a function of a batch, with its variables and the inputs it declares.

A folder on disk is all there is: no code, no Keras. Knows TensorFlow's format; must not know
engines.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from perjac.errors import FileFormatError, InputError, UnknownNameError, nearest


class SavedFunction:
    """One signature of a SavedModel.

    Parameters
    ----------
    path : Path
        The folder.
    signature : str, optional
        Which; may be left out where there is only one, or one called "serving_default".

    Attributes
    ----------
    name : str
        The signature's.
    inputs : list of tf.TensorSpec
        What it takes, by name.
    variables, trainable_variables : list of tf.Variable
        What it reads.

    Raises
    ------
    FileFormatError
        If the folder holds no SavedModel, or one that cannot be read.
    UnknownNameError
        If it has no such signature.
    InputError
        If the signature takes text, or fixes the batch.
    """

    def __init__(self, path: pathlib.Path, signature: str | None = None):
        self._loaded = _load(path)  # owns the variables
        self.name = _chosen(dict(self._loaded.signatures), signature, path)
        self._function = self._loaded.signatures[self.name]
        named: Mapping[str, Any] = self._function.structured_input_signature[1]
        self.inputs = [tf.TensorSpec(t.shape, t.dtype, name) for name, t in sorted(named.items())]
        for spec in self.inputs:
            _check(spec, self.name)
        self.variables = list(self._function.variables)
        floats = [v for v in self.variables if v.dtype.is_floating]
        self.trainable_variables = [v for v in floats if v.trainable] or floats

    def __call__(self, inputs: Any) -> Any:
        """Run the signature on a batch: one array, or one for each input, in order or by name."""
        names = [spec.name for spec in self.inputs]
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(names, tf.nest.flatten(inputs), strict=True))
        if set(inputs) != set(names):
            raise InputError(
                f"Signature {self.name!r} takes the inputs {', '.join(map(repr, names))}. "
                f"Received: {', '.join(map(repr, inputs))}."
            )
        return self._function(**inputs)


def _load(path: pathlib.Path) -> Any:
    if not any((path / f"saved_model.{kind}").exists() for kind in ("pb", "pbtxt")):
        raise FileFormatError(
            f"{path} is a folder without a saved_model.pb. Expected a SavedModel, or a .keras or "
            ".h5 file."
        )
    try:
        return tf.saved_model.load(str(path))
    except Exception as failure:  # TensorFlow raises whatever its readers stumble over
        text = str(failure).strip().splitlines()
        raise FileFormatError(
            f"Cannot read the SavedModel {path}: {text[0] if text else type(failure).__name__}"
        ) from failure


def _chosen(signatures: Mapping[str, Any], asked: str | None, path: pathlib.Path) -> str:
    names = sorted(signatures)
    if not names:
        raise FileFormatError(
            f"The SavedModel {path} has no signatures. Load it with tf.saved_model.load and give "
            "Engine one of its functions, with variables=[...]."
        )
    if asked is not None:
        if asked not in signatures:
            raise UnknownNameError(
                f"The SavedModel {path} has no signature {asked!r}. " + nearest(asked, names)
            )
        return asked
    if "serving_default" in signatures or len(names) == 1:
        return "serving_default" if "serving_default" in signatures else names[0]
    raise InputError(
        f"The SavedModel {path} has {len(names)} signatures: {', '.join(map(repr, names))}. "
        f"Choose one, for example signature={names[0]!r}."
    )


def _check(spec: tf.TensorSpec, signature: str) -> None:
    if spec.dtype == tf.string:
        raise InputError(
            f"Signature {signature!r} takes text ({spec.name!r}). perjac takes numbers: choose a "
            "signature behind the text's preparation."
        )
    if spec.shape.rank == 0 or (spec.shape.rank and spec.shape[0] is not None):
        raise InputError(
            f"Signature {signature!r} takes {spec.name!r} of shape {spec.shape}, whose first axis "
            "is fixed. perjac traces with the number of examples unknown: save the model with "
            "None there."
        )
