import graphs
import numpy as np
import pytest

from keras_peft.export.passes import plain_gather

LOOK_UP = """g (int32[a, b] ids) => (float[a, b, 3] y) {
    long = Cast <to = 7> (ids)
    negative = Less(long, zero)
    wrapped = Add(long, rows)
    index = Where(negative, wrapped, long)
    y = Gather(table, index)
}"""


def test_ids_reach_the_table_directly():
    model = graphs.graph(
        LOOK_UP, zero=np.int64(0), rows=np.int64(5), table=graphs.random(5, 3)
    )
    ids = np.array([[0, 4, -1], [-5, 2, 3]], "int32")
    want = graphs.run(model, ids=ids)
    assert plain_gather.apply(model) == 1
    assert model.graph.outputs[0].producer().inputs[1].name == "ids"
    np.testing.assert_array_equal(graphs.run(model, ids=ids), want)


@pytest.mark.parametrize(("zero", "rows"), [(1, 5), (0, 4)])
def test_any_other_selection_is_left_alone(zero, rows):
    model = graphs.graph(
        LOOK_UP,
        zero=np.int64(zero),
        rows=np.int64(rows),
        table=graphs.random(5, 3),
    )
    assert plain_gather.apply(model) == 0
