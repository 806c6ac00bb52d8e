"""Roles of the layers in the transformer blocks of every family."""

import keras
import pytest
from backbones import BACKBONES

from keras_peft import layer_tree
from keras_peft.blocks import attention_paths
from keras_peft.blocks import find_blocks
from keras_peft.blocks import require
from keras_peft.kernels import kernel_of
from keras_peft.targets import Candidates

ROWS = [pytest.param(row, id=name) for name, row in BACKBONES.items()]


def found(model):
    layers = dict(layer_tree.walk(model))
    return layers, find_blocks(layers)


def attention_roles(blocks):
    return [
        path
        for block in blocks
        for a in block.attention
        for path in (a.query, a.key, a.value, a.fused, a.output)
        if path is not None
    ]


def feed_forward_roles(blocks):
    return [
        path
        for b in blocks
        for path in (*b.feed_forward_inputs, b.feed_forward_output)
        if path is not None
    ]


@pytest.mark.parametrize("row", ROWS)
def test_blocks_have_the_parts_of_their_architecture(row):
    layers, blocks = found(row.build())
    assert len(blocks) == row.blocks
    assert {block.hidden for block in blocks} == {8}
    crosses = [[a.cross for a in block.attention] for block in blocks]
    assert sum(cross == [False, True] for cross in crosses) == row.cross
    assert sum(cross == [False] for cross in crosses) == row.blocks - row.cross
    for block in blocks:
        for attention in block.attention:
            parts = (attention.query, attention.key, attention.value)
            assert all((path is None) == row.fused for path in parts)
            assert (attention.fused is not None) == row.fused
            assert kernel_of(layers[attention.output]).outputs == 8
        if row.experts:
            assert block.feed_forward_output is None
            continue
        assert len(block.feed_forward_inputs) == row.inputs
        output = kernel_of(layers[block.feed_forward_output])
        assert (output.inputs, output.outputs) == (row.width, 8)


@pytest.mark.parametrize("row", ROWS)
def test_every_linear_layer_of_a_block_has_one_role(row):
    layers, blocks = found(row.build())
    roles = attention_roles(blocks) + feed_forward_roles(blocks)
    assert len(roles) == len(set(roles))
    linear = [
        path
        for path, layer in layers.items()
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
        and any(path.startswith(block.path + ".") for block in blocks)
        and not path.endswith(row.others)
    ]
    assert sorted(roles) == sorted(linear)


@pytest.mark.parametrize("row", ROWS)
def test_target_groups_are_the_roles(row):
    model = row.build()
    candidates = Candidates(model, ())
    _, blocks = found(model)

    def group(name):
        return {p for p in candidates.group(name) if not p.endswith(row.others)}

    assert group("attention") == set(attention_roles(blocks))
    assert group("mlp") == set(feed_forward_roles(blocks))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_roles_are_the_same_where_all_sizes_are_equal(name):
    row = BACKBONES[name]
    assert found(row.build(intermediate_dim=8))[1] == found(row.build())[1]


def test_what_a_block_has_not_is_an_error_and_no_shorter_list():
    _, blocks = found(BACKBONES["bert"].build())
    assert require(blocks, "keys") == [
        f"transformer_layers.{n}.self_attention_layer.key_dense" for n in (0, 1)
    ]
    _, experts = found(BACKBONES["mixtral"].build())
    assert len(require(experts, "values")) == 2
    with pytest.raises(ValueError, match="2 of 2 .*feed forward outputs"):
        require(experts, "feed_forward_outputs")
    _, fused = found(BACKBONES["gpt-neox"].build())
    with pytest.raises(ValueError, match="Name layers with `targets`"):
        require(fused, "keys")
    with pytest.raises(ValueError, match="no transformer blocks"):
        require([], "keys")


def test_an_attention_reaches_as_far_as_its_output():
    class InnerAttention(keras.layers.Layer):
        def build(self, shape):
            self.query = keras.layers.Dense(8)
            self.value = keras.layers.Dense(8)
            for dense in (self.query, self.value):
                dense.build(shape)

        def call(self, x):
            return self.query(x) * self.value(x)

    class ConformerAttention(keras.layers.Layer):
        def build(self, shape):
            self.attend = InnerAttention()
            self.attend.build(shape)
            self.post = keras.layers.Dense(8)
            self.post.build(shape)

        def call(self, x):
            return self.post(self.attend(x))

    inputs = keras.Input((None, 8))
    model = keras.Model(inputs, ConformerAttention(name="conformer")(inputs))
    layers = dict(layer_tree.walk(model))
    assert attention_paths(layers) == ["conformer"]
    adapted = Candidates(model, ()).group("attention")
    names = {path.rpartition(".")[2] for path in adapted}
    assert names == {"query", "value", "post"}
