"""What `perjac gradients` keeps of each batch: everything, norms or projections → arrays by name.

Also the few lines that sum all batches up. Knows nothing of files.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perjac._core.factors.random_projection import KINDS
from perjac._rows import group_of
from perjac.errors import InputError

_HARDEST = 5


@dataclasses.dataclass(frozen=True)
class Keep:
    """What is kept of per-example gradients.

    Attributes
    ----------
    what : {"full", "norms", "project"}
        Every number; the norms of whole gradients and by layer; or random projections.
    dim, seed, kind : int, int, str
        Of the projections.
    """

    what: str
    dim: int = 0
    seed: int = 0
    kind: str = "gaussian"

    @property
    def told(self) -> str:
        """What is written, in words."""
        if self.what == "project":
            return f"the gradients' projections to {self.dim} numbers, and the losses,"
        return {"full": "the gradients and losses", "norms": "the gradients' norms and losses"}[
            self.what
        ]

    @classmethod
    def read(cls, text: str, seed: int, kind: str) -> Keep:
        """Read "full", "norms" or "project:DIM".

        Raises
        ------
        InputError
            If it is nothing of the kind.

        Examples
        --------
        >>> from perjac.cli.keep import Keep
        >>> Keep.read("project:512", 0, "sparse").dim
        512
        """
        if text in ("full", "norms"):
            return cls(text)
        if kind not in KINDS:
            raise InputError(f"Expected --kind as one of {', '.join(KINDS)}. Received: {kind!r}.")
        parts = re.fullmatch(r"project:0*([1-9][0-9]*)", text)
        if not parts:
            raise InputError(
                "Expected --keep full, norms or project:DIM, for example project:512. "
                f"Received: {text!r}."
            )
        return cls("project", int(parts[1]), seed, kind)

    def arrays(self, grads: Any) -> Mapping[str, Any]:
        """Return what is kept of a batch: arrays (B, ...), each formed when it is looked up."""
        losses = {"losses": grads.losses}
        if self.what == "full":
            return collections.ChainMap(losses, grads)
        if self.what == "norms":
            by_layer = grads.norms(per="layer")
            return {
                "norms": grads.norms(),
                "layer_norms": np.stack([np.asarray(by_layer[n]) for n in _layers(grads)], 1),
                **losses,
            }
        return {"projection": grads.project(self.dim, seed=self.seed, kind=self.kind), **losses}

    def facts(self, grads: Any) -> dict[str, Any]:
        """Return what a reader of the arrays has to know."""
        if self.what == "norms":
            return {"keep": self.what, "layers": _layers(grads)}
        if self.what == "project":
            return {"keep": self.what, "dim": self.dim, "seed": self.seed, "kind": self.kind}
        return {"keep": self.what}


def _layers(grads: Any) -> list[str]:
    return list(dict.fromkeys(group_of(key, "layer") for key in grads))


class Summary:
    """A few lines on all examples: how long their gradients are, and the hardest of them.

    Parameters
    ----------
    names : sequence of str
        What each example is called.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._norms: list[np.ndarray] = []
        self._losses: list[np.ndarray] = []

    def add(self, grads: Any) -> None:
        """Take note of the next batch."""
        self._norms.append(np.asarray(grads.norms()))
        self._losses.append(np.asarray(grads.losses))

    def lines(self) -> list[str]:
        """Return what there is to say, by the line."""
        names, norms, losses = (
            self._names,
            np.concatenate(self._norms),
            np.concatenate(self._losses),
        )
        finite = np.isfinite(norms)
        said = []
        if not finite.all():
            odd = [names[int(n)] for n in np.flatnonzero(~finite)]
            more = ", …" if len(odd) > _HARDEST else ""
            said.append(f"Not finite: {len(odd)} gradients, {', '.join(odd[:_HARDEST])}{more}.")
        if not finite.any():
            return said
        hardest = [n for n in np.argsort(-norms, kind="stable") if finite[n]][:_HARDEST]
        width = max(len(names[int(n)]) for n in hardest)
        return [
            *said,
            f"Gradient norms: median {np.median(norms[finite]):.3g}, "
            f"largest {norms[finite].max():.3g}. Mean loss: {losses[finite].mean():.3g}.",
            "Hardest examples, by the norm:",
            *(
                f"  {names[int(n)]:<{width}}  norm {norms[n]:<8.3g}  loss {losses[n]:.3g}"
                for n in hardest
            ),
        ]
