"""The promises of docs/reliability.md, each under a short form of the faults that ``make faults`` injects in full."""

import re
from pathlib import Path

import numpy as np
import pytest

from benches.faults import faults

KNOWN = faults()
ROOT = Path(__file__).resolve().parent.parent


def parameters(torch: bool) -> list:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(fault, id=fault.key, marks=marks[fault.slow]) for fault in KNOWN if fault.torch is torch]


def check(fault, folder: Path) -> None:
    reason = fault.needs()
    if reason:
        pytest.skip(reason)
    outcome = fault.run(fault.short, np.random.default_rng(0), folder)
    assert outcome.failures == []
    assert outcome.held == outcome.tried >= fault.short > 0


@pytest.mark.parametrize("fault", parameters(torch=False))
def test_holds(fault, tmp_path):
    check(fault, tmp_path)


def test_every_fault_has_a_name_of_its_own():
    assert len({fault.key for fault in KNOWN}) == len(KNOWN)
    assert all(re.fullmatch(r"R\d+", fault.id) for fault in KNOWN)
    assert all(fault.full >= fault.short for fault in KNOWN)
