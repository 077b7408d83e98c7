"""The private names of TensorFlow and Keras that perjac takes: each does what it is taken for."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from perjac._core.backend import host
from perjac._core.backend.axis_layout import Relabelling
from perjac._core.factors import Explicit


def scaled(parts, nested):
    factor = nested["factor"]
    return {"twice": [2 * part for part in parts], "same": factor, "sum": factor.vjp(parts[0])}


def arguments():
    factor = Explicit(Relabelling.of((3,)), tf.reshape(tf.range(12.0), [2, 2, 3]))
    return [tf.ones([2, 2]), tf.zeros([4])], {"factor": factor}


def test_compiled_calls_give_what_the_function_gives():
    quick = host.compiled(scaled)
    answers = [quick(*arguments()), quick(*arguments()), scaled(*arguments())]
    assert len(quick._found) == 1
    assert all(entry[1] is not None for entry in quick._found.values()), "the quick way is gone"
    assert type(answers[0]["same"]) is Explicit
    assert list(answers[0]) == list(answers[2])  # the order of a dict's keys, too
    for found in answers[:2]:
        for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(answers[2]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_compiled_calls_tell_shapes_dtypes_and_structures_apart():
    quick = host.compiled(lambda parts: [tf.reduce_sum(p) + p.shape.rank for p in parts])
    for parts in (
        [tf.ones([2])],
        [tf.ones([2, 2])],
        [tf.ones([2], tf.float64)],
        [tf.ones([2])] * 2,
    ):
        assert [float(n) for n in quick(parts)] == [
            float(tf.reduce_sum(p)) + p.shape.rank for p in parts
        ]
    assert len(quick._found) == 4


def test_compiled_calls_tell_what_is_no_tensor_apart():
    def told(nest):
        if isinstance(nest, dict):
            return dict(nest)
        return nest.dense() if isinstance(nest, Explicit) else nest[0] + isinstance(nest, tuple)

    quick, x = host.compiled(told), tf.reshape(tf.range(9.0), [1, 1, 3, 3])
    plain = Relabelling.of((3, 3))
    for nest in (
        Explicit(plain, x), Explicit(plain.transpose((1, 0)), x), [x], (x,), {"a": x}, {"b": x},
    ):  # fmt: skip
        tf.nest.map_structure(np.testing.assert_array_equal, quick(nest), told(nest))
    assert len(quick._found) == 6


def test_compiled_calls_see_what_a_variable_is_now():
    variable = tf.Variable(1.0)
    quick = host.compiled(lambda x: x * variable)
    assert float(quick(tf.constant(2.0))) == 2
    variable.assign(3.0)
    assert float(quick(tf.constant(2.0))) == 6


def test_compiled_calls_can_be_differentiated_and_put_into_a_graph():
    quick, x = host.compiled(lambda x: x**3), tf.constant(2.0)
    quick(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = quick(x)
    assert float(tape.gradient(y, x)) == 12
    assert float(tf.function(lambda x: quick(x) + 1)(x)) == 9


def test_the_compiled_loss_is_what_the_user_gave():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    assert host.compiled_loss(model) is None
    model.compile(loss="mse", loss_weights=[0.5])
    assert host.compiled_loss(model) == ("mse", [0.5])


def test_a_wrapped_loss_brings_labels_to_the_outputs_rank():
    loss = host.wrapped_loss(keras.losses.mean_squared_error)
    values = loss.call(tf.constant([1.0, 2.0]), tf.constant([[0.0], [0.0]]))
    np.testing.assert_array_equal(values, [1, 4])


@pytest.mark.parametrize("name", [*host.ALIKE.values(), *host.FIRST.values()])
def test_gradients_registered_by_name_are_found(name):
    assert callable(host.registered_gradient(name.encode()))


def test_one_operation_can_be_differentiated_by_itself():
    @tf.function
    def twice(x):
        op = tf.nn.relu(x).op
        assert host.gradient_function(tf.stop_gradient(x).op) is None
        return host.gradient_function(op)(op, 2 * tf.ones_like(x))

    np.testing.assert_array_equal(twice(tf.constant([-1.0, 3.0])), [0, 2])


def test_large_graphs_run_without_being_rewritten(monkeypatch):
    monkeypatch.setattr(host, "_MANY_OPERATIONS", 2)
    here = host.context.context()
    usual = here.function_call_options
    with host.as_it_is():
        settings = host.config_pb2.ConfigProto.FromString(
            here.function_call_options.config_proto_serialized
        )
        assert settings.graph_options.rewrite_options.disable_meta_optimizer
    seen = []
    monkeypatch.setattr(host, "_unchanged", lambda options: seen.append(options) or options)
    small, large = (host.compiled(f) for f in (lambda x: x, lambda x: x * x + x / 2))
    np.testing.assert_allclose(large(tf.constant(3.0)), 10.5)
    assert len(seen) == 1
    np.testing.assert_allclose(small(tf.constant(3.0)), 3)
    assert len(seen) == 1
    assert here.function_call_options is usual


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("second", [True, False], ids=["transposed", "plain"])
def test_vectorised_products_are_right_for_one_example(batch, known, second):
    # (N, 1, T, I) @ (1, 1, I, O): oneDNN's kernel is wrong here, and may end the process.
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(8, batch, 7, 5)).astype("float32")
    y = numbers.normal(size=(batch, 3, 5) if second else (batch, 5, 3)).astype("float32")
    length = batch if known else None
    signature = [
        tf.TensorSpec((8, length, *x.shape[2:])),
        tf.TensorSpec((length, *y.shape[1:])),
    ]

    @tf.function(input_signature=signature)
    def products(x, y):
        return tf.vectorized_map(lambda one: tf.matmul(one, y, transpose_b=second), x)

    right = np.matmul(x.astype(float), np.swapaxes(y, -1, -2) if second else y)
    np.testing.assert_allclose(products(x, y), right, rtol=1e-5, atol=1e-5)


def test_a_vectorised_map_has_l2_loss():
    x = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(tf.vectorized_map(tf.nn.l2_loss, x), [2.5, 12.5])


def test_a_traced_function_can_be_left_with_tapes_recording():
    seen = []

    @tf.function
    def traced(x):
        with host.lifted():
            with tf.GradientTape() as tape:
                one = tf.constant(3.0)
                tape.watch(one)
                square = one * one
            seen.append(float(tape.gradient(square, one)))
        return x

    traced(tf.constant(1.0))
    assert seen == [6.0]


@pytest.mark.parametrize("compiled", [True, False])
def test_what_xla_will_compile_is_told(compiled):
    found = []

    @tf.function(jit_compile=compiled)
    def traced(x):
        found.append(host.is_within_xla())
        return x

    traced(tf.constant(1.0))
    assert found == [compiled]


def test_a_users_function_does_not_rewrite_our_python():
    from perjac._core.backend.shapes import known

    written = []

    @tf.function
    def traced(x):
        written.append(known(x.shape))
        return x

    traced(tf.ones([2, 3]))
    assert written == [(2, 3)]
    rule = host.autograph.CONVERSION_RULES[0]
    assert rule.matches("perjac.engine")


def test_layers_compute_in_float64_inside_the_block_alone():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, dtype="mixed_bfloat16"), keras.layers.Dense(2)]
    )
    x = tf.constant(np.random.default_rng(0).standard_normal((4, 3)))
    values = [(v, tf.cast(v.value, tf.float64) + 1 / 3) for v in model.variables]
    policies = [layer.dtype_policy.name for layer in model.layers]
    with host.computing_in_float64(model, values):
        found = model(tf.cast(x, tf.float32))
    a, b, c, d = (value for _, value in values)
    x = tf.cast(tf.cast(x, tf.float32), tf.float64)
    np.testing.assert_allclose(found, (x @ a + b) @ c + d, rtol=1e-14)
    assert [layer.dtype_policy.name for layer in model.layers] == policies
    assert model(x).dtype == tf.float32
    assert host.is_keras_variable(model.variables[0])
    assert not host.is_keras_variable(tf.Variable(1.0))


def test_the_variables_that_a_function_reads_are_keras_variables_where_there_are_such():
    layer, free = keras.layers.Dense(2), tf.Variable(tf.ones([2]))
    layer.build((None, 3))
    function = tf.function(lambda x: layer(x) * free)
    concrete = function.get_concrete_function(tf.TensorSpec([None, 3]))
    for held in ([], [*layer.variables, free]):  # looked for everywhere, and known before
        found = host.variables_read(concrete, held)
        assert {id(v) for v in found} == {id(v) for v in [*layer.variables, free]}


def test_keras_notes_down_the_logits():
    z = tf.constant([[1.0, 2.0]])
    for activation in (keras.activations.softmax, keras.activations.sigmoid):
        assert host.logits_of(activation(z)) is z
        layer = keras.layers.Dense(2, activation)
        assert host.logits_of(layer(z)).shape == (1, 2)
    assert host.logits_of(z) is None


def test_attributes_of_a_layer_are_what_it_computes_or_bookkeeping():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    layer = model.layers[0]
    assert {"activation", "use_bias", "lora_enabled", "_dtype_policy", "_trainable", "_kernel"} <= {
        name for name in vars(layer) if not host.is_bookkeeping(layer, name)
    }
    assert {"_functional", "_layers"} <= {
        name for name in vars(model) if not host.is_bookkeeping(model, name)
    }
    assert host.is_bookkeeping(model, "train_function")
    assert not host.is_bookkeeping(layer, "loss")
    assert host.is_part(layer)
    assert not host.is_part(model.optimizer)


def test_what_has_a_value_and_what_runs_at_once_is_told():
    assert host.is_eager(tf.constant(1.0))
    assert not host.is_eager(np.ones(2))
    assert host.runs_at_once()
    seen = []
    tf.function(lambda x: seen.append((host.runs_at_once(), host.is_eager(x))) or x)(
        tf.constant(1.0)
    )
    assert seen == [(False, False)]
    tf.config.run_functions_eagerly(True)
    try:
        assert not host.runs_at_once()
    finally:
        tf.config.run_functions_eagerly(False)
