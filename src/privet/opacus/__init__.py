"""Opacus's public names over privet's core: a script changes its imports, and nothing else.

Paths, signatures, return orders and exceptions are those of Opacus 1.6. Where Opacus does less than it promises, this
package keeps the promise and warns (`OpacusPrivacyWarning`). See docs/coming_from_opacus.md.
"""

from privet.opacus import utils
from privet.opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from privet.opacus.privacy_engine import PrivacyEngine
from privet.opacus.warning import OpacusPrivacyWarning

__all__ = [
    "GradSampleModule",
    "GradSampleModuleFastGradientClipping",
    "OpacusPrivacyWarning",
    "PrivacyEngine",
    "__version__",
    "utils",
]

__version__ = "1.6.0"
"""The version of Opacus whose names these are."""
