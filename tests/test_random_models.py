"""Jacobians of random models agree with a plain loop, whatever the batch and its order."""

from __future__ import annotations

import numpy as np
import pytest
import random_models
import tensorflow as tf
from random_models import Outcome
from sampling import every

SAMPLE = (1, 5, 10, 11, 13, 15, 17, 18, 24, 27, 62)
ORDINARY = (1, 3, 9, 10, 13, 15, 31)
CHUNK = 20  # models for each process: some have ended theirs

# Models that are refused, with a message that says why, are as good as right ones.
GOOD = ("right", "refused", "undecided", "no reference")


def bad(found: list[Outcome]) -> str:
    return random_models.summary([outcome for outcome in found if outcome.kind not in GOOD])


def chunks(stop: int):
    return pytest.mark.parametrize("first", range(0, stop, CHUNK))


@pytest.mark.slow
@pytest.mark.parametrize("seed", every(2, SAMPLE))
def test_random_models_agree_with_a_plain_loop(seed):
    outcome = random_models.check(seed)
    assert outcome.kind == "right", outcome


@pytest.mark.large
@chunks(500)
def test_many_random_models_agree_with_a_plain_loop(first):
    found = list(random_models.outcomes(range(first, first + CHUNK)))
    assert len(found) == CHUNK
    assert all(outcome.kind in GOOD for outcome in found), bad(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", every(2, ORDINARY))
def test_ordinary_models_do_not_depend_on_the_first_two_examples(seed):
    outcome = random_models.check(seed, "ordinary")
    assert outcome.kind == "right", outcome


@pytest.mark.large
@chunks(60)
def test_many_ordinary_models_do_not_depend_on_the_first_two_examples(first):
    found = list(random_models.outcomes(range(first, first + CHUNK), "ordinary"))
    assert all(outcome.kind == "right" for outcome in found), bad(found)


def test_a_wrong_order_of_examples_is_found():
    example = random_models.build(1)
    right = random_models.answer(example.subject, example.subject.x)
    largest = random_models.sizes(right)
    for rows in right:
        assert random_models.distance(rows, rows, largest) == 0
    swapped = [random_models.distance(rows[::-1], rows, largest) for rows in right]
    assert max(swapped) > 0.1


def test_a_seed_makes_the_same_model_and_the_same_examples():
    first, second = random_models.build(7), random_models.build(7)
    assert first.about == second.about
    pairs = zip(tf.nest.flatten(first.subject.x), tf.nest.flatten(second.subject.x), strict=True)
    for mine, other in pairs:
        np.testing.assert_array_equal(mine, other)
    for mine, other in zip(first.subject.weights, second.subject.weights, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_process_that_ends_is_a_crash(monkeypatch):
    monkeypatch.setattr(random_models.sys, "executable", "/bin/false")
    found = list(random_models.outcomes(range(2)))
    assert [outcome.kind for outcome in found] == ["crash", "crash"]
