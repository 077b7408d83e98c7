"""The jobs: what each answer is, in the layout that all peers bring it to before it is compared.

A weight's axes are Keras's: (inputs, outputs) of a dense layer, (height, width, inputs, outputs) of
a convolution; pictures have their channels last. B examples, C outputs. Must not import anything
heavy: every peer's process reads it.
"""

from __future__ import annotations

import dataclasses

# The questions to the machine rather than to a library.
FILL, PLAIN, COPY = "memory filled", "one batch gradient", "memory copied"
STEPS = SAMPLES = 50
SIGMA = 0.15


@dataclasses.dataclass(frozen=True)
class Job:
    """A question.

    Attributes
    ----------
    title : str
        What the tables call it.
    examples : int or None
        How many, where it is not the model's own number.
    tolerance : float
        How far answers may be from perjac's, relative to their norm.
    correlation : float or None
        For answers made of other random numbers: how much they must go along with perjac's.
    """

    title: str
    examples: int | None = None
    tolerance: float = 1e-4
    correlation: float | None = None


JOBS = {
    # Every weight: (B, C, *weight).
    "weights": Job("weight Jacobian"),
    # (B, C, *input).
    "inputs": Job("input Jacobian"),
    # Frobenius, of all weights together: (B,).
    "jacobian_norms": Job("norms of weight Jacobians"),
    # Of the cross-entropy of labels, from logits: every weight, (B, *weight).
    "gradients": Job("per-example gradients"),
    # (B,).
    "gradient_norms": Job("gradient norms"),
    # Each example's gradient clipped to norm 1, added up: every weight.
    "clipped_sum": Job("clipped sum"),
    # Of the mean cross-entropy's generalised Gauss-Newton matrix: every weight.
    "ggn_diagonal": Job("GGN diagonal"),
    # A and B of every matrix's A ⊗ B, exact, "expand": each over its trace; the traces' product.
    "kfac": Job("KFAC factors", tolerance=1e-3),
    # J Jᵀ over all weights: (B, C, B, C).
    "ntk": Job("tangent kernel"),
    # From zero to the example, of its label's logit: (B, *input).
    "integrated_gradients": Job("integrated gradients", examples=32, tolerance=1e-3),
    # The same logit's gradient, averaged under noise of standard deviation SIGMA: (B, *input).
    "smoothgrad": Job("SmoothGrad", examples=32, correlation=0.9),
}
CLIP = 1.0
