"""Ways to put a model together: many inputs and outputs, models in models, functions, modules.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools
import tempfile

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from models import Floats, Ids, variable

from zoo.entry import enter
from zoo.stacks import enter_table, mixed, symbols

VECTOR = Floats((4,))
SEQUENCE = Floats((4, 3))
IDS = Ids((3,), below=5)


def dense(units: int = 3):
    return layers.Dense(units, activation="tanh")


def functional(example, function):
    """Return the model of a function from the inputs, nested as they are, to the outputs."""
    inputs = symbols(example)
    return keras.Model(inputs, function(inputs))


def named(x):
    hidden = dense()(x)
    return {"b": layers.Dense(2)(hidden), "a": layers.Dense(1)(hidden * hidden)}


def nested(x):
    hidden = dense()(x)
    return {"a": [dense(2)(hidden), hidden], "b": {"c": dense(1)(x)}}


def in_a_list(x):
    hidden = dense()(x)
    return [layers.Dense(2)(hidden), hidden, layers.Dense(1)(x)]


def in_a_tuple(x):
    return layers.Dense(2)(dense()(x)), layers.LayerNormalization()(x)


def from_names(inputs):
    read = layers.Flatten()(layers.Embedding(5, 2)(inputs["text"]))
    seen = layers.Flatten()(layers.Conv2D(2, 2)(inputs["image"]))
    return mixed([dense()(inputs["vector"]), read, seen])


def from_nest(inputs):
    first, (second, third) = inputs["x"], inputs["y"]
    return mixed([dense()(first) * dense()(second), layers.Embedding(5, 2)(third)])


def from_list(inputs):
    first, second = inputs
    return mixed(dense()(first) * dense()(second))


IMAGE = Floats((3, 3, 2))
BUILDERS = {
    # name: what goes in, a function of it, the heads
    "outputs by name": (VECTOR, named, ("a", "b")),
    "outputs by number": (VECTOR, in_a_list, (0, 1, 2, -1)),
    "outputs in a tuple": (VECTOR, in_a_tuple, (0, 1)),
    "outputs nested": (VECTOR, nested, (0, 1, 2)),
    "output of rank 3": (SEQUENCE, lambda x: layers.Dense(2)(dense()(x)), (None,)),
    "output a number for each example": (
        VECTOR,
        lambda x: ops.sum(dense()(x), axis=-1),
        (None,),
    ),
    "one output in a list": (VECTOR, lambda x: [layers.Dense(2)(dense()(x))], (None, 0)),
    "the hidden layer is an output": (VECTOR, lambda x: dense()(x), (None,)),
    "inputs by name": (
        {"vector": VECTOR, "text": IDS, "image": IMAGE},
        from_names,
        (None,),
    ),
    "inputs nested": ({"x": VECTOR, "y": (VECTOR, IDS)}, from_nest, (None,)),
    "inputs in a list": ([VECTOR, Floats((2,))], from_list, (None,)),
    "one input in a list": ([VECTOR], lambda inputs: mixed(dense()(inputs[0])), (None,)),
    "an input that is not used": (
        [VECTOR, Floats((2,))],
        lambda inputs: mixed(dense()(inputs[0])),
        (None,),
    ),
}
for name, (example, function, heads) in BUILDERS.items():
    enter("layers", name, functools.partial(functional, example, function), example, heads=heads)


def small_model(width: int = 4, name: str | None = None) -> keras.Model:
    inputs = keras.Input((width,))
    return keras.Model(inputs, layers.Dense(width)(dense()(inputs)), name=name)


class Residual(layers.Layer):
    """A layer that holds layers, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.steps = [dense(4), layers.Dense(4)]
        self.norm = layers.LayerNormalization()

    def build(self, shape):
        for step in [*self.steps, self.norm]:
            step.build(shape)

    def call(self, x):
        y = x
        for step in self.steps:
            y = step(y)
        return self.norm(x + y)


class Trunk(keras.Model):
    """A subclass with a Sequential inside, in which there is a Functional."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([small_model(), Residual(), layers.Dropout(0.3)])
        self.gate, self.head = dense(4), layers.Dense(2)

    def call(self, x, training=False):
        return self.head(self.body(x, training=training) * self.gate(x))


class TwoHeads(keras.Model):
    """A subclass of which Keras does not know what it returns."""

    def __init__(self):
        super().__init__()
        self.hidden, self.mean, self.scale = dense(), layers.Dense(2), layers.Dense(2)

    def call(self, x):
        hidden = self.hidden(x)
        return {"mean": self.mean(hidden), "scale": tf.nn.softplus(self.scale(hidden))}


class Pair(keras.Model):
    """A subclass that takes a dictionary and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.left, self.right = dense(), dense()

    def call(self, inputs):
        left, right = self.left(inputs["left"]), self.right(inputs["right"])
        return left * right, left - right


class Unrolled(keras.Model):
    """Its own call, with a loop, a batch-sized constant and a layer used three times."""

    def __init__(self):
        super().__init__()
        self.step, self.head = dense(4), layers.Dense(2)

    def call(self, x):
        state = tf.zeros((tf.shape(x)[0], 4), x.dtype)
        for _ in range(3):
            state = self.step(state + x)
        return self.head(state)


class TiedAutoencoder(keras.Model):
    """The decoder is the encoder's kernel, transposed."""

    def __init__(self):
        super().__init__()
        self.encoder, self.bias = dense(), None

    def build(self, shape):
        self.encoder.build(shape)
        self.bias = self.add_weight(shape=(shape[-1],), name="bias")

    def call(self, x):
        return tf.matmul(self.encoder(x), self.encoder.kernel, transpose_b=True) + self.bias


def called(make, *shapes):
    """Return a function that builds the subclass by calling it once."""

    def build():
        model = make()
        zeros = [np.zeros((1, *shape)) for shape in shapes]
        model(zeros[0] if len(zeros) == 1 else {"left": zeros[0], "right": zeros[1]})
        return model

    return build


SUBCLASSES = {
    "functional in sequential in subclass": (Trunk, VECTOR, (None,)),
    "subclass with outputs by name": (TwoHeads, VECTOR, ("mean", "scale")),
    "subclass with a loop": (Unrolled, VECTOR, (None,)),
    "tied autoencoder": (TiedAutoencoder, VECTOR, (None,)),
}
for name, (make, example, heads) in SUBCLASSES.items():
    enter("layers", name, called(make, example.shape), example, heads=heads)
enter(
    "layers",
    "subclass from names to a tuple",
    called(Pair, (4,), (2,)),
    {"left": VECTOR, "right": Floats((2,))},
    heads=(0, 1),
)


def shared_twice(x):
    layer = dense(4)
    return layer(layer(x))


def shared_model(left, right):
    model = small_model()
    return model(left) * model(right) + model(left)


def siamese(left, right):
    tower = keras.Sequential([keras.Input((4,)), dense(), layers.Dense(2)])
    return layers.Dot(axes=1, normalize=True)([tower(left), tower(right)])


def a_frozen_layer(x):
    frozen = dense(4)
    frozen.trainable = False
    return dense()(frozen(dense(4)(x)))


def a_frozen_kernel(x):
    layer = dense()
    layer.build((None, 4))
    layer.kernel.trainable = False
    return layer(x)


def same_names(x):
    """Two models with layers of the same names inside."""
    return small_model(name="one")(x) * small_model(name="two")(x)


def stopped(x):
    hidden = dense(4)(x)
    return dense()(hidden) + dense()(ops.stop_gradient(hidden))


def merges(x):
    left, right = dense(4)(x), layers.Dense(4)(x)
    both = [left, right]
    return [
        layers.Add()(both),
        layers.Subtract()(both),
        layers.Multiply()(both),
        layers.Average()(both),
        layers.Maximum()(both),
        layers.Minimum()(both),
        layers.Dot(axes=1)(both),
        layers.Concatenate()(both),
    ]


enter_table(
    {
        VECTOR: {
            "model in a model": lambda x: small_model()(dense(4)(x)),
            "model in a model in a model": lambda x: keras.Sequential(
                [keras.Input((4,)), small_model(), small_model()]
            )(x),
            "layer of layers": lambda x: Residual()(x),
            "layer shared in depth": shared_twice,
            "frozen layer": a_frozen_layer,
            "frozen kernel": a_frozen_kernel,
            "names that repeat": same_names,
            "stopped gradient": stopped,
            "merging layers": merges,
            "keras ops": lambda x: ops.einsum("bi,bj->bij", dense()(x), ops.sin(x)),
        },
        SEQUENCE: {
            "model for each step": lambda x: layers.TimeDistributed(small_model(3))(x),
            "dense of the reshaped": lambda x: layers.Dense(2)(ops.reshape(dense(2)(x), (-1, 8))),
            "batch folded and unfolded": lambda x: ops.reshape(
                dense(2)(ops.reshape(x, (-1, 3))), (-1, 4, 2)
            ),
        },
        (VECTOR, VECTOR): {"shared model": shared_model, "siamese towers": siamese},
        (VECTOR, Floats((4, 3))): {
            "layers of different rank": lambda x, y: dense()(x)[:, None] * dense()(y)
        },
    }
)


def function():
    w, b = variable(4, 3), variable(3)
    return lambda x: tf.tanh(tf.matmul(x, w) + b), [w, b]


def function_of_two():
    w, v = variable(4, 3), variable(2, 3)
    return lambda inputs: tf.tanh(inputs[0] @ w) * (inputs[1] @ v), [w, v]


def function_of_names():
    w, v = variable(4, 3), variable(5, 3)
    return lambda x: tf.tanh(x["a"] @ w) * tf.reduce_sum(tf.gather(v, x["ids"]), 1), [w, v]


def function_of_ids():
    table, w = variable(5, 3), variable(3, 2)
    return lambda ids: tf.tanh(tf.gather(table, ids)) @ w, [table, w]


def function_to_names():
    w, v = variable(4, 3), variable(4, 1)
    return lambda x: {"mean": tf.tanh(x @ w), "scale": tf.exp(x @ v)}, [w, v]


def tf_function():
    w, b = variable(4, 3), variable(3)
    return tf.function(lambda x: tf.tanh(tf.matmul(x, w) + b)), [w, b]


def function_with_a_layer():
    layer, scale = dense(), variable(3)
    layer.build((None, 4))
    return lambda x: layer(x) * scale, [*layer.trainable_variables, scale]


def function_of_keras_variables():
    w = keras.Variable(np.zeros((4, 3)), dtype=keras.config.floatx(), name="w")
    return lambda x: tf.tanh(tf.matmul(x, tf.convert_to_tensor(w))), [w]


class Module(tf.Module):
    """Modules in a module, one of them in a list, and a variable that is not trained."""

    def __init__(self):
        super().__init__()
        self.parts = [Linear(4, 3), Linear(3, 2)]
        self.shift = tf.Variable(tf.zeros(3, keras.config.floatx()), trainable=False)

    def __call__(self, x):
        return self.parts[1](tf.tanh(self.parts[0](x) + self.shift))


class Linear(tf.Module):
    def __init__(self, width: int, units: int):
        super().__init__()
        self.w, self.b = variable(width, units), variable(units)

    @tf.function
    def __call__(self, x):
        return x @ self.w + self.b


def saved() -> keras.Model:
    """Return a model of which a layer comes out of a SavedModel, as a function only."""
    with tempfile.TemporaryDirectory() as folder:
        small_model().export(folder, verbose=False)
        layer = layers.TFSMLayer(folder)
    inputs = keras.Input((4,))
    return keras.Model(inputs, mixed(layer(inputs)))


for name, build, example, heads in (
    ("tfsmlayer", saved, VECTOR, (None,)),
    ("plain function", function, VECTOR, (None,)),
    ("plain function of two", function_of_two, [VECTOR, Floats((2,))], (None,)),
    ("plain function of names", function_of_names, {"a": VECTOR, "ids": IDS}, (None,)),
    ("plain function of ids", function_of_ids, IDS, (None,)),
    ("plain function to names", function_to_names, VECTOR, ("mean", "scale")),
    ("tf.function", tf_function, VECTOR, (None,)),
    ("plain function with a layer", function_with_a_layer, VECTOR, (None,)),
    ("plain function of keras variables", function_of_keras_variables, VECTOR, (None,)),
    ("module", Module, VECTOR, (None,)),
):
    enter("layers", name, build, example, heads=heads)
