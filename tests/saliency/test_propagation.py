"""Rules of the way back: the papers' formulas once more, slowly, and what each rule promises."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import perjac as pj
from perjac.errors import DisconnectedWarning, InputError, OutOfRangeError, UnknownNameError
from perjac.saliency.lrp_rules import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus

pytestmark = pytest.mark.slow  # left out of `make check`

METHODS = [
    pj.saliency.guided_backprop, pj.saliency.deconvnet, pj.saliency.lrp, pj.saliency.deeplift,
]  # fmt: skip
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seeded():
    global rng
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)


def random(*shape):
    return rng.standard_normal(shape).astype("f4")


def with_biases(model):
    for weight in model.trainable_weights:
        weight.assign(0.4 * rng.standard_normal(weight.shape))
    return model


def dense(use_bias=True, activation="relu"):
    return with_biases(
        keras.Sequential(
            [keras.Input((5,)), layers.Dense(6, activation, use_bias),
             layers.Dense(4, activation, use_bias), layers.Dense(3, None, use_bias)]
        )
    )  # fmt: skip


def convolutional(use_bias=True, activation="relu"):
    return with_biases(
        keras.Sequential(
            [keras.Input((6, 5, 2)),
             layers.Conv2D(3, (3, 2), activation=activation, use_bias=use_bias),
             layers.MaxPooling2D(2), layers.Flatten(),
             layers.Dense(4, activation, use_bias), layers.Dense(3, None, use_bias)]
        )
    )  # fmt: skip


NETS = {
    "dense": lambda: dense(),
    "dense, no bias": lambda: dense(use_bias=False),
    "dense, tanh": lambda: dense(activation="tanh"),
    "conv": lambda: convolutional(),
    "conv, no bias": lambda: convolutional(use_bias=False),
    "conv, tanh": lambda: convolutional(activation="tanh"),
}


@functools.cache
def made(net):
    """Return (engine, reference): traced once for all rules."""
    model = NETS[net]()
    return pj.Engine(model), steps_of(model)


each_net = pytest.mark.parametrize("net", NETS)


# ---- the reference: one example, a vector; every layer with weights is a matrix -----------------


def steps_of(model):
    """Return the network as [("affine", M, b) | ("relu",) | ("tanh",) | ("pool", windows)]."""
    steps = []
    for layer in model.layers:
        if isinstance(layer, (layers.Dense, layers.Conv2D)):
            w = np.float64(layer.kernel)
            bias = np.float64(layer.bias) if layer.use_bias else np.zeros(w.shape[-1])
            if w.ndim == 4:
                w, bias = as_matrix(w, bias, layer.input.shape[1:])
            steps.append(("affine", w, bias))
            if layer.activation.__name__ != "linear":
                steps.append((layer.activation.__name__,))
        elif isinstance(layer, layers.MaxPooling2D):
            number = np.arange(np.prod(layer.input.shape[1:])).reshape(layer.input.shape[1:])
            rows, columns, channels = layer.output.shape[1:]
            windows = [
                number[2 * p : 2 * p + 2, 2 * q : 2 * q + 2, c].ravel()
                for p in range(rows)
                for q in range(columns)
                for c in range(channels)
            ]
            steps.append(("pool", np.array(windows)))
    return steps


def as_matrix(w, bias, shape):
    height, width, channels = shape
    p, q = height - w.shape[0] + 1, width - w.shape[1] + 1
    matrix = np.zeros((height, width, channels, p, q, w.shape[-1]))
    for i in range(p):
        for j in range(q):
            matrix[i : i + w.shape[0], j : j + w.shape[1], :, i, j] = w
    return matrix.reshape(height * width * channels, -1), np.tile(bias, p * q)


def forward(steps, x):
    """Return [x, after step 0, after step 1, ...]."""
    found = [np.float64(x).ravel()]
    for kind, *what in steps:
        a = found[-1]
        found.append(
            {
                "affine": lambda a=a, what=what: a @ what[0] + what[1],
                "relu": lambda a=a: np.maximum(a, 0),
                "tanh": lambda a=a: np.tanh(a),
                "pool": lambda a=a, what=what: a[what[0]].max(1),
            }[kind]()
        )
    return found


def unpooled(windows, a, r):
    back = np.zeros_like(a)
    for window, part in zip(windows, r, strict=True):
        back[window[a[window].argmax()]] += part
    return back


def gradient_like(steps, x, c, relu):
    """A gradient whose rectifiers are `relu(dy, input)`."""
    seen = forward(steps, x)
    dy = np.eye(seen[-1].size)[c]
    for (kind, *what), a, out in zip(steps[::-1], seen[-2::-1], seen[:0:-1], strict=True):
        if kind == "affine":
            dy = what[0] @ dy
        elif kind == "relu":
            dy = relu(dy, a)
        elif kind == "tanh":
            dy = dy * (1 - out**2)
        else:
            dy = unpooled(what[0], a, dy)
    return dy.reshape(x.shape)


def stab(z, epsilon=1e-6):
    return z + epsilon * np.where(z < 0, -1, 1)


def shared(rule, x, w, b, r):
    """One layer of the papers: contributions x_i w_ij in a matrix."""
    n, name = x[:, None] * w, type(rule).__name__
    up, down = np.maximum, np.minimum
    if name == "Epsilon":
        return n / stab(n.sum(0) + b, rule.epsilon) @ r
    if name in ("AlphaBeta", "ZPlus"):
        found = rule.alpha * up(n, 0) / stab(up(n, 0).sum(0) + up(b, 0)) @ r
        return found - rule.beta * down(n, 0) / stab(down(n, 0).sum(0) + down(b, 0)) @ r
    if name == "Gamma":
        z, g = n.sum(0) + b, rule.gamma
        n = np.where(z > 0, n + g * up(n, 0), n + g * down(n, 0))
        return n / stab(n.sum(0) + np.where(z > 0, b + g * up(b, 0), b + g * down(b, 0))) @ r
    if name == "Flat":
        n = (w != 0).astype(float)  # a convolution's matrix has zeros where there is no weight
    elif name == "WSquare":
        n = w**2
    else:
        n = n - rule.low * up(w, 0) - rule.high * down(w, 0)
    return n / stab(n.sum(0)) @ r


def relevance(steps, x, c, rule_of):
    seen = forward(steps, x)
    r = np.eye(seen[-1].size)[c] * seen[-1]
    for k in reversed(range(len(steps))):
        kind, *what = steps[k]
        if kind == "affine":
            r = shared(rule_of(k), seen[k], *what, r)
        elif kind == "pool":
            r = unpooled(what[0], seen[k], r)
    return r.reshape(x.shape)


def multipliers(steps, x, x0, c):
    """DeepLIFT, rescale: contributions of x - x0."""
    seen, start = forward(steps, x), forward(steps, x0)
    m = np.eye(seen[-1].size)[c]
    for k in reversed(range(len(steps))):
        kind, *what = steps[k]
        a, a0, y, y0 = seen[k], start[k], seen[k + 1], start[k + 1]
        if kind == "affine":
            m = what[0] @ m
            continue
        dx = np.where(a == a0, 1, a - a0)
        if kind == "pool":
            top = np.maximum(y, y0)
            m = unpooled(what[0], a, m * (top - y0)) + unpooled(what[0], a0, m * (y - top))
            m = m / dx
        else:
            m = m * (y - y0) / dx
    return (m * (seen[0] - start[0])).reshape(x.shape)


def of_each(reference, x, count=3):
    return np.array([[reference(one, c) for c in range(count)] for one in x])


def close(found, expected, rtol=2e-4):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max() / 10)


# ---- against it --------------------------------------------------------------------------------


@each_net
def test_rectifiers_go_back_as_their_papers_say(net):
    engine, steps = made(net)
    x = random(4, *engine.model.input_shape[1:])
    guided = of_each(lambda one, c: gradient_like(
        steps, one, c, lambda dy, a: np.maximum(dy, 0) * (a > 0)), x)  # fmt: skip
    close(pj.saliency.guided_backprop(engine, x, "all").values, guided)
    deconv = of_each(lambda one, c: gradient_like(
        steps, one, c, lambda dy, a: np.maximum(dy, 0)), x)  # fmt: skip
    found = pj.saliency.deconvnet(engine, x, "all")
    close(found.values, deconv)
    assert found.facts["rectifiers"] == sum(kind == "relu" for kind, *_ in steps)


@pytest.mark.parametrize(
    ("rectify", "end"),
    [
        (keras.activations.relu6, 6),
        (lambda z: keras.ops.maximum(z, 0.0), np.inf),
        (lambda z: keras.ops.maximum(0.0, z), np.inf),
    ],
)
def test_all_kinds_of_rectifiers_are_met(rectify, end):
    given, first, last = keras.Input((5,)), layers.Dense(6), layers.Dense(2)
    model = with_biases(keras.Model(given, last(rectify(first(given)))))
    engine, x = pj.Engine(model), 8 * random(9, 5)
    z, dy = np.asarray(first(x)), np.maximum(last.kernel, 0)
    assert (z > 6).any()
    inside = ((z > 0) & (z < end)).astype("f4")
    for method, passed in (
        (pj.saliency.guided_backprop, inside), (pj.saliency.deconvnet, np.ones_like(z))
    ):  # fmt: skip
        found = method(engine, x, "all")
        close(found.values, np.einsum("bh,hc,ih->bci", passed, dy, np.asarray(first.kernel)))
        assert found.facts["rectifiers"] == 1


RULES = [
    Epsilon(), Epsilon(0.1), Epsilon(0.0), Gamma(0.25), Gamma(2.0), AlphaBeta(3, 2),
    ZPlus(), Flat(), WSquare(), ZBox(-4.0, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("net", ["dense", "conv, tanh"])  # a maximum of zeros has no one place
def test_rules_share_as_their_papers_say(net, rule):
    engine, steps = made(net)
    x = random(3, *engine.model.input_shape[1:])
    found = pj.saliency.lrp(engine, x, "all", rules=rule)
    close(found.values, of_each(lambda one, c: relevance(steps, one, c, lambda k: rule), x), 1e-3)


def test_composites_choose_by_place():
    model = NETS["conv"]()
    engine, steps, x = pj.Engine(model), steps_of(model), random(3, 6, 5, 2)
    names = [layer.name for layer in model.layers]
    for rules, chosen in [
        ("epsilon_plus_flat", {0: Flat()}),
        ("epsilon_alpha2_beta1", {0: AlphaBeta()}),
        ([("first", ZBox(-4, 4)), ("MatMul", Gamma())], {0: ZBox(-4, 4), 3: Gamma(), 5: Gamma()}),
        ([(names[3], Gamma()), (lambda unit: unit.type == "Conv2D", ZPlus())],
         {0: ZPlus(), 3: Gamma()}),
    ]:  # fmt: skip
        found = pj.saliency.lrp(engine, x, "all", rules=rules)
        expected = of_each(
            lambda one, c, by=chosen: relevance(steps, one, c, lambda k: by.get(k, Epsilon())), x
        )
        close(found.values, expected, 1e-3)
        assert found.facts["rules"][names[0]] == str(chosen[0])
    with pytest.raises(UnknownNameError, match="epsilon_plus"):
        pj.saliency.lrp(engine, x, rules="epsilon_pls")
    with pytest.raises(InputError, match="pairs"):
        pj.saliency.lrp(engine, x, rules=[Epsilon()])


@each_net
def test_deeplift_rescales_as_its_paper_says(net):
    engine, steps = made(net)
    shape = engine.model.input_shape[1:]
    x, x0 = random(3, *shape), random(*shape)
    found = pj.saliency.deeplift(engine, x, "all", baseline=x0)
    close(found.values, of_each(lambda one, c: multipliers(steps, one, x0, c), x))
    np.testing.assert_allclose(found.delta, 0, atol=2e-6)


# ---- what is promised ---------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["dense, no bias", "conv, no bias"])
def test_without_biases_all_agree_on_relu_networks(net):
    engine, _ = made(net)
    x = random(4, *engine.model.input_shape[1:])
    expected = pj.saliency.input_x_gradient(engine, x, "all").values
    close(pj.saliency.lrp(engine, x, "all", rules=Epsilon(0.0)).values, expected)
    close(pj.saliency.deeplift(engine, x, "all").values, expected)


@pytest.mark.parametrize("rule", [Epsilon(0.0), Gamma(), ZPlus(), Flat(), WSquare()], ids=str)
def test_without_biases_relevance_is_conserved(rule):
    model = convolutional(use_bias=False)
    x = np.abs(random(4, 6, 5, 2))
    for weight in model.weights:  # none of the sums of positive parts is empty
        weight.assign(tf.abs(weight))
    found = pj.saliency.lrp(pj.Engine(model), x, "all", rules=rule)
    np.testing.assert_allclose(found.delta, 0, atol=1e-5 * np.abs(found.outputs).max())


def test_alpha_beta_conserves_where_both_parts_are_there():
    model = keras.Sequential([keras.Input((30,)), layers.Dense(3, use_bias=False)])
    x = random(4, 30)
    found = pj.saliency.lrp(pj.Engine(model), x, "all", rules=AlphaBeta(2, 1))
    np.testing.assert_allclose(found.delta, 0, atol=1e-4)


def test_every_layers_account_balances():
    model = convolutional()
    x = random(4, 6, 5, 2)
    found = pj.saliency.lrp(pj.Engine(model), x, "all", rules=Epsilon(0.01))
    account = found.facts["layers"]
    assert list(account) == [layer.name for layer in model.layers]
    first, last = (account[model.layers[n].name] for n in (0, -1))
    np.testing.assert_allclose(last["arriving"], found.outputs, rtol=1e-6)
    np.testing.assert_allclose(
        first["leaving"], np.sum(found.values, axis=(2, 3, 4)), rtol=1e-4, atol=1e-5
    )
    absorbed = sum(np.asarray(a["biases"]) + np.asarray(a["epsilon"]) for a in account.values())
    np.testing.assert_allclose(-found.delta, absorbed, rtol=1e-4, atol=1e-5)
    assert np.abs(absorbed).max() > 1e-2
    for entry in account.values():
        np.testing.assert_allclose(entry["lost"], 0, atol=1e-5)


def test_normalisation_is_merged_into_the_weights_before_it():
    conv, norm = layers.Conv2D(3, 2), layers.BatchNormalization()
    tail = [layers.ReLU(), layers.Flatten(), layers.Dense(3)]
    model = with_biases(keras.Sequential([keras.Input((5, 4, 2)), conv, norm, *tail]))
    norm.moving_mean.assign(random(3))
    norm.moving_variance.assign(np.abs(random(3)) + 0.5)
    scale = norm.gamma / tf.sqrt(norm.moving_variance + norm.epsilon)
    assert np.min(scale) < 0 < np.max(scale)
    merged = layers.Conv2D(3, 2)
    plain = keras.Sequential([keras.Input((5, 4, 2)), merged, *tail])
    merged.set_weights([conv.kernel * scale, (conv.bias - norm.moving_mean) * scale + norm.beta])
    x = random(4, 5, 4, 2)
    engines = pj.Engine(model), pj.Engine(plain)
    for rule in [Epsilon(), Gamma(), AlphaBeta()]:
        one, other = (pj.saliency.lrp(engine, x, "all", rules=rule).values for engine in engines)
        close(one, other, 1e-3)


def test_residual_connections_share_in_proportion():
    inner, last = layers.Dense(4, "relu"), layers.Dense(2, use_bias=False)
    given = keras.Input((4,))
    model = keras.Model(given, last(layers.Add()([inner(given), given])))
    x = random(3, 4)
    found = np.asarray(pj.saliency.lrp(pj.Engine(model), x, "all").values)
    for one, maps in zip(np.float64(x), found, strict=True):
        h = np.maximum(one @ np.float64(inner.kernel), 0)
        for c in range(2):
            w = np.float64(last.kernel)[:, c : c + 1]
            z = h + one
            r = shared(Epsilon(), z, w, 0, np.float64(z @ w))
            through = shared(Epsilon(), one, np.float64(inner.kernel), 0, h / z * r)
            close(maps[c], one / z * r + through, 1e-3)


def test_deeplift_of_a_linear_model_is_weight_times_difference():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    x, x0 = random(3, 6), random(3, 6)
    found = pj.saliency.deeplift(pj.Engine(model), x, 1, baseline=x0).values
    close(found, (x - x0) * model.get_weights()[0][:, 1])


def test_deeplift_of_a_log_softmax_is_complete():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="log_softmax")])
    x, x0 = random(5, 6), random(5, 6)
    found = pj.saliency.deeplift(pj.Engine(model), x, "all", baseline=x0)
    np.testing.assert_allclose(found.delta, 0, atol=1e-5)


@pytest.mark.parametrize("gate_first", [False, True])
def test_a_gate_gets_no_relevance(gate_first):
    signal, other = keras.Input((4,), name="signal"), keras.Input((3,), name="gate")
    pair = [layers.Dense(5, use_bias=False)(signal), layers.Dense(5, "sigmoid")(other)]
    product = layers.Multiply()(pair[::-1] if gate_first else pair)
    model = keras.Model([signal, other], layers.Dense(2, use_bias=False)(product))
    x = {"signal": random(3, 4), "gate": random(3, 3)}
    found = pj.saliency.lrp(pj.Engine(model), x, "all")
    assert not np.any(found.values["gate"])
    np.testing.assert_allclose(np.sum(found.values["signal"], 2), found.outputs, rtol=1e-3)


def many_kinds():
    """Gates, attention, normalisation, products: every sort of rule at once."""
    given = keras.Input((8, 8, 3))
    h = layers.ReLU(6.0)(layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(given)))
    h = layers.Add()([h, layers.DepthwiseConv2D(3, padding="same", activation="gelu")(h)])
    gate = layers.Dense(4, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(h))
    h = layers.LeakyReLU()(layers.MaxPooling2D()(layers.Multiply()([h, gate])))
    h = layers.SeparableConv2D(4, 2, activation="silu")(h)
    h = layers.LayerNormalization()(layers.Reshape((-1, 4))(layers.AveragePooling2D(1)(h)))
    h = layers.MultiHeadAttention(2, 4)(h, h)
    h = layers.Conv1D(4, 1, activation="elu")(h)
    h = layers.GlobalMaxPooling1D()(layers.EinsumDense("abc,cd->abd", (None, 5))(h))
    h = layers.Dropout(0.5)(layers.Concatenate()([h, h]))
    return keras.Model(given, layers.Dense(3, "softmax")(h))


def test_many_kinds_of_operations_have_rules():
    keras.utils.set_random_seed(0)
    engine, x = pj.Engine(many_kinds()), random(3, 8, 8, 3)
    found = pj.saliency.deeplift(engine, x, "all", baseline=0.1)
    np.testing.assert_allclose(found.delta, 0, atol=5e-6)
    assert np.isfinite(pj.saliency.guided_backprop(engine, x, "all").values).all()
    for rules in ("epsilon_gamma", "epsilon_alpha2_beta1_flat"):
        found = pj.saliency.lrp(engine, x, "all", of="logits", rules=rules)
        lost = sum(
            np.asarray(entry[name])
            for entry in found.facts["layers"].values()
            for name in ("biases", "epsilon", "lost")
        )
        np.testing.assert_allclose(-found.delta, lost, rtol=1e-3, atol=1e-4)


# ---- any model, any target ----------------------------------------------------------------------


class Subclassed(keras.Model):
    def __init__(self, inner, last):
        super().__init__()
        self.inner, self.last = inner, last

    @tf.function
    def hidden(self, x):
        return self.inner(x)

    def call(self, x):
        return self.last(self.hidden(x))


@pytest.mark.parametrize("method", METHODS)
def test_nested_and_subclassed_models_give_the_same(method):
    model = convolutional()
    x = random(3, 6, 5, 2)
    expected = method(pj.Engine(model), x, "all").values
    inner, last = keras.Sequential(model.layers[:4]), model.layers[4]
    subclassed = Subclassed(inner, last)
    subclassed(x)
    nested = keras.Sequential([keras.Input((6, 5, 2)), inner, last])
    for other in (nested, subclassed, lambda x: subclassed(x)):
        close(method(pj.Engine(other), x, "all").values, expected, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_all_equals_each_target_alone_and_each_example_alone(method):
    model = convolutional()
    engine, x = pj.Engine(model), random(4, 6, 5, 2)
    every = np.asarray(method(engine, x, target="all").values)
    for c in range(3):
        close(method(engine, x, target=c).values, every[:, c], 1e-5)
    each = np.array([2, 0, 1, -2])
    close(method(engine, x, target=each).values, every[np.arange(4), each], 1e-5)
    best = np.asarray(engine.outputs(x)).argmax(1)
    close(method(engine, x).values, every[np.arange(4), best], 1e-5)
    for n in range(4):
        close(method(engine, x[n : n + 1], "all").values, every[n : n + 1], 1e-5)
    u = np.eye(3, dtype="f4")[[1, 2, 0, 0]] * 2
    close(method(engine, x, target=u).values, 2 * every[np.arange(4), [1, 2, 0, 0]], 1e-5)
    assert method(engine, x[:0], "all").values.shape == (0, 3, 6, 5, 2)
    with pytest.raises(OutOfRangeError, match="7.*0 to 2"):
        method(engine, x, target=7)


@pytest.mark.parametrize("method", METHODS)
def test_a_hidden_layer_can_be_looked_at(method):
    model = convolutional()
    x, hidden = random(3, 6, 5, 2), model.layers[2]
    front = keras.Sequential(model.layers[:3])
    back = keras.Sequential([keras.Input(hidden.output.shape[1:]), *model.layers[3:]])
    found = method(pj.Engine(model), x, "all", wrt=pj.activation(hidden.name)).values
    close(found, method(pj.Engine(back), front(x), "all").values, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_change_the_result(method, monkeypatch):
    model = convolutional()
    x = random(5, 6, 5, 2)
    whole = method(pj.Engine(model), x, "all")
    monkeypatch.setattr("perjac.saliency._problem._POINTS", 2)
    parts = method(pj.Engine(model), x, "all")
    close(parts.values, whole.values, 1e-6)
    for layer, entry in whole.facts.get("layers", {}).items():
        close(parts.facts["layers"][layer]["leaving"], entry["leaving"], 1e-5)


def test_operations_without_rules_are_named():
    given = keras.Input((4,))
    odd = layers.Lambda(lambda x: tf.math.cumsum(tf.math.lgamma(x), 1), name="odd")
    engine = pj.Engine(keras.Model(given, layers.Dense(2)(odd(given))))
    x = np.abs(random(2, 4)) + 1
    for method in (pj.saliency.lrp, pj.saliency.deeplift):
        with pytest.raises(InputError, match=r"Cumsum.*'odd'"):
            method(engine, x)
    given = keras.Input((4,))
    engine = pj.Engine(keras.Model(given, layers.Multiply(name="both")([given, given])))
    with pytest.raises(InputError, match=r"Mul.*'both'.*gate"):
        pj.saliency.lrp(engine, x)


@pytest.mark.parametrize("method", METHODS)
def test_loops_are_refused(method):
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4, name="memory"), layers.Dense(2)])
    with pytest.raises(InputError, match="'memory'.*loop.*unroll"):
        method(pj.Engine(model), random(2, 5, 3))


@pytest.mark.parametrize("method", METHODS)
def test_unrolled_loops_have_rules(method):
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4, unroll=True), layers.Dense(2)])
    found = method(pj.Engine(model), random(2, 5, 3), "all")
    assert np.isfinite(found.values).all()
    if method is pj.saliency.deeplift:
        np.testing.assert_allclose(found.delta, 0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_does_not_matter_gets_nothing(method):
    one, other = keras.Input((3,), name="one"), keras.Input((2,), name="other")
    model = keras.Model([one, other], layers.Dense(2)(one))
    given = {"one": random(2, 3), "other": random(2, 2)}
    with pytest.warns(DisconnectedWarning, match="other"):
        found = method(pj.Engine(model), given, 0, wrt="other")
    assert not np.any(found.values)
    both = method(pj.Engine(model), given, 0).values
    assert np.any(both["one"])
    assert not np.any(both["other"])
