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
    """

    worker: str
    environment: str | None = None
    package: str = ""


OURS, FLOORS = "perjac", "floor"
PEERS = {
    OURS: Peer("by_perjac.py"),
    FLOORS: Peer("by_floors.py"),
    "TensorFlow": Peer("by_tensorflow.py"),
    "JAX": Peer("by_jax.py", package="jax"),
    "torch.func": Peer("by_torch_func.py", "torch"),
    "BackPACK": Peer("by_backpack.py", "torch"),
    "Opacus": Peer("by_opacus.py", "torch"),
    "nngeometry": Peer("by_nngeometry.py", "torch"),
    "curvlinops": Peer("by_curvlinops.py", "torch"),
    "Captum": Peer("by_captum.py", "torch"),
    "Xplique": Peer("by_xplique.py", "xplique"),
    "tf-keras-vis": Peer("by_tf_keras_vis.py", "tf-keras-vis"),
}
