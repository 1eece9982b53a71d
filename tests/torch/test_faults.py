"""The promises that torch has a part in: see tests/test_faults.py."""

import pytest

from tests.test_faults import check, parameters


@pytest.mark.parametrize("fault", parameters(torch=True))
def test_holds(fault, tmp_path) -> None:
    check(fault, tmp_path)
