"""Fisher information and curvature: its kinds, forms, and what is done with them."""

from perjac.fisher.blocks import BlockForm
from perjac.fisher.form import Form
from perjac.fisher.implicit import Implicit
from perjac.fisher.information import Fisher
from perjac.fisher.low_rank import LowRank

__all__ = ["BlockForm", "Fisher", "Form", "Implicit", "LowRank"]
