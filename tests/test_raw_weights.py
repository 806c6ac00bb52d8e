"""LoRA of kernels that are raw weights of a larger layer."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest
from backbones import BACKBONES
from backbones import inputs
from backbones import outputs
from models import build
from models import fit
from models import outputs as model_outputs
from models import same_bits
from models import values
from table import DTYPES
from table import randomize
from table import rounding
from table import rows

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree
from keras_peft.export.build import build_onnx
from keras_peft.methods.raw_weights import RawLoRAAdapter
from keras_peft.raw_kernels import raw_kernels
from keras_peft.targets import Candidates
from keras_peft.targets import find_head

k = keras.layers
numpy = keras.ops.convert_to_numpy

# -- Layers ------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Experts(keras.layers.Layer):
    """Three experts of a gated network, with banks of biases."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.gate_up = self.add_weight(shape=(3, size, 8), name="gate_up")
        self._bias = self.add_weight(shape=(3, 8), name="gate_up_bias")
        self.down = self.add_weight(shape=(3, 4, size), name="down")

    def call(self, inputs):
        hidden = keras.ops.einsum("td,edh->eth", inputs, self.gate_up)
        hidden = hidden + keras.ops.expand_dims(self._bias, 1)
        gate, up = keras.ops.split(hidden, 2, axis=-1)
        hidden = keras.ops.sigmoid(gate) * up
        return keras.ops.einsum("eth,ehd->etd", hidden, self.down)


@keras.saving.register_keras_serializable(package="tests")
class Table(keras.layers.Layer):
    """A table that is added."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=input_shape[1:], name="table")

    def call(self, inputs):
        return inputs + self.table


ONE, EACH = "ir,ro->io", "eir,ero->eio"


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, and its raw kernels as the formula sees them."""

    make: Callable[[], keras.layers.Layer]
    shape: tuple  # Of an input, the batch included.
    # By kernel: where it is, `(*stack, inputs, outputs)`, and how A and B
    # make a change of it.
    kernels: dict[str, tuple[Callable, tuple, str]]
    slice: bool = False

    def build(self, dtype="float32"):
        """`(layer, inputs)`, all weights random."""
        keras.config.set_dtype_policy(dtype)
        try:
            layer = self.make()
            layer.build(self.shape)
        finally:
            keras.config.set_dtype_policy("float32")
        rng = np.random.default_rng(0)
        for variable in layer.variables:
            if not layer_tree.is_generator(variable):
                noise = rng.normal(scale=0.3, size=variable.shape)
                variable.assign(noise.astype("float32"))
        return layer, rng.normal(size=self.shape).astype("float32")


def cell(path, size, units, gates, at):
    """The two kernels of a recurrent cell."""
    return {
        f"{path}_kernel": (
            lambda layer: at(layer).kernel,
            (size, gates * units),
            ONE,
        ),
        f"{path}_recurrent_kernel": (
            lambda layer: at(layer).recurrent_kernel,
            (units, gates * units),
            ONE,
        ),
    }


def _cell(layer):
    return layer.cell


SEQUENCE = (2, 5, 3)
# Not the orthogonal one, which torch does not have in half precision.
START = dict(recurrent_initializer="zeros")
LAYERS = {
    "lstm": Row(
        lambda: k.LSTM(4, **START),
        SEQUENCE,
        cell("cell", 3, 4, 4, _cell),
        slice=True,
    ),
    "lstm-sequences": Row(
        lambda: k.LSTM(4, **START, return_sequences=True, go_backwards=True),
        SEQUENCE,
        cell("cell", 3, 4, 4, _cell),
    ),
    "lstm-implementation-1": Row(
        lambda: k.LSTM(4, **START, implementation=1, use_cudnn=False),
        SEQUENCE,
        cell("cell", 3, 4, 4, _cell),
    ),
    "lstm-unrolled": Row(
        lambda: k.LSTM(4, **START, unroll=True),
        SEQUENCE,
        cell("cell", 3, 4, 4, _cell),
    ),
    "gru": Row(
        lambda: k.GRU(4, **START),
        SEQUENCE,
        cell("cell", 3, 4, 3, _cell),
        slice=True,
    ),
    "gru-reset-before": Row(
        lambda: k.GRU(4, **START, reset_after=False),
        SEQUENCE,
        cell("cell", 3, 4, 3, _cell),
    ),
    "simple-rnn": Row(
        lambda: k.SimpleRNN(4, **START, activation="relu"),
        SEQUENCE,
        cell("cell", 3, 4, 1, _cell),
    ),
    "rnn": Row(
        lambda: k.RNN(k.LSTMCell(4, **START)),
        SEQUENCE,
        cell("cell", 3, 4, 4, _cell),
    ),
    "rnn-stacked": Row(
        lambda: k.RNN([k.LSTMCell(4, **START), k.GRUCell(2, **START)]),
        SEQUENCE,
        cell("cell_cells_0", 3, 4, 4, lambda layer: layer.cell.cells[0])
        | cell("cell_cells_1", 4, 2, 3, lambda layer: layer.cell.cells[1]),
        slice=True,
    ),
    "bidirectional": Row(
        lambda: k.Bidirectional(k.LSTM(4, **START, return_sequences=True)),
        SEQUENCE,
        cell("forward_layer_cell", 3, 4, 4, lambda la: la.forward_layer.cell)
        | cell(
            "backward_layer_cell", 3, 4, 4, lambda la: la.backward_layer.cell
        ),
        slice=True,
    ),
    "conv-lstm": Row(
        lambda: k.ConvLSTM1D(3, 2, **START),
        (2, 3, 6, 5),
        {
            "cell_kernel": (lambda la: la.cell.kernel, (10, 12), ONE),
            "cell_recurrent_kernel": (
                lambda la: la.cell.recurrent_kernel,
                (6, 12),
                ONE,
            ),
        },
    ),
    "experts": Row(
        Experts,
        (5, 6),
        {
            "gate_up": (lambda layer: layer.gate_up, (3, 6, 8), EACH),
            "down": (lambda layer: layer.down, (3, 4, 6), EACH),
        },
        slice=True,
    ),
    "einsum-experts": Row(
        lambda: k.EinsumDense(
            "etd,edf->etf", (None, 4), bias_axes="f", activation="relu"
        ),
        (3, 5, 6),
        {"kernel": (lambda layer: layer.kernel, (3, 6, 4), EACH)},
    ),
    "einsum-experts-last": Row(
        lambda: k.EinsumDense("etd,dfe->etf", (None, 4)),
        (3, 5, 6),
        {"kernel": (lambda la: la.kernel, (3, 6, 4), "eir,ero->ioe")},
        slice=True,
    ),
    "table": Row(
        Table,
        (2, 5, 6),
        {"table": (lambda layer: layer.table, (5, 6), ONE)},
    ),
}


def attach(layer, scale=0.0, **settings):
    method = keras_peft.LoRA(**{"rank": 2} | settings)
    assert method.accepts(layer)
    assert method.objection("layer", layer) is None
    adapter = method.create_all({"layer": layer}, "default")["layer"]
    adapter.start()
    rng = np.random.default_rng(1)
    for variable in adapter.learned if scale else ():
        noise = rng.normal(scale=scale, size=variable.shape)
        variable.assign(numpy(variable) + noise.astype("float32"))
    layer_tree.attach(layer, "default", adapter)
    return adapter


def call(layer, given):
    return numpy(keras.ops.cast(layer(given), "float32"))


@pytest.mark.parametrize("row", rows(LAYERS))
def test_a_fresh_adapter_leaves_the_outputs_as_they_were(row):
    layer, given = row.build()
    before = call(layer, given)
    attach(layer)
    assert np.array_equal(call(layer, given), before)


@pytest.mark.parametrize("row, dtype", rows(LAYERS, DTYPES))
def test_merged_equals_adapted(row, dtype):
    if dtype == "float16" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 convolutions on processors")
    layer, given = row.build(dtype)
    base = call(layer, given)
    adapter = attach(layer, scale=0.3)
    adapted = call(layer, given)
    deltas = adapter.deltas()
    layer_tree.detach(layer, "default")
    for variable, change in deltas:
        value = numpy(keras.ops.cast(variable, "float32"))
        variable.assign(value + change)
    error = np.abs(call(layer, given) - adapted).max()
    # Both read the same sum, which two libraries round to the last bit: one
    # rounding of each entry, over the terms of a kernel, layer by layer and
    # step by step. All inputs and outputs are below 4.
    terms = sum(kernel.inputs for kernel in adapter.kernels)
    size = max(np.abs(value).max() for value in map(weight, adapter.kernels))
    assert error <= rounding(dtype) * terms * size * 4
    assert np.abs(adapted - base).max() > 4 * error


def weight(kernel):
    return numpy(keras.ops.cast(kernel.variable, "float32"))


@pytest.mark.parametrize("row, dtype", rows(LAYERS, ("float32", "bfloat16")))
def test_the_merged_kernels_are_the_formula(row, dtype):
    layer, _ = row.build(dtype)
    adapter = attach(layer, scale=1.0, alpha=3)
    deltas = {id(variable): change for variable, change in adapter.deltas()}
    assert len(deltas) == len(row.kernels)
    for name, (at, shape, einsum) in row.kernels.items():
        a, b = (numpy(getattr(adapter, f"lora_{name}_{x}")) for x in "ab")
        assert (*a.shape[:-1], b.shape[-1]) == shape
        expected = 1.5 * np.einsum(einsum, a.astype("float64"), b)
        change = deltas[id(at(layer))]
        assert change.dtype == "float32"
        assert change.shape == tuple(at(layer).shape)
        expected = expected.reshape(change.shape)
        # float32 against float64: two products, a sum and a factor.
        tolerance = 4 * rounding("float32") * np.abs(expected).max()
        assert np.abs(change - expected).max() <= tolerance


@pytest.mark.parametrize("row", rows(LAYERS))
def test_the_parameter_count_is_the_formula(row):
    layer, _ = row.build()
    adapter = attach(layer, rank=3)
    expected = sum(
        int(np.prod(stack)) * min(3, i, o) * (i + o)
        for _, (*stack, i, o), _ in row.kernels.values()
    )
    assert sum(int(np.prod(v.shape)) for v in adapter.learned) == expected


@pytest.mark.parametrize("row", rows(LAYERS))
def test_detaching_leaves_no_trace(row):
    layer, given = row.build()
    before, cls, attributes = call(layer, given), type(layer), set(vars(layer))
    variables = list(map(id, layer.variables))
    attach(layer, scale=1.0)
    layer_tree.detach(layer, "default")
    assert type(layer) is cls and set(vars(layer)) == attributes
    assert list(map(id, layer.variables)) == variables
    assert np.array_equal(call(layer, given), before)


# -- Settings ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "experts", "einsum-experts-last"])
@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "loftq"])
def test_other_starts_leave_the_outputs_as_they_were(init, name):
    layer, given = LAYERS[name].build()
    before = call(layer, given)
    adapter = attach(layer, init=init)
    # What is subtracted is the same product, of the same numbers.
    assert np.array_equal(call(layer, given), before)
    parts = 1 if init == "gaussian" else 2
    assert len(adapter.kept) == 2 * parts * len(adapter.kernels)
    assert len(adapter.learned) == 2 * len(adapter.kernels)


def test_pissa_starts_from_the_leading_part_of_every_expert():
    layer, _ = LAYERS["experts"].build()
    adapter = attach(layer, init="pissa", alpha=3)
    a, b = numpy(adapter.lora_down_a), numpy(adapter.lora_down_b)
    left, sizes, right = np.linalg.svd(numpy(layer.down))
    best = left[..., :2] * sizes[:, None, :2] @ right[:, :2]
    # A few roundings of float32, of matrices with entries below 1.
    assert np.abs(1.5 * a @ b - best).max() < 16 * rounding("float32")


def test_an_orthogonal_start_is_the_base_up_to_rounding():
    layer, given = LAYERS["experts"].build()
    before = call(layer, given)
    adapter = attach(layer, init="orthogonal")
    assert np.abs(numpy(adapter.lora_down_a)).min() > 0
    # Products of A and B, entries below 1, that cancel up to rounding.
    assert np.abs(call(layer, given) - before).max() < 32 * rounding("float32")


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(dropout=0.1), "`dropout`"),
        (dict(decompose=True), "`decompose`"),
        (dict(use_bias=True), "`use_bias`"),
        (dict(init="eva"), "init='eva'"),
        (dict(rank=5), "rank 5 is larger .*'cell_kernel': 3"),
        (dict(init="orthogonal", rank=2), "needs a rank of 2.*cell_kernel"),
    ],
)
def test_settings_that_cannot_act_are_refused(settings, reason):
    size = 1 if settings.get("init") == "orthogonal" else 3
    model = keras.Sequential([keras.Input((5, size)), k.LSTM(4), k.Dense(4)])
    before = values(model.variables)
    data = {}
    if settings.get("init") == "eva":
        data = {"calibration": np.ones((8, 5, 3), "float32")}
    with pytest.raises(ValueError, match=f"`lstm`.*{reason}"):
        keras_peft.adapt(model, keras_peft.LoRA(**settings), **data)
    assert not adapter_state.is_adapted(model)
    assert same_bits(before, values(model.variables))


@pytest.mark.parametrize("rank", [4, 8])
def test_small_kernels_get_the_rank_they_allow(rank):
    # The second layer allows 8, so that the first is no error either.
    layers = [k.LSTM(4, return_sequences=True), k.LSTM(8), k.Dense(3)]
    model = keras.Sequential([keras.Input((5, 1)), *layers])
    keras_peft.adapt(model, keras_peft.LoRA(rank))
    (a, _), (recurrent_a, _) = layers[0].adapters["default"].pairs
    assert (a.shape, recurrent_a.shape) == ((1, 1), (4, 4))
    (a, _), (recurrent_a, _) = layers[1].adapters["default"].pairs
    assert (a.shape, recurrent_a.shape) == ((4, 4), (8, rank))
    assert layers[2].adapters["default"].rank == 3


@pytest.mark.parametrize("name", ["lstm", "experts", "table"])
def test_other_methods_refuse_raw_weights(name):
    layer, _ = LAYERS[name].build()
    for method in (keras_peft.LoHa, keras_peft.IA3, keras_peft.SHiRA):
        assert not method().accepts(layer)


# -- What is as outside, while kernels stand for sums ------------------------


@pytest.mark.slice
def test_states_and_random_generators_go_on():
    def states(adapted):
        keras.utils.set_random_seed(0)
        layer = k.GRU(4, stateful=True, dropout=0.5, recurrent_dropout=0.5)
        layer.build((2, 5, 3))
        if adapted:
            attach(layer)
        given = np.random.default_rng(0).normal(size=SEQUENCE)
        found = [numpy(layer(given, training=True)) for _ in range(3)]
        kept = [v for v in layer.variables if not v.trainable]
        return [*found, *(numpy(s) for s in layer.states)], len(kept)

    base, _ = states(adapted=False)
    again, _ = states(adapted=True)
    assert np.abs(base[1] - base[0]).max() > 0
    for one, other in zip(base, again, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slice
def test_losses_of_layers_inside_are_kept():
    def losses(adapted):
        layer = k.Bidirectional(k.LSTM(4, activity_regularizer="l2"))
        model = keras.Sequential([keras.Input((5, 3)), layer])
        for number, variable in enumerate(layer.trainable_variables):
            variable.assign(np.full(variable.shape, 0.1 * (number + 1)))
        if adapted:
            keras_peft.adapt(model, keras_peft.LoRA(rank=2))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        given = np.random.default_rng(0).normal(size=SEQUENCE)
        target = np.zeros((2, 8))
        fitted = model.fit(given, target, verbose=0).history["loss"]
        model(given)
        return [*fitted, *(float(numpy(loss)) for loss in model.losses)]

    base = losses(adapted=False)
    assert len(base) == 3
    # Whichever layer they are listed under.
    expected = pytest.approx(sorted(base), rel=1e-6)
    assert sorted(losses(adapted=True)) == expected


@pytest.mark.slice
@pytest.mark.parametrize("name", ["lstm-implementation-1", "bidirectional"])
def test_sums_are_formed_once_per_call_and_not_per_step(name, monkeypatch):
    layer, given = LAYERS[name].build()
    attach(layer)
    calls = []
    additions = RawLoRAAdapter.additions

    def counted(self):
        calls.append(self)
        return additions(self)

    monkeypatch.setattr(RawLoRAAdapter, "additions", counted)
    layer(given)
    assert len(calls) == 1


@pytest.mark.slice
def test_masked_steps_are_left_out_as_in_the_merged_layer():
    layer, given = LAYERS["bidirectional"].build()
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    adapter = attach(layer, scale=1.0)
    adapted = numpy(layer(given, mask=mask))
    moved = given.copy()
    moved[1, 3:] += 1.0
    assert np.array_equal(numpy(layer(moved, mask=mask)), adapted)
    deltas = adapter.deltas()
    layer_tree.detach(layer, "default")
    for variable, change in deltas:
        variable.assign(numpy(variable) + change)
    merged = numpy(layer(given, mask=mask))
    # The bound of `test_merged_equals_adapted`, weights below 8.
    assert np.abs(merged - adapted).max() <= rounding("float32") * 14 * 32


# -- Which layers ------------------------------------------------------------


def test_a_recurrent_layer_stands_for_its_cells_and_directions():
    model = build("recurrent")
    method = keras_peft.LoRA(rank=2)
    candidates = Candidates(model, [], method.accepts)
    assert list(candidates.adaptable) == [
        "embedding",
        "bidirectional",
        "rnn",
        "dense",
    ]
    expected = ["bidirectional", "rnn", "dense"]
    assert candidates.default() == candidates.group("all-linear") == expected
    with pytest.raises(ValueError, match="matches 'forward_layer'"):
        keras_peft.adapt(model, method, targets="forward_layer")


def _qwen3_moe():
    import keras_hub

    return keras_hub.models.Qwen3MoeBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        head_dim=6,
        intermediate_dim=12,
        moe_intermediate_dim=10,
        num_experts=3,
        top_k=2,
    )


def _rwkv7():
    import keras_hub

    return keras_hub.models.RWKV7Backbone(
        hidden_size=8,
        head_size=4,
        num_layers=2,
        vocabulary_size=20,
        intermediate_dim=12,
        gate_lora=5,
        mv_lora=3,
        aaa_lora=6,
        decay_lora=7,
    )


# Models, the end of the paths of their raw weights, and those weights.
FAMILIES = {
    "mixtral": (
        BACKBONES["mixtral"].build,
        "mlp",
        "._sparse_moe_block.expert_bank",
        ("gate_dense", "intermediate_dense", "output_dense"),
    ),
    "qwen-moe": (
        BACKBONES["qwen-moe"].build,
        "mlp",
        ".mlp.expert_bank",
        ("gate_dense", "output_dense"),
    ),
    "qwen3-moe": (
        _qwen3_moe,
        "mlp",
        ".mlp.expert_bank",
        ("gate_dense", "output_dense"),
    ),
    "gpt-oss": (
        BACKBONES["gpt-oss"].build,
        "mlp",
        ".sparse_moe_block.experts",
        ("gate_up_proj", "down_proj"),
    ),
    "rwkv7": (
        _rwkv7,
        "attention",
        ".att",
        ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"),
    ),
}


@pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_adapt_their_raw_weights_and_no_router(name):
    make, group, suffix, weights = FAMILIES[name]
    model = make()
    candidates = Candidates(model, find_head(model), keras_peft.LoRA().accepts)
    paths = [p for p in candidates.group(group) if p.endswith(suffix)]
    assert len(paths) == 2
    assert {*paths} <= {*candidates.default()}
    # The first layer of RWKV has no value to mix with.
    found = [kernel.name for kernel in raw_kernels(candidates.layers[paths[1]])]
    assert len(found) == len(weights)
    assert all(n.endswith(w) for n, w in zip(found, weights, strict=True))
    for path in candidates.routers:
        assert path in candidates.adaptable
        assert path not in candidates.group("all-linear")
        assert candidates.matching(path.rpartition(".")[2])
    words = ("router", "sparse_feedforward_gate", "shared_expert_gate")
    routers = [p for p in candidates.layers if p.endswith("_dense")]
    routers = {p for p in routers if any(w in p for w in words)}
    assert candidates.routers == routers


def spread(model):
    """Matrices that all matter."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if len(variable.shape) > 1:
            noise = rng.normal(scale=0.3, size=variable.shape)
            variable.assign(noise.astype("float32"))


@pytest.mark.moved
@pytest.mark.filterwarnings("ignore:The 'rwkv_ops' package")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_train_merge_and_come_back(name, tmp_path):
    make, *_ = FAMILIES[name]
    model = make()
    given = inputs(model)
    spread(model)
    plain = values(model.variables)
    before = outputs(model, given)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    assert np.array_equal(outputs(model, given), before)
    randomize(model, scale=0.1)
    trained = values(model.trainable_variables)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    targets = keras.tree.map_structure(numpy, model(given))
    targets = keras.tree.map_structure(lambda t: t + 1.0, targets)
    keras.Model.fit(model, given, targets, epochs=2, verbose=0)
    moved = values(model.trainable_variables)
    adapted = outputs(model, given)
    assert not [p for p in trained if np.array_equal(trained[p], moved[p])]
    keras_peft.save_adapter(model, tmp_path / "adapter")
    report = keras_peft.merge(model)
    assert 0 <= report.worst[1] < 1e-4
    merged = outputs(model, given)
    # Of products summed in other orders: 32 terms a layer, 8 layers deep.
    close = 32 * 8 * rounding("float32") * max(1.0, np.abs(adapted).max())
    assert np.abs(merged - adapted).max() <= close
    assert np.abs(merged - before).max() > close
    keras_peft.unmerge(model)
    assert np.array_equal(outputs(model, given), adapted)
    keras_peft.remove(model)
    assert same_bits(plain, values(model.variables))
    keras_peft.load_adapter(model, tmp_path / "adapter")
    assert np.array_equal(outputs(model, given), adapted)


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize(
    "name, target, weight",
    [
        ("t5", "encoder_transformer_layers.0.self_attention", "bias"),
        ("deberta-v3", "relative_embeddings", "rel_embeddings"),
        ("bert", "position_embedding", "position_embeddings"),
    ],
)
def test_a_table_is_adapted_where_it_is_named(name, target, weight):
    model = BACKBONES[name].build()
    given = inputs(model)
    method = keras_peft.LoRA(rank=2)
    candidates = Candidates(model, find_head(model), method.accepts)
    assert target in candidates.adaptable
    assert target not in candidates.default()
    spread(model)
    before = outputs(model, given)
    keras_peft.adapt(model, method, targets=target)
    randomize(model, scale=1.0)
    (leaf,) = adapter_state.leaves(model, "default").values()
    (kernel,) = leaf.kernels
    assert kernel.name.endswith(weight)
    adapted = outputs(model, given)
    assert np.abs(adapted - before).max() > 1e-3
    keras_peft.merge(model)
    # 32 terms a layer, 8 layers deep, of outputs below 4.
    limit = 32 * 8 * 4 * rounding("float32")
    assert np.abs(outputs(model, given) - adapted).max() <= limit


# -- With the rest -----------------------------------------------------------


def test_strengths_add_up():
    model = build("recurrent")
    base = model_outputs(model, "recurrent")
    for name in ("one", "two"):
        keras_peft.adapt(model, keras_peft.LoRA(rank=2), name=name)
        randomize(model, name)
    keras_peft.set_adapter(model, {"one": 0.5, "two": -0.5})
    # Both got the same numbers beside their own starts.
    for path in ("bidirectional", "rnn"):
        layer = dict(layer_tree.walk(model))[path]
        one, two = layer.adapters["one"], layer.adapters["two"]
        changes = zip(one.deltas(), two.deltas(), strict=True)
        for (variable, first), (_, second) in changes:
            assert first.shape == tuple(variable.shape)
            assert np.abs(first).max() > 0 > -np.abs(second).max()
    mixed = model_outputs(model, "recurrent")
    keras_peft.merge(model)
    merged = model_outputs(model, "recurrent")
    limit = 32 * 8 * rounding("float32") * max(1.0, np.abs(mixed).max())
    assert np.abs(merged - mixed).max() <= limit
    keras_peft.unmerge(model)
    with keras_peft.disabled(model):
        assert np.array_equal(model_outputs(model, "recurrent"), base)


@pytest.mark.moved
@pytest.mark.parametrize("optimizer", ["LoRAPlus", "LoRAFA"])
@pytest.mark.parametrize("name", ["recurrent", "mixtral"])
def test_optimizers_know_the_factors(name, optimizer):
    model = build(name)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    before = values(model.trainable_variables)
    kind = getattr(keras_peft.optimizers, optimizer)
    raw = [
        leaf
        for leaf in adapter_state.leaves(model, "default").values()
        if isinstance(leaf, RawLoRAAdapter)
    ]
    fit(model, name, optimizer=kind(0.01))
    for a, b in (pair for leaf in raw for pair in leaf.pairs):
        stays = np.array_equal(numpy(a), before[a.path])
        assert stays == (optimizer == "LoRAFA")
        change = np.abs(numpy(b) - before[b.path])
        assert change.max() > 0 and np.isfinite(change).all()


def test_what_cannot_hold_raw_weights_says_so(tmp_path):
    model = build("mixtral")
    method = keras_peft.LoRA(rank=2)
    keras_peft.adapt(model, method)
    keras_peft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="raw weights.*expert_bank"):
        folders = [tmp_path / "adapter"] * 2
        keras_peft.combine_adapters(folders, [0.5, 0.5], tmp_path / "both")
    with pytest.raises(ValueError, match="expert_bank.*no name there"):
        keras_peft.save_adapter(model, tmp_path / "peft", format="peft")
    # Also where nothing has changed yet.
    with pytest.raises(ValueError, match="one matrix.*expert_bank"):
        keras_peft.to_lora(model)
    with pytest.raises(ValueError, match="rows of a batch"):
        with keras_peft.adapter_names(model, ["default", None]):
            pass


def test_extracting_reports_what_raw_weights_changed():
    base, tuned = build("mixtral"), build("mixtral")
    layer = tuned.backbone.transformer_layers[0]
    bank = layer._sparse_moe_block.expert_bank
    weight = bank._expert_feedforward_output_dense
    weight.assign(weight * 2.0)
    dense = layer._self_attention_layer.query_dense
    dense.kernel.assign(dense.kernel * 2.0)
    report = keras_peft.extract_lora(base, tuned, rank=8)
    (path,) = report.left_out
    assert path.endswith("expert_bank.expert_feedforward_output_dense")
    assert report.left_out[path] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.slice
@pytest.mark.parametrize(
    "make", [lambda: k.LSTM(8), lambda: k.Bidirectional(k.GRU(4))]
)
def test_a_layer_by_hand_trains_and_is_saved(make, tmp_path):
    layer = keras_peft.layers.LoRA(make(), rank=4)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            k.Embedding(20, 6, mask_zero=True),
            layer,
            k.Dense(3),
        ]
    )
    base = values(layer.layer.variables)
    fit(model, "recurrent")
    after = values(layer.layer.variables)
    factors = [path for path in base if "/lora_" in path]
    assert len(factors) == len(layer.trainable_variables) > 0
    for path, value in base.items():
        assert np.array_equal(value, after[path]) == (path not in factors)
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    expected = model_outputs(model, "recurrent")
    assert np.array_equal(model_outputs(other, "recurrent"), expected)


@pytest.mark.slow
def test_a_merged_recurrent_model_is_exported():
    model = build("recurrent")
    keras_peft.adapt(model, keras_peft.LoRA(rank=2))
    randomize(model)
    keras_peft.merge(model)
    (exact,) = build_onnx(model).verification
    # The bound counts roundings (comparison.rounding_bound).
    assert exact.relative <= exact.tolerance < 1e-3
