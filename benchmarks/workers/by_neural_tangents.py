"""neural-tangents: the empirical tangent kernel, in each of its ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import serve
from by_jax import forward, given
from serve import Way, Ways, Work

_WAYS = {
    "Jacobian contraction": nt.NtkImplementation.JACOBIAN_CONTRACTION,
    "NTK-vector products": nt.NtkImplementation.NTK_VECTOR_PRODUCTS,
    "structured derivatives": nt.NtkImplementation.STRUCTURED_DERIVATIVES,
}


def ntk(work: Work) -> Ways:
    outputs, weights, x = forward(work), given(work), jnp.asarray(work.x)

    def way(implementation):
        kernel = jax.jit(
            nt.empirical_ntk_fn(
                lambda weights, batch: outputs(weights, batch),
                trace_axes=(), vmap_axes=0, implementation=implementation,
            )
        )  # fmt: skip

        def run():
            return jax.block_until_ready(kernel(x, None, weights))

        # (B, B, C, C)
        return Way(run, lambda found: [np.asarray(found).transpose(0, 2, 1, 3)])

    return {name: way(implementation) for name, implementation in _WAYS.items()}


JOBS = {"ntk": ntk}

if __name__ == "__main__":
    serve.serve(JOBS, {"neural-tangents": nt.__version__})
