"""A few classes of keras-hub a day, through all that takes no export.

Every class has its turn on every backend within some weeks; `tests/zoo/run.py`
holds them all at once. `COVERAGE_DAY`, which stands in the names of the tests,
brings back those of another day of the year.
"""

import datetime
import os

import pytest

from zoo import ZOO
from zoo.run import hold

CLASSES_PER_DAY = 6
COLUMNS = ("targets", "train", "generate", "save", "merge")

TODAY = datetime.datetime.now(datetime.UTC).timetuple().tm_yday
DAY = int(os.environ.get("COVERAGE_DAY", TODAY))
PERIOD = -(-len(ZOO) // CLASSES_PER_DAY)
CASES = [
    pytest.param(case, id=f"{case.name}-day-{DAY}")
    for place, case in enumerate(ZOO.values())
    if place % PERIOD == DAY % PERIOD
]


@pytest.mark.slice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_class_holds_from_adapting_to_merging(case):
    failures = [
        f"{row['column']}: {row.get('trace', row['error'])}"
        for row in hold(case, COLUMNS)
        if "error" in row
    ]
    assert not failures, "\n".join(failures)
