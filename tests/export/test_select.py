import graphs
import numpy as np

from keras_peft.export.passes import plain_gather
from keras_peft.export.passes import rewriting
from keras_peft.export.passes import select

SUM = """g (float[a, b] x, float[a, b] z) => (float[a, b] y) {
    condition = Less(x, z)
    opposite = Not(OF)
    chosen = Cast <to = 1> (condition)
    other = Cast <to = 1> (opposite)
    first = Mul(chosen, x)
    second = Mul(z, other)
    y = Add(second, first)
}"""
LOOK_UP = """g (int32[a, b] ids) => (float[a, b, 3] y) {
    as_float = Cast <to = 1> (ids)
    negative = Less(as_float, zero)
    wrapped = Add(ids, rows)
    opposite = Not(negative)
    chosen = Cast <to = 6> (negative)
    other = Cast <to = 6> (opposite)
    first = Mul(chosen, wrapped)
    second = Mul(ids, other)
    index = Add(first, second)
    y = Gather(table, index)
}"""


def test_a_sum_of_masked_terms_becomes_a_selection():
    model = graphs.graph(SUM.replace("OF", "condition"))
    inputs = {"x": graphs.random(3, 4), "z": graphs.random(3, 4, seed=1)}
    want = graphs.run(model, **inputs)
    assert select.apply(model) == 1
    rewriting.drop_unused(model)
    assert graphs.ops(model) == {"Less": 1, "Where": 1}
    np.testing.assert_array_equal(graphs.run(model, **inputs), want)


def test_terms_with_unrelated_masks_are_left_alone():
    text = SUM.replace("OF", "unrelated").replace(
        "opposite =", "unrelated = Less(z, x)\n    opposite ="
    )
    assert select.apply(graphs.graph(text)) == 0


def test_ids_of_a_graph_by_tensorflow_reach_the_table_directly():
    model = graphs.graph(
        LOOK_UP,
        zero=np.float32(0),
        rows=np.int32(5),
        table=graphs.random(5, 3),
    )
    ids = np.array([[0, 4, -1], [-5, 2, 3]], "int32")
    want = graphs.run(model, ids=ids)
    assert select.apply(model) == 1
    assert plain_gather.apply(model) == 1
    rewriting.drop_unused(model)
    assert graphs.ops(model) == {"Gather": 1}
    np.testing.assert_array_equal(graphs.run(model, ids=ids), want)
