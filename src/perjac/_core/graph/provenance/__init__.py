"""Which example each entry of a traced graph belongs to, derived from the graph alone.

`analysis` walks back from an output; the rules, a file for each family of operations, say what one
operation does to the owners of its results; `frames` lays the graph out for a size of batch.
"""

from perjac._core.graph.provenance.analysis import Order, Provenance, analyse

__all__ = ["Order", "Provenance", "analyse"]
