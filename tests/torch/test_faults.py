"""The promises that torch has a part in: see tests/test_faults.py."""

import numpy as np
import pytest

from benches.faults import faults


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.key) for fault in faults() if fault.torch])
def test_holds(fault, tmp_path) -> None:
    reason = fault.needs()
    if reason:
        pytest.skip(reason)
    outcome = fault.run(fault.short, np.random.default_rng(0), tmp_path)
    assert outcome.failures == []
    assert outcome.held == outcome.tried >= fault.short > 0
