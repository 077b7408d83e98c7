"""Questions about data: which examples are hard, typical, mislabelled, alike, or to blame."""

from perjac.data.checkpoints import at_checkpoints
from perjac.data.influence import tracin, trak
from perjac.data.label_errors import Suspects, label_errors
from perjac.data.neighbours import Neighbours, similar
from perjac.data.ranking import Ranking, hardest, typical

__all__ = [
    "Neighbours",
    "Ranking",
    "Suspects",
    "at_checkpoints",
    "hardest",
    "label_errors",
    "similar",
    "tracin",
    "trak",
    "typical",
]
