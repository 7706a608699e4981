"""Models whose refusal circuit is known, and the scoring of found circuits against the truth."""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "causal": ["CausalModel", "Variable"],
        "certify": ["Certificate", "Certified", "certified"],
        "plant": ["Planted", "planted"],
        "scoring": ["TruthScore", "ranking_of", "score"],
        "truth": ["Truth"],
    },
)

if TYPE_CHECKING:
    from mechsafety.testbed.causal import CausalModel, Variable
    from mechsafety.testbed.certify import Certificate, Certified, certified
    from mechsafety.testbed.plant import Planted, planted
    from mechsafety.testbed.scoring import TruthScore, ranking_of, score
    from mechsafety.testbed.truth import Truth
