"""The examples do what they say: their steps are right, and they run."""

import importlib.util
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import perjac as pj

pytestmark = pytest.mark.slow  # left out of `make check`

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    """Import an example, which is no package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype="float64"),
            keras.layers.Conv2D(3, 3, activation="tanh", dtype="float64"),
            keras.layers.Flatten(dtype="float64"),
            keras.layers.Dense(10, dtype="float64"),
        ]
    )


def clipped_by_hand(model, x, y, max_norm):
    """Clip the gradient of one example after another, by plain tapes."""
    total = [np.zeros(v.shape) for v in model.trainable_variables]
    shares = []
    for n in range(len(x)):
        with tf.GradientTape() as tape:
            # By TensorFlow's own: a Keras loss casts to float32.
            value = tf.nn.sparse_softmax_cross_entropy_with_logits(y[n], model(x[n : n + 1])[0])
        one = [g.numpy() for g in tape.gradient(value, model.trainable_variables)]
        norm = np.sqrt(sum(np.sum(g**2) for g in one))
        shares.append(min(1, max_norm / norm))
        total = [t + g * shares[-1] for t, g in zip(total, one, strict=True)]
    assert min(shares) < 1, "nothing was clipped"
    assert max(shares) == 1, "everything was clipped"
    return total


def test_dp_sgd_clips_as_by_hand():
    example = load("dp_sgd")
    (x, y), _ = example.digits()
    x, y = x[:21].astype("float64"), y[:21]
    model, loss = small_model(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine = pj.Engine(model)
    max_norm = float(np.median(engine.gradients(x, y, loss=loss).norms()))
    expected = clipped_by_hand(model, x, y, max_norm)
    for physical in (8, 64):  # with and without whole batches
        found = example.clipped_sum(engine, x, y, loss, max_norm, physical)
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(f, e, rtol=1e-10, atol=1e-10 * np.abs(e).max())


def test_dp_sgd_adds_noise_of_the_right_size():
    example = load("dp_sgd")
    (x, y), _ = example.digits()
    model, loss = small_model(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    engine, rng = pj.Engine(model), np.random.default_rng(0)
    arguments = engine, x[:5].astype("float64"), y[:5], loss, 0.5
    plain = example.private_gradient(*arguments, 0.0, 10, rng)
    noisy = example.private_gradient(*arguments, 3.0, 10, rng)
    noise = np.concatenate([np.ravel(n - p) for n, p in zip(noisy, plain, strict=True)])
    assert abs(noise.mean()) < 0.02
    np.testing.assert_allclose(noise.std(), 3.0 * 0.5 / 10, rtol=0.05)  # 1120 numbers
    empty = example.private_gradient(engine, x[:0], y[:0], loss, 0.5, 0.0, 10, rng)
    assert not any(np.any(e) for e in empty)


def test_dp_sgd_runs(capsys):
    found = load("dp_sgd").main(["--epochs", "3", "--noise", "0", "2"])
    printed = capsys.readouterr().out
    assert "sampling rate 0.0668, 45 steps" in printed
    assert "Noise multiplier 2" in printed
    assert found[0][-1] > 0.6
    assert len(found[2]) == 3


def small_policy(example, seed=0):
    """A policy in float64, and states that it may meet."""
    keras.utils.set_random_seed(seed)
    states = np.random.default_rng(seed).normal(size=(21, 4))
    return pj.Engine(example.policy("float64")), states


def test_scores_have_mean_zero_and_the_fisher_information_as_second_moment():
    example = load("cartpole")
    engine, states = small_policy(example)
    chances = tf.nn.softmax(engine.outputs(states)).numpy()
    mean, second = 0, 0
    for action in range(2):
        labels = np.full(len(states), action)
        scores = -engine.gradients(states, labels, loss=example.LOSS).matrix().numpy()
        assert np.linalg.norm(scores, axis=1).min() > 0.1
        mean = mean + chances[:, action, None] * scores
        second = second + (scores.T * chances[:, action]) @ scores / len(states)
    np.testing.assert_allclose(mean, 0, atol=1e-14)
    found = engine.fisher(states, likelihood="categorical").dense().to_numpy()
    np.testing.assert_allclose(found, second, rtol=1e-10, atol=1e-12 * second.max())


def test_slope_is_that_of_the_weighted_log_probabilities():
    example = load("cartpole")
    engine, states = small_policy(example)
    rng = np.random.default_rng(1)
    actions, advantages = rng.integers(0, 2, len(states)), rng.normal(size=len(states))
    with tf.GradientTape() as tape:
        taken = tf.gather(tf.nn.log_softmax(engine.model(states)), actions, batch_dims=1)
        value = -tf.reduce_mean(advantages * taken)
    expected = tape.gradient(value, engine.model.trainable_variables)
    found = example.slope(engine, states, actions, advantages)
    for variable, e in zip(engine.model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(found[variable], e, rtol=1e-10, atol=1e-14)


def test_natural_step_goes_as_far_as_the_divergence_allows():
    example = load("cartpole")
    engine, states = small_policy(example)
    rng = np.random.default_rng(1)
    actions, advantages = rng.integers(0, 2, len(states)), rng.normal(size=len(states))
    gradient = example.slope(engine, states, actions, advantages)
    information = engine.fisher(states, likelihood="categorical")
    before = engine.model.get_weights()

    def reached(delta, damping):
        engine.model.set_weights(before)
        direction, rate = example.natural_step(information, gradient, delta, damping)
        pj.fisher.descend(engine, direction, rate)
        after = engine.model.get_weights()
        return example.divergence(
            example.logits_of(before, states), example.logits_of(after, states)
        )

    np.testing.assert_allclose(reached(1e-8, 1e-9), 1e-8, rtol=0.01)
    np.testing.assert_allclose(reached(1e-4, 1e-3), 1e-4, rtol=0.2)
    assert 1e-5 < reached(1e-4, 0.3) < 0.9e-4  # damping holds back

    # No other step of the same divergence goes down further.
    direction, rate = example.natural_step(information, gradient, 1e-4, 1e-9)
    flat, matrix = information.columns.flat(gradient), information.dense()
    gain = rate * flat @ information.columns.flat(direction)
    for _ in range(20):
        other = rng.normal(size=len(flat)) + 3 * information.columns.flat(direction)
        other *= np.sqrt(2e-4 / (other @ (matrix @ other)))
        assert 0 < abs(flat @ other) < gain


def test_advantages_leave_the_own_episode_out():
    example = load("cartpole")
    lengths, discount = [3, 5, 2], 0.9
    alive = np.arange(5)[:, None] < lengths
    played = example.Episodes(np.zeros((5, 3, 4)), np.zeros((5, 3), int), alive)
    assert played.returns.tolist() == lengths

    def to_go(t, n):
        return sum(discount**k for k in range(max(lengths[n] - t, 0)))

    expected = [
        to_go(t, n) - np.mean([to_go(t, m) for m in range(3) if m != n])
        for t in range(5)
        for n in range(3)
        if t < lengths[n]
    ]
    found = played.advantages(discount)
    np.testing.assert_allclose(found, expected / np.std(expected), rtol=1e-12)
    alike = example.Episodes(played.states, played.actions, np.ones((5, 3), bool))
    assert not alike.advantages().any()  # nothing to learn, and nothing divided by zero


def test_what_was_played_follows_the_game():
    gymnasium = pytest.importorskip("gymnasium")
    example = load("cartpole")
    keras.utils.set_random_seed(0)
    model = example.policy()
    games, rng = example.environments(4, seed=0), np.random.default_rng(0)
    played = [example.play(games, model.get_weights(), rng) for _ in range(2)]
    assert not np.allclose(played[0].states[0], played[1].states[0])  # started anew
    states, _ = played[0].steps()
    logits = example.logits_of(model.get_weights(), states)
    np.testing.assert_allclose(logits, model(states), rtol=1e-5, atol=1e-6)
    single = gymnasium.make("CartPole-v1").unwrapped
    single.reset(seed=0)
    for batch in played:
        for n, length in enumerate(batch.returns):
            assert batch.alive[:length, n].all()
            for t in range(length):
                single.state = batch.states[t, n].astype("float64")
                after, _, fallen, _, _ = single.step(int(batch.actions[t, n]))
                assert fallen == (t == length - 1)
                if not fallen:
                    np.testing.assert_allclose(after, batch.states[t + 1, n], atol=1e-5)
            single.reset()


def test_solved_is_the_first_time_that_a_hundred_episodes_suffice():
    run = load("cartpole").Run
    rng = np.random.default_rng(0)
    returns = [20] * 30 + rng.integers(440, 501, 80).tolist() + [500] * 90
    expected = next(n for n in range(100, 201) if np.mean(returns[n - 100 : n]) >= 475)
    assert run(returns, [], None).solved == expected > 100
    assert run(returns[: expected - 1], [], None).solved is None
    assert run([500] * 99, [], None).solved is None


def test_cartpole_without_gymnasium_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(pj.errors.MissingExtraError, match=r"perjac\[rl\]"):
        load("cartpole").environments(2, seed=0)


def test_cartpole_runs_and_learns(tmp_path, capsys):
    pytest.importorskip("gymnasium")
    picture = tmp_path / "cartpole.png"
    example = load("cartpole")
    runs = example.main(["--seeds", "1", "--episodes", "60", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert printed.count("0 of 1 solved it") == 3
    for several in runs.values():
        assert len(several[0].returns) == 60
        assert len(several[0].divergences) == 6
    natural = runs["natural"][0]
    assert np.mean(natural.returns[-10:]) > 1.5 * np.mean(natural.returns[:10])
    delta = example.CHOSEN["natural"]["delta"]
    assert 0.2 * delta < np.median(natural.divergences) < 2 * delta
    cosines = dict(re.findall(r"(\w+) +cosine (\S+),", printed))
    assert {cosines[form] for form in ("dense", "operator", "low_rank")} == {"1.000"}
    assert 0.5 < float(cosines["kronecker"]) < 1


def test_the_page_on_reinforcement_learning_runs():
    page = EXAMPLES.parent / "docs" / "reinforcement_learning.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["jac"]["body/kernel"].shape == (64, 2, 4, 32)
    assert names["value"]["body/kernel"].shape == (64, 1, 4, 32)
    assert names["alike"].shape == (64, 1, 64, 1)
    assert names["att"].values.shape == (64, 4)
    summed = np.asarray(names["scores"]).T @ names["advantages"] / 64
    flat = np.concatenate([np.ravel(part) for part in names["gradient"].values()])
    np.testing.assert_allclose(-flat, summed, rtol=1e-4, atol=1e-6)
