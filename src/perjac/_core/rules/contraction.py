"""Operations in which data and weight are multiplied and summed: all are one Einstein sum."""

from __future__ import annotations

import string

import tensorflow as tf

from perjac._core.backend.shapes import batched, known, size
from perjac._core.factors import Factor, Grouped, Outer
from perjac._core.rules.bound import BoundSite, NoRule
from perjac._core.rules.registry import rule


@rule("MatMul")
def matmul(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y = x @ W, so J[b,k,i,o] = Σ_t x[b,t,i] δ[b,k,t,o], t over rows folded into the batch."""
    left = "in" if site.attr("transpose_a") else "ni"
    right = "oi" if site.attr("transpose_b") else "io"
    return _by_operand(site, delta, left, right, "no")


@rule("BatchMatMulV2", "BatchMatMulV3")
def batch_matmul(site: BoundSite, delta: tf.Tensor) -> Factor:
    """y[..., n, o] = Σ_i x[..., n, i] W[..., i, o], the leading axes broadcast."""
    ranks = [t.shape.rank for t in site.op.inputs]
    if None in ranks:
        raise NoRule("the rank of an operand is unknown")
    lead = string.ascii_uppercase[: max(ranks) - 2]
    left = "in" if site.attr("adj_x") else "ni"
    right = "oi" if site.attr("adj_y") else "io"
    return _by_operand(
        site, delta, lead[len(lead) + 2 - ranks[0] :] + left,
        lead[len(lead) + 2 - ranks[1] :] + right, lead + "no",
    )  # fmt: skip


@rule("Einsum")
def einsum(site: BoundSite, delta: tf.Tensor) -> Factor:
    """Any equation of two operands in which each has an axis at most once."""
    inputs, out = site.attr("equation").replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise NoRule(f"an Einsum of {len(terms)} operands")
    free = [c for c in string.ascii_letters if c not in inputs + out]
    counts = [
        t.shape.rank - len(term.replace("...", "")) if "..." in term else 0
        for t, term in zip(site.op.inputs, terms, strict=True)
    ]
    dots = "".join(free[: max(counts)])
    left, right = (
        term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, counts, strict=True)
    )
    return _by_operand(site, delta, left, right, out.replace("...", dots))


def _by_operand(site: BoundSite, delta: tf.Tensor, left: str, right: str, out: str) -> Factor:
    labels = (left, right)
    return contract(site, delta, labels[1 - site.operand], labels[site.operand], out)


def contract(site: BoundSite, delta: tf.Tensor, data: str, weight: str, out: str) -> Factor:
    """Return the factor of out = Σ data · weight, each axis named by a letter.

    An axis of both operands that is summed is I; of the weight alone, O; of the data alone, a
    position T; of all three, a group G. J[g,i,o] = Σ_t data[t,g,i] δ[t,g,o].
    """
    if any(len(set(term)) < len(term) for term in (data, weight, out)):
        raise NoRule(f"an axis repeats in {data},{weight}->{out}")
    x, psi = site.stacked(1 - site.operand), site.weight
    if not psi.shape.is_fully_defined() or not x.shape[1:].is_fully_defined():
        raise NoRule("an operand has an unknown axis other than the batch")
    own = known(psi.shape)
    # Axes of length 1 that broadcast against a longer one belong to the other operand alone.
    x, data = _squeeze(x, data, dict(zip(weight, own, strict=True)))
    layout = site.layout
    lengths = dict(zip(data, x.shape, strict=True))
    kept = [
        (c, n)
        for c, n in zip(weight, own, strict=True)
        if not (n == 1 and c in lengths and lengths[c] != 1)
    ]
    weight, sizes = "".join(c for c, _ in kept), dict(kept)
    layout = layout.reshape([n for _, n in kept])
    if not data or not out or data[0] != out[0] or data[0] in weight:
        raise NoRule("the batch is not the leading axis of the data and the result")
    if any(c not in data + out for c in weight) or any(c not in data + weight for c in out):
        raise NoRule(f"an axis of {data},{weight}->{out} is summed or made by one operand alone")

    groups = [c for c in weight if c in data and c in out]
    inner = [c for c in weight if c in data and c not in out]
    outer = [c for c in weight if c not in data]
    places = [c for c in data[1:] if c in out and c not in weight]
    summed = [data.index(c) for c in data if c not in weight and c not in out]
    if summed:
        x = tf.reduce_sum(x, summed)
        data = "".join(c for c in data if c in weight or c in out)

    lengths |= sizes
    g, i, o = (size(lengths[c] for c in axes) for axes in (groups, inner, outer))
    t = site.fold * size(lengths[c] for c in places)
    x = _arrange(x, data, data[0] + "".join(places + groups + inner))
    # δ is (B, K, F, *out[1:]): name the first three axes so that they stay in front.
    delta = _arrange(delta, "012" + out[1:], "012" + "".join(places + groups + outer))
    count = delta.shape[1] or tf.shape(delta)[1]
    layout = layout.transpose([weight.index(c) for c in groups + inner + outer])
    if not groups:
        return Outer(
            layout.reshape([i, o]),
            batched(x, site.batch, [t, i]),
            batched(delta, site.batch, [count, t, o]),
        )
    return Grouped(
        layout.reshape([g, i, o]),
        batched(x, site.batch, [t, g, i]),
        batched(delta, site.batch, [count, t, g, o]),
    )


def _squeeze(x: tf.Tensor, labels: str, others: dict[str, int]) -> tuple[tf.Tensor, str]:
    """Drop the axes of length 1 that broadcast against a longer axis of the other operand."""
    drop = [n for n, c in enumerate(labels) if n and x.shape[n] == 1 and others.get(c, 1) != 1]
    if not drop:
        return x, labels
    return tf.squeeze(x, drop), "".join(c for n, c in enumerate(labels) if n not in drop)


def _arrange(tensor: tf.Tensor, labels: str, wanted: str) -> tf.Tensor:
    if labels == wanted:
        return tensor
    return tf.transpose(tensor, [labels.index(c) for c in wanted])
