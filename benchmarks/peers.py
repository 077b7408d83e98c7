"""The peers: who they are, which worker speaks for them, and in which environment.

A peer that is known but cannot take part says why, in every table.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library, or TensorFlow's own ways, or the floors.

    Attributes
    ----------
    worker : str
        The file in workers/.
    environment : str or None
        Of `environments.ENVIRONMENTS`; None for the project's own Python.
    package : str
        What must be importable there, where the project's own Python may lack it.
    special : bool
        Whether it was written for such questions, and not for derivatives of any kind.
    """

    worker: str
    environment: str | None = None
    package: str = ""
    special: bool = False


OURS, FLOORS = "perjac", "floor"
PEERS = {
    OURS: Peer("by_perjac.py"),
    FLOORS: Peer("by_floors.py"),
    "TensorFlow": Peer("by_tensorflow.py"),
    "JAX": Peer("by_jax.py", package="jax"),
    "torch.func": Peer("by_torch_func.py", "torch"),
    "BackPACK": Peer("by_backpack.py", "torch", special=True),
    "Opacus": Peer("by_opacus.py", "torch", special=True),
    "nngeometry": Peer("by_nngeometry.py", "torch", special=True),
    "curvlinops": Peer("by_curvlinops.py", "torch", special=True),
    "neural-tangents": Peer("by_neural_tangents.py", "neural-tangents", special=True),
    "Captum": Peer("by_captum.py", "torch", special=True),
    "Xplique": Peer("by_xplique.py", "xplique", special=True),
    "tf-keras-vis": Peer("by_tf_keras_vis.py", "tf-keras-vis", special=True),
}
# Those that take part where programs are carried to: perjac as a program, without TensorFlow.
CARRIED = {
    OURS: Peer("by_program.py", package="jax"),
    FLOORS: Peer("by_card.py", package="jax"),
    **{name: PEERS[name] for name in ("JAX", "torch.func", "BackPACK", "Opacus")},
}
