"""The question perjac was made for, asked of the seed model, each answer beside plain tape.

The plain code is what one would write with TensorFlow alone, so it may be pasted and tried.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from subjects import subject

import perjac as pj

BATCH = 3


@pytest.fixture(scope="module")
def model():
    return subject("seed", "float32").target  # Dense 12, Dense 8, Dense 1


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((BATCH, 8)).astype("float32")


@pytest.fixture(scope="module")
def engine(model):
    return pj.Engine(model)


def close(found, right):
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6)


def test_gradients_of_the_output_with_respect_to_every_weight_of_each_layer(model, x, engine):
    jac = engine.jacobian(x)
    for layer in model.layers:
        for weight in layer.trainable_weights:
            for b in range(BATCH):
                with tf.GradientTape() as tape:
                    output = model(x[b : b + 1])
                close(jac[weight][b, 0], tape.gradient(output, weight))


def test_each_layer_by_itself(model, x, engine):
    every = engine.jacobian(x)
    for layer in model.layers:
        jac = engine.jacobian(x, wrt=layer)
        assert list(jac) == [weight.path for weight in layer.trainable_weights]
        for weight in layer.trainable_weights:
            close(jac[weight], every[weight])


def test_the_first_trainable_weight(model, x, engine):
    weight = model.trainable_weights[0]
    jac = engine.jacobian(x, wrt=weight)
    assert jac[weight].shape == (BATCH, 1, 8, 12)
    with tf.GradientTape() as tape:
        output = model(x)
    right = tape.jacobian(output, weight)  # of a whole batch: an example's rows are its own
    close(jac[weight], right)


def test_the_summed_gradient_is_that_of_the_batch(model, x, engine):
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(x))
    right = tape.gradient(total, model.trainable_weights)
    summed = engine.jacobian(x).vjp(np.ones((BATCH, 1), "float32"))
    for found, one in zip(summed.values(), right, strict=True):
        close(found, one)


def test_gradients_of_a_hidden_layers_output(model, x, engine):
    hidden = model.layers[1]
    weights = [*model.layers[0].trainable_weights, *hidden.trainable_weights]
    jac = engine.jacobian(x, of=hidden.name, wrt=weights)
    assert jac.row_shape == (8,)
    for b in range(BATCH):
        for k in range(8):
            with tf.GradientTape() as tape:
                one = hidden(model.layers[0](x[b : b + 1]))[0, k]
            for weight, right in zip(weights, tape.gradient(one, weights), strict=True):
                close(jac[weight][b, k], right)


def test_gradient_of_the_output_with_respect_to_a_hidden_layers_output(model, x, engine):
    first, second, last = model.layers
    jac = engine.jacobian(x, wrt=pj.activation(first.name))
    hidden = first(x)
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        output = last(second(hidden))
    close(jac[first.name], tape.batch_jacobian(output, hidden))


def test_flattened_output_with_respect_to_the_input_as_a_saliency_map(model, x, engine):
    saliency = engine.jacobian(x, wrt="inputs")["inputs"]
    assert saliency.shape == (BATCH, 1, 8)
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = tf.reshape(model(inputs), (BATCH, -1))
    close(saliency, tape.batch_jacobian(output, inputs))
