"""Public names of the room: read by editors and type checkers, and when it is imported."""

from .causal import CausalModel as CausalModel
from .causal import Variable as Variable
from .certify import Certificate as Certificate
from .certify import Certified as Certified
from .certify import certified as certified
from .exported import ExportedModel as ExportedModel
from .exported import exported as exported
from .plant import Planted as Planted
from .plant import planted as planted
from .scoring import TruthScore as TruthScore
from .scoring import ranking_of as ranking_of
from .scoring import score as score
from .truth import Truth as Truth
