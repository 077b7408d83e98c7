"""Elastic weight consolidation: old tasks hold the weights where they matter to them."""

from __future__ import annotations

import base64
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from perjac._core.backend import host
from perjac.errors import InputError
from perjac.fisher._values import form_of, keyed, variables
from perjac.fisher.form import Form
from perjac.fisher.information import Fisher


@keras.saving.register_keras_serializable("perjac")
class ElasticWeights(keras.regularizers.Regularizer):
    """A Keras regulariser, ½ strength · Σ_i F_i (θ_i - θ*_i)², of one weight.

    Parameters
    ----------
    anchor : array
        θ*, of the weight's shape.
    importance : array
        F, the diagonal of the Fisher information, of the same shape.
    strength : float
        What the sum is multiplied by.
    also : Regularizer, optional
        One that is added to it: the weight's own, or that of an earlier task.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> held = pj.fisher.ElasticWeights(np.zeros((4, 3)), np.ones((4, 3)), strength=2.0)
    >>> layer = keras.layers.Dense(3, kernel_regularizer=held)
    >>> float(held(np.ones((4, 3), "float32")))
    12.0

    References
    ----------
    Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks, eq. 3.
    """

    def __init__(self, anchor: Any, importance: Any, strength: float = 1.0, also: Any = None):
        self.anchor, self.importance = np.asarray(anchor), np.asarray(importance)
        self.strength = float(strength)
        self.also: Any = keras.regularizers.get(also)
        if self.anchor.shape != self.importance.shape:
            raise InputError(
                f"Expected importance= of the anchor's shape {self.anchor.shape}. Received: "
                f"{self.importance.shape}."
            )
        if not self.strength >= 0:
            raise InputError(f"Expected strength= of 0 or more. Received: {strength!r}.")

    def __call__(self, x: Any) -> Any:
        """Return the penalty of a weight's value."""
        ops: Any = keras.ops
        x = ops.convert_to_tensor(x)
        if tuple(x.shape) != self.anchor.shape:
            raise InputError(
                f"Expected a weight of shape {self.anchor.shape}. Received: {tuple(x.shape)}."
            )
        held = ops.cast(self.importance, x.dtype) * ops.square(x - ops.cast(self.anchor, x.dtype))
        total = 0.5 * self.strength * ops.sum(held)
        return total if self.also is None else total + self.also(x)

    def get_config(self) -> dict[str, Any]:
        """Return what it is made of, as JSON takes it: arrays as their bytes, in base64."""
        return {
            "anchor": _packed(self.anchor),
            "importance": _packed(self.importance),
            "strength": self.strength,
            "also": self.also and keras.regularizers.serialize(self.also),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the regulariser that `get_config` told of."""
        also = config.get("also")
        return cls(
            _unpacked(config["anchor"]),
            _unpacked(config["importance"]),
            config["strength"],
            also and keras.regularizers.deserialize(also),
        )


class ElasticWeightConsolidation:
    """A penalty, ½ strength · Σ_i F_i (θ_i - θ*_i)², that keeps a model near what it has learnt.

    Made after training on one task, with the model's weights as they are then; used while training
    on the next. θ* are the weights at that time, F the diagonal of the Fisher information on the
    old task's data.

    Parameters
    ----------
    engine : Engine
        Of the model.
    information : Fisher or Form
        On the old task's examples. Of forms that are not diagonal, the diagonal is taken.
    strength : float
        λ. With information of reduction "sum" and a loss that is a sum over the new examples, 1
        is what Bayes' rule asks for; with means of both, N_old / N_new.

    Attributes
    ----------
    anchors, importances : dict of str to array
        θ* and F, by key.

    Examples
    --------
    >>> import keras, numpy as np, perjac as pj
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="top")])
    >>> engine, old = pj.Engine(model), np.eye(4, dtype="float32")
    >>> held = pj.fisher.ElasticWeightConsolidation(engine, engine.fisher(old), strength=100.0)
    >>> float(held())  # in a training loop of your own: loss + held()
    0.0
    >>> held.attach()  # for fit(): compile the model afterwards, or once more
    >>> len(model.losses)
    2

    References
    ----------
    Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks; Huszár 2018, on
    several tasks, whose penalties add up: make one after each.
    """

    def __init__(self, engine: Any, information: Fisher | Form, strength: float = 1.0):
        form = form_of(information)
        columns, weights = form.columns, engine._traces.weights
        self._variables = variables(engine, columns)
        self._model = engine.model
        own = dict(zip(weights.keys, weights.variables, strict=True))
        self._owners = {key: own[key] for key in columns.keys}
        self.strength = strength
        self.anchors = {key: v.numpy().copy() for key, v in self._variables.items()}
        diagonal = columns.by_key(form.diagonal())
        self.importances = {k: d.astype(self.anchors[k].dtype) for k, d in diagonal.items()}
        self._regularizers = keyed(
            {
                key: ElasticWeights(anchor, self.importances[key], strength)
                for key, anchor in self.anchors.items()
            }
        )
        self._before: dict[str, Any] = {}

    def __call__(self) -> tf.Tensor:
        """Return the penalty of the model's present weights, a scalar to differentiate."""
        parts = [self._regularizers[k](tf.convert_to_tensor(v)) for k, v in self._variables.items()]
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.size)
        return tf.add_n([tf.cast(part, widest) for part in parts])

    def regularizers(self) -> dict[str, ElasticWeights]:
        """Return a Keras regulariser for each weight, by key.

        For layers made with `kernel_regularizer=`; `attach` gives them to the layers there are.
        """
        return self._regularizers

    def attach(self) -> None:
        """Give every weight its regulariser, beside the one that it has.

        `model.losses` and `fit` count it from then on, once the model is compiled (again), and a
        layer that has an argument for it (`kernel_regularizer`, …) saves it with the model; to
        load that file, import `perjac.fisher` first.

        Raises
        ------
        InputError
            If a weight is no Keras layer's, or this is attached already.
        """
        if self._before:
            raise InputError("This penalty is attached already: detach() it first.")
        strange = [k for k, v in self._owners.items() if not isinstance(v, keras.Variable)]
        if strange:
            raise InputError(
                f"{strange[0]!r} is a plain TensorFlow variable, and only Keras's have "
                "regularisers: add the penalty to the loss instead, by calling it."
            )
        for key, variable in self._owners.items():
            mine, before = self._regularizers[key], variable.regularizer
            self._before[key] = before
            self._set(variable, ElasticWeights(mine.anchor, mine.importance, self.strength, before))

    def detach(self) -> None:
        """Give every weight back the regulariser that it had before `attach`."""
        for key, before in self._before.items():
            self._set(self._owners[key], before)
        self._before = {}

    def _set(self, variable: Any, regularizer: Any) -> None:
        """Make it the variable's regulariser, and the layer's that owns it, where that saves it."""
        variable.regularizer = regularizer
        for layer in host.operations_within(self._model):
            if not host.is_layer(layer):
                continue
            for option in [name for name in vars(layer) if name.endswith("_regularizer")]:
                name = option.removesuffix("_regularizer")  # "recurrent" is of recurrent_kernel
                held = [getattr(layer, n, None) for n in (name, f"{name}_kernel")]
                if any(weight is variable for weight in held):
                    setattr(layer, option, regularizer)


def _packed(array: np.ndarray) -> dict[str, Any]:
    plain = np.ascontiguousarray(array)
    return {
        "shape": list(array.shape),
        "dtype": plain.dtype.name,
        "bytes": base64.b64encode(plain.tobytes()).decode("ascii"),
    }


def _unpacked(packed: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(packed["bytes"]), packed["dtype"])
    return flat.reshape(packed["shape"])
