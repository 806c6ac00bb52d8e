"""The target groups of every class find what its architecture has."""

import types

import keras
import pytest

from zoo import ZOO
from zoo import columns

# One backend is enough to count layers, and the one that builds fastest.
pytestmark = pytest.mark.moved

CASES = [
    case for case in ZOO.values() if keras.config.backend() not in case.unable
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_hold_what_the_architecture_has(case):
    columns.targets(types.SimpleNamespace(case=case, model=case.build()))
