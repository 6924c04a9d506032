"""What tests of native kernels have in common."""

import pytest

from r1ray.ops import native
from tests.requirements import needs

__all__ = ["ISAS", "needs_native"]

needs_native = needs(native.is_available(), native.describe())
ISAS = [pytest.param(isa, id=native.ISA_NAMES[isa]) for isa in range(native.best_isa() + 1)]
