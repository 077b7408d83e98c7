"""A SavedModel's signature → a function of a batch, with its variables and the inputs it declares.

A folder on disk is all there is: no code, no Keras. Knows TensorFlow's format; must not know
engines.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from perjac.errors import (
    FileFormatError,
    InputError,
    LostGradientWarning,
    UnknownNameError,
    nearest,
    warn,
)

_GRADIENT = "_gradient_op_type"


class SavedFunction:
    """One signature of a SavedModel, or another function that was traced before.

    Parameters
    ----------
    function : tf.types.experimental.ConcreteFunction
        Takes tensors, by name or in order.
    name : str
        The signature's, for messages.
    owner : object, optional
        What owns the variables, to be kept.
    variables : sequence of variables, optional
        What it reads, where that is known better than from the function.

    Attributes
    ----------
    inputs : list of tf.TensorSpec
        What it takes, by name.
    variables, trainable_variables : list of tf.Variable
        What it reads.

    Raises
    ------
    InputError
        If it takes a single number beside the batch.
    """

    def __init__(
        self,
        function: Any,
        name: str,
        owner: Any = None,
        variables: Sequence[Any] | None = None,
    ):
        self.name, self._function, self._owner = name, function, owner
        positional, named = function.structured_input_signature
        self._by_name = not positional
        ordered = [*tf.nest.flatten(positional), *(named[key] for key in sorted(named))]
        names = [*_named(tf.nest.flatten(positional)), *sorted(named)]
        taken = [(n, t) for n, t in zip(names, ordered, strict=True) if isinstance(t, tf.TypeSpec)]
        self.inputs = [tf.TensorSpec(t.shape, t.dtype, n) for n, t in taken]
        for spec in self.inputs:
            _check(spec, name)
        self.variables = list(function.variables if variables is None else variables)
        floats = [v for v in self.variables if tf.as_dtype(v.dtype).is_floating]
        self.trainable_variables = [v for v in floats if v.trainable] or floats

    @classmethod
    def of_folder(cls, path: pathlib.Path, signature: str | None = None) -> SavedFunction:
        """Return a signature of a folder; its "serving_default" or only one by default.

        Raises
        ------
        FileFormatError
            If the folder holds no SavedModel, or one that cannot be read.
        UnknownNameError
            If it has no such signature.
        InputError
            If the signature has no variables.
        """
        owner = _load(path)
        name = _chosen(dict(owner.signatures), signature, f"The SavedModel {path}")
        found = cls(owner.signatures[name], name, owner)
        if not found.variables:
            raise InputError(
                f"Signature {name!r} of {path} has no variables: its weights are frozen into "
                "constants. Give Engine the function that tf.saved_model.load returns, and ask "
                "wrt='inputs'."
            )
        return found

    @classmethod
    def of_loaded(cls, owner: Any) -> SavedFunction:
        """Return the default signature of what `tf.saved_model.load` returned."""
        name = _chosen(dict(owner.signatures), None, "What was loaded")
        return cls(owner.signatures[name], name, owner)

    def __call__(self, inputs: Any) -> Any:
        """Run the function on a batch: one array, or one for each input, in order or by name."""
        names = [spec.name for spec in self.inputs]
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(names, tf.nest.flatten(inputs), strict=True))
        if set(inputs) != set(names):
            raise InputError(
                f"Signature {self.name!r} takes the inputs {', '.join(map(repr, names))}. "
                f"Received: {', '.join(map(repr, inputs))}."
            )
        if self._by_name:
            return self._function(**inputs)
        positional, named = self._function.structured_input_signature
        flat = iter([inputs[name] for name in names])
        given = [
            next(flat) if isinstance(t, tf.TypeSpec) else t for t in tf.nest.flatten(positional)
        ]
        rest = {key: next(flat) for key in sorted(named) if isinstance(named[key], tf.TypeSpec)}
        return self._function(*tf.nest.pack_sequence_as(positional, given), **rest)


def _named(specs: Sequence[Any]) -> list[str]:
    """Return names for arguments, which may lack one or share it."""
    names = [getattr(spec, "name", None) or f"input_{n}" for n, spec in enumerate(specs)]
    return [name if names.count(name) == 1 else f"{name}_{n}" for n, name in enumerate(names)]


def _load(path: pathlib.Path) -> Any:
    if not any((path / f"saved_model.{kind}").exists() for kind in ("pb", "pbtxt")):
        raise FileFormatError(
            f"{path} is a folder without a saved_model.pb. Expected a SavedModel, or a .keras or "
            ".h5 file."
        )
    try:
        with tempfile.TemporaryDirectory() as copy:
            return tf.saved_model.load(str(_without_lost_gradients(path, pathlib.Path(copy))))
    except Exception as failure:  # TensorFlow raises whatever its readers stumble over
        text = str(failure).strip().splitlines()
        raise FileFormatError(
            f"Cannot read the SavedModel {path}: {text[0] if text else type(failure).__name__}"
        ) from failure


def _without_lost_gradients(path: pathlib.Path, copy: pathlib.Path) -> pathlib.Path:
    """Return a folder whose model refers to no custom gradient that was not saved with it.

    TensorFlow keeps the number that such a gradient had in the process that saved it. Here another
    one may have that number, and would be taken for it without a word.
    """
    file = path / "saved_model.pb"
    if not file.exists():
        return path
    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    lost = 0
    for graph in (meta.graph_def for meta in model.meta_graphs):
        saved = {entry.registered_op_type for entry in graph.library.registered_gradients}
        functions = graph.library.function
        for node in [*graph.node, *(n for f in functions for n in f.node_def)]:
            name = node.attr[_GRADIENT].s.decode() if _GRADIENT in node.attr else ""
            if name.startswith("CustomGradient-") and name not in saved:
                del node.attr[_GRADIENT]
                lost += 1
    if not lost:
        return path
    warn(
        f"The SavedModel {path} was saved without its {lost} custom gradients (of SiLU, say): the "
        "plain gradients of their operations take their place. To keep them, save it with "
        "tf.saved_model.SaveOptions(experimental_custom_gradients=True).",
        LostGradientWarning,
    )
    for part in path.iterdir():
        if part != file:
            (copy / part.name).symlink_to(part.resolve())
    (copy / file.name).write_bytes(model.SerializeToString())
    return copy


def _chosen(signatures: Mapping[str, Any], asked: str | None, what: str) -> str:
    names = sorted(signatures)
    if not names:
        raise FileFormatError(
            f"{what} has no signatures. Load it with tf.saved_model.load and give "
            "Engine one of its functions, with variables=[...]."
        )
    if asked is not None:
        if asked not in signatures:
            raise UnknownNameError(f"{what} has no signature {asked!r}. " + nearest(asked, names))
        return asked
    if "serving_default" in signatures or len(names) == 1:
        return "serving_default" if "serving_default" in signatures else names[0]
    raise InputError(
        f"{what} has {len(names)} signatures: {', '.join(map(repr, names))}. "
        f"Choose one, for example signature={names[0]!r}."
    )


def _check(spec: tf.TensorSpec, signature: str) -> None:
    if spec.shape.rank == 0:
        raise InputError(
            f"Signature {signature!r} takes a single number, {spec.name!r}, beside the batch. Load "
            "the model with tf.saved_model.load, and give Engine a function that fills it in."
        )
