"""Learn to balance a pole by policy gradients: plain, with Adam, and natural.

    python examples/cartpole.py
    python examples/cartpole.py --seeds 3 --episodes 200 --out small.png
    python examples/cartpole.py --tune

A small Keras network plays Gymnasium's CartPole-v1. One derivative serves all three methods: the
score ∇ log π(a|s) of each step played, which is minus the gradient of its cross-entropy. REINFORCE
(Williams 1992) follows their sum, weighted by advantages; the natural gradient (Kakade 2001) turns
that sum by the inverse of the Fisher information of the policy, and goes as far as a divergence of
δ allows (Schulman et al. 2015, Trust region policy optimization, appendix C).

Every method plays the same number of episodes, ten to a step. It prints how many episodes each took
to solve the game: 475 of 500 on average over the last 100. `--tune` repeats the search for rates
and step sizes, on other seeds; what it found is `CHOSEN`.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import dataclasses
import time

import keras
import numpy as np
from scipy.special import expit, log_softmax

import perjac as pj
from perjac.errors import missing_extra

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STATE = ("cart's place", "cart's speed", "pole's angle", "pole's speed")
SOLVED, WINDOW = 475, 100  # Gymnasium's own threshold, and over how many episodes
BATCH = 10  # episodes for each step
DISCOUNT = 0.99
SEEN = 512  # states that the Fisher information is estimated from

# Twelve settings for each method; δ = 0.003 was tried too, and was slower.
RATES = {
    "REINFORCE": (0.1, 0.3, 1, 2, 3, 4, 5, 6, 7, 10, 20, 30),
    "Adam": (0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3),
}
GRID = {name: [{"rate": rate} for rate in rates] for name, rates in RATES.items()}
GRID["natural"] = [
    {"delta": delta, "damping": damping}
    for delta in (0.01, 0.03, 0.1)
    for damping in (0.003, 0.01, 0.03, 0.1)
]
CHOSEN = {
    "REINFORCE": {"rate": 7},
    "Adam": {"rate": 0.07},
    "natural": {"delta": 0.01, "damping": 0.03},
}
COLOURS = {"REINFORCE": "#999999", "Adam": "#2166ac", "natural": "#b2182b"}


def environments(count, seed):
    """Return so many games side by side, stepped as one."""
    try:
        import gymnasium
    except ImportError as failure:
        raise missing_extra("This example", "rl", failure) from failure
    games = gymnasium.make_vec(
        "CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point"
    )
    games.reset(seed=seed)
    return games


def policy(dtype="float32"):
    """Return a network from a state's four numbers to the logits of left and right."""
    return keras.Sequential(
        [
            keras.Input((4,), dtype=dtype),
            keras.layers.Dense(32, activation="tanh", dtype=dtype, name="hidden"),
            keras.layers.Dense(2, dtype=dtype, name="logits"),
        ]
    )


def logits_of(weights, states):
    """Return the network's logits, by NumPy: a call of TensorFlow's takes longer than a step."""
    kernel, bias, top, top_bias = weights
    return np.tanh(states @ kernel + bias) @ top + top_bias


@dataclasses.dataclass
class Episodes:
    """N episodes played side by side, T steps until the last of them ended.

    states (T, N, 4), actions (T, N), and alive (T, N): whether the step still belongs to one.
    """

    states: np.ndarray
    actions: np.ndarray
    alive: np.ndarray

    @property
    def returns(self):
        """How many steps each took, which is its reward, (N,)."""
        return self.alive.sum(0)

    def steps(self):
        """Return the states (M, 4) and actions (M,) of all steps that count."""
        return self.states[self.alive], self.actions[self.alive]

    def advantages(self, discount=DISCOUNT):
        """Return how much better each step turned out than in the other episodes, (M,).

        The reward to go, less the mean of the other episodes' at the same time: a baseline that
        does not depend on the step's own action, so that the gradient keeps its expectation, and
        that nothing has to be learnt for. Divided by the standard deviation, for the rates' sake.
        """
        to_go = np.zeros(self.alive.shape)
        following = np.zeros(self.alive.shape[1])
        for t in reversed(range(len(self.alive))):
            following = np.where(self.alive[t], 1 + discount * following, 0)
            to_go[t] = following
        count = self.alive.shape[1]
        others = (to_go.sum(1, keepdims=True) - to_go) / (count - 1)
        found = (to_go - others)[self.alive]
        return found / found.std() if np.ptp(self.returns) else np.zeros_like(found)


def play(games, weights, rng):
    """Play one episode in each of the games, with actions drawn from the policy."""
    states, _ = games.reset()
    alive = np.ones(len(states), bool)
    played = []
    while alive.any():
        left, right = logits_of(weights, states).T
        actions = (rng.random(len(states)) < expit(right - left)).astype("int32")
        played.append((states, actions, alive))
        states, _, fallen, out_of_time, _ = games.step(actions)
        alive = alive & ~(fallen | out_of_time)
    return Episodes(*(np.stack(part) for part in zip(*played, strict=True)))


def slope(engine, states, actions, advantages):
    """Return the gradient of -1/M Σ A log π(a|s) over M steps, by weight: down it, returns go up.

    The gradient of a step's cross-entropy is minus its score. Weighted sums of them form none.
    """
    return engine.gradients(states, actions, loss=LOSS).vjp(advantages / len(states))


def natural_step(information, gradient, delta, damping):
    """Return F⁻¹g, and how far to go along it, √(2δ / gᵀF⁻¹g): a mean KL divergence of about δ.

    With damping λ, F + λI stands for F: the step gets shorter where the batch says little.
    """
    direction = pj.fisher.natural_gradient(information, gradient, damping)
    product = sum(np.vdot(g, direction[key]) for key, g in gradient.items())
    return direction, np.sqrt(2 * delta / product) if product > 0 else 0.0


def divergence(before, after):
    """Return the mean KL divergence of the policies with these logits (M, 2)."""
    old, new = log_softmax(np.float64(before), -1), log_softmax(np.float64(after), -1)
    return float(np.sum(np.exp(old) * (old - new), -1).mean())


@dataclasses.dataclass
class Run:
    """What became of a policy: each episode's return, each step's divergence, the last batch."""

    returns: list
    divergences: list
    batch: Episodes

    @property
    def solved(self):
        """After how many episodes the last 100 brought 475 on average, or None."""
        if len(self.returns) < WINDOW:
            return None
        means = np.convolve(self.returns, np.ones(WINDOW) / WINDOW, "valid")
        there = np.flatnonzero(means >= SOLVED)
        return int(there[0]) + WINDOW if len(there) else None


def train(engine, method, settings, *, episodes, seed):
    """Train the engine's model from new weights."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    model, games = engine.model, environments(BATCH, seed)
    model.set_weights(policy().get_weights())
    weights = model.trainable_variables
    optimizer = None
    if method != "natural":
        kind = keras.optimizers.Adam if method == "Adam" else keras.optimizers.SGD
        optimizer = kind(float(settings["rate"]))
        optimizer.build(weights)
    returns, divergences = [], []
    while len(returns) < episodes:
        batch = play(games, model.get_weights(), rng)
        returns += batch.returns.tolist()
        states, actions = batch.steps()
        before = logits_of(model.get_weights(), states)
        gradient = slope(engine, states, actions, batch.advantages())
        if optimizer:
            optimizer.apply([gradient[w] for w in weights], weights)
        else:
            some = states[np.resize(rng.permutation(len(states)), SEEN)]
            information = engine.fisher(some, likelihood="categorical")
            direction, rate = natural_step(information, gradient, **settings)
            pj.fisher.descend(engine, direction, rate)
        divergences.append(divergence(before, logits_of(model.get_weights(), states)))
    return Run(returns, divergences, batch)


def tune(engine, episodes):
    """Print the mean return of every setting, over seeds that nothing else uses.

    All play for the first three seeds, and the best four for seven more.
    """
    for method, several in GRID.items():
        for seeds in (range(100, 103), range(103, 110)):
            means = []
            for settings in several:
                runs = [train(engine, method, settings, episodes=episodes, seed=s) for s in seeds]
                means.append(np.mean([run.returns for run in runs]))
                solved = sum(run.solved is not None for run in runs)
                told = ", ".join(f"{name} {value:g}" for name, value in settings.items())
                ended = f"mean return {means[-1]:5.1f}, solved {solved} of {len(seeds)}"
                print(f"  {method:>9}, {told:<24} {ended}", flush=True)
            several = [several[n] for n in np.argsort(means)[::-1][:4]]


def compare(engine, batch, delta, damping):
    """Print what each way to solve for the natural gradient gives on one batch.

    The cosine of its step with the exact one, and the divergence that the step came to.
    """
    states, actions = batch.steps()
    gradient = slope(engine, states, actions, batch.advantages())
    information = engine.fisher(states, likelihood="categorical")
    kept = engine.model.get_weights()
    exact = None
    for form in ("dense", "operator", "low_rank", "eigenbasis", "kronecker", "diagonal"):
        direction, rate = natural_step(getattr(information, form)(), gradient, delta, damping)
        flat = np.concatenate([np.ravel(part) for part in direction.values()])
        exact = flat if exact is None else exact
        cosine = flat @ exact / np.linalg.norm(flat) / np.linalg.norm(exact)
        pj.fisher.descend(engine, direction, rate)
        found = divergence(logits_of(kept, states), logits_of(engine.model.get_weights(), states))
        engine.model.set_weights(kept)
        print(f"  {form:<10} cosine {cosine:.3f}, divergence {found:.4f} for {delta:g}", flush=True)


def salient(engine, batch):
    """Return what each number of the state does to the logit of the action taken, (2, 4).

    The mean of its derivative where the action was left, and right, times the number's spread.
    """
    states, actions = batch.steps()
    maps = np.asarray(pj.saliency.gradient(engine, states, target=actions).values)
    return np.array([maps[actions == a].mean(0) for a in range(2)]) * states.std(0)


def band(axes, played, curves, name):
    """Draw the mean over seeds, with its standard error."""
    mean = curves.mean(0)
    error = curves.std(0, ddof=min(1, len(curves) - 1)) / np.sqrt(len(curves))
    axes.plot(played, mean, color=COLOURS[name], label=name)
    axes.fill_between(played, mean - error, mean + error, color=COLOURS[name], alpha=0.2, lw=0)


def draw(runs, looked, path):
    """Draw the returns, how far each step went, and what the last natural policy looks at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1.4, 1.1))
    for name, several in runs.items():
        curves = np.array([np.reshape(run.returns, (-1, BATCH)).mean(1) for run in several])
        played = BATCH * np.arange(1, curves.shape[1] + 1)
        band(left, played, curves, name)
        band(middle, played, np.array([run.divergences for run in several]), name)
    left.axhline(SOLVED, color="0.6", linewidth=0.8, linestyle=":")
    left.set(xlabel="episodes played", ylabel="return: steps until the pole falls", ylim=(0, 510))
    left.legend(frameon=False, loc="lower right")
    delta = CHOSEN["natural"]["delta"]
    middle.axhline(delta, color="0.6", linewidth=0.8, linestyle=":")
    middle.annotate(f"δ = {delta:g}", (played[-1], delta), ha="right", va="bottom", fontsize=8)
    middle.set(xlabel="episodes played", ylabel="KL divergence of a step")
    middle.set(yscale="log", ylim=(1e-4, 3))  # steps of length zero lie below
    for action, (name, colour) in enumerate({"left": "#67a9cf", "right": "#ef8a62"}.items()):
        places = np.arange(len(STATE)) + (0.2, -0.2)[action]
        right.barh(places, looked[action], 0.4, color=colour, label=f"push {name}")
    right.set_yticks(range(len(STATE)), STATE)
    right.invert_yaxis()
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set_xlabel("effect on the logit of the push")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=90)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many runs of each method")
    parser.add_argument("--episodes", type=int, default=500, help="of each run")
    parser.add_argument("--out", default="cartpole.png", help="the picture")
    parser.add_argument("--tune", action="store_true", help="try the grid of settings instead")
    options = parser.parse_args(arguments)
    if options.episodes < BATCH or options.episodes % BATCH:
        parser.error(f"--episodes has to be a multiple of {BATCH}")
    engine = pj.Engine(policy())
    if options.tune:
        return tune(engine, options.episodes)
    runs = {}
    for name, settings in CHOSEN.items():
        start = time.perf_counter()
        runs[name] = [
            train(engine, name, settings, episodes=options.episodes, seed=seed)
            for seed in range(options.seeds)
        ]
        took = (time.perf_counter() - start) / options.seeds
        mean = np.mean([run.returns for run in runs[name]])
        print(f"{name}, {settings}: mean return {mean:.1f} ({took:.0f} s a run)")
        solved = [run.solved for run in runs[name] if run.solved]
        after = f", after {', '.join(map(str, solved))} episodes" if solved else ""
        print(f"  {len(solved)} of {options.seeds} solved it{after}", flush=True)
    # What the engine holds now is the last natural run's policy.
    games = environments(BATCH, options.seeds)
    batch = play(games, engine.model.get_weights(), np.random.default_rng(options.seeds))
    draw(runs, salient(engine, batch), options.out)
    print("One natural step of a policy half trained, solved for in several ways:")
    settings = CHOSEN["natural"]
    train(engine, "natural", settings, episodes=5 * BATCH, seed=options.seeds)
    batch = play(games, engine.model.get_weights(), np.random.default_rng(options.seeds))
    compare(engine, batch, **settings)
    print(f"Picture: {options.out}")
    return runs


if __name__ == "__main__":
    main()
