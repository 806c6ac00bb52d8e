"""Laws of adapters of different methods that are active at once."""

import keras
import numpy as np
import pytest
from models import build
from models import fit
from models import outputs
from models import values
from table import LAYERS
from table import METHODS
from table import randomize
from table import rounding
from test_layers import bound

import keras_peft
from keras_peft import adapter_state
from keras_peft import layer_tree

numpy = keras.ops.convert_to_numpy

# What changes inputs, outputs and variables meets each of the others.
PAIRS = (
    ("lora", "oft-exact"),
    ("ia3", "lora"),
    ("dora", "hra"),
    ("hra", "oft-exact"),
    ("ia3-inputs", "ia3"),
    ("boft", "dora"),
    ("bias", "road"),
    ("bias", "dora"),
    ("ia3", "bias"),
    ("boft", "bias"),
    ("token", "lora"),
    ("dora", "token"),
)
KINDS = (
    "dense-relu",
    "einsum-query",
    "conv2d-pointwise",
    "embedding",
    "reversible-tied",
)
ROWS = [
    pytest.param(pair, LAYERS[kind], id=f"{'-and-'.join(pair)}-{kind}")
    for pair in PAIRS
    for kind in KINDS
    if all(METHODS[name].takes(kind) for name in pair)
]


@pytest.mark.parametrize("pair, row", ROWS)
def test_two_methods_add_up_to_the_sum_of_their_changes(pair, row):
    layer, inputs = row.build()
    total, adapters = {}, []
    rng = np.random.default_rng(1)
    for name, strength in zip(pair, (1.0, 0.5), strict=True):
        method = METHODS[name].make()
        adapter = method.create("layer", layer, name)
        adapter.start()
        for variable in adapter.learned:
            noise = rng.normal(scale=0.5, size=variable.shape)
            variable.assign(numpy(variable) + noise.astype("float32"))
        adapter.strength.assign(strength)
        adapters.append((name, adapter))
    for _, adapter in adapters:
        for variable, change in adapter.deltas():
            _, added = total.get(id(variable), (variable, 0.0))
            total[id(variable)] = variable, added + change
    for name, adapter in adapters:
        layer_tree.attach(layer, name, adapter)
    adapted = row.call(layer, inputs)
    for name, _ in adapters:
        layer_tree.detach(layer, name)
    for variable, change in total.values():
        variable.assign(numpy(variable) + change)
    merged = row.call(layer, inputs)
    # Two changes, of six roundings each, on either side.
    tolerance = bound(row, layer, inputs, merged, "float32", 24)
    assert np.abs(merged - adapted).max() <= tolerance


def _with(model, **methods):
    for name, method in methods.items():
        keras_peft.adapt(model, method, name=name)
        randomize(model, name, scale=0.3)
    keras_peft.set_adapter(model, list(methods))
    return model


TOGETHER = {
    "ia3-and-lora": (keras_peft.IA3(), keras_peft.LoRA(2)),
    "oft-and-norm": (
        keras_peft.OFT(block_size=4, cayley="exact"),
        keras_peft.NormTuning(),
    ),
    "token-and-lora": (
        keras_peft.TokenTuning([1, 5, 7]),
        keras_peft.LoRA(2),
    ),
    "bias-and-dora": (
        keras_peft.BiasTuning(),
        keras_peft.LoRA(2, decompose=True),
    ),
}


@pytest.mark.slice
@pytest.mark.parametrize("methods", TOGETHER.values(), ids=TOGETHER)
def test_two_methods_train_and_merge_together(methods):
    model = _with(build("gpt2"), a=methods[0], b=methods[1])
    leaves = [
        leaf
        for name in "ab"
        for leaf in adapter_state.leaves(model, name).values()
    ]
    learned = [v for leaf in leaves for v in leaf.learned]
    assert {id(v) for v in model.trainable_variables} == set(map(id, learned))
    before = values(learned)
    fit(model, "gpt2", epochs=1)
    moved = [p for p, v in values(learned).items() if (v != before[p]).any()]
    # Softmax ignores what all keys share.
    assert {p for p in before if "key" not in p} <= set(moved)
    adapted = outputs(model, "gpt2")
    keras_peft.merge(model)
    merged = outputs(model, "gpt2")
    # Sums in other orders, 32 terms a layer, 8 layers deep.
    limit = 32 * 8 * rounding("float32") * max(1.0, np.abs(adapted).max())
    assert np.abs(merged - adapted).max() <= limit


@pytest.mark.slice
def test_token_tuning_changes_its_tokens_alone_and_their_logits():
    model = build("gpt2")
    embedding = model.backbone.token_embedding
    tokens = np.arange(20)[None]
    hidden = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
    rows, logits = embedding(tokens), embedding(hidden, reverse=True)
    keras_peft.adapt(model, keras_peft.TokenTuning([3, 11]))
    assert model.peft.adapters["default"].paths == ["backbone.token_embedding"]
    randomize(model)
    changed = numpy(embedding(tokens) != rows)[0].any(axis=-1)
    assert np.flatnonzero(changed).tolist() == [3, 11]
    found = numpy(embedding(hidden, reverse=True) != logits)
    assert np.flatnonzero(found.any(axis=(0, 1))).tolist() == [3, 11]


def test_ia3_finds_its_layers_by_their_roles():
    model = build("bert-classifier")
    keras_peft.adapt(model, keras_peft.IA3())
    leaves = adapter_state.leaves(model, "default")
    inward = [p for p, leaf in leaves.items() if leaf.on_inputs]
    outward = [p for p, leaf in leaves.items() if not leaf.on_inputs]
    assert len(inward) == 2 and len(outward) == 4
    assert all("feedforward_output" in path for path in inward)
    assert all("key" in path or "value" in path for path in outward)
    sizes = [leaf.ia3_scale.shape[0] for leaf in leaves.values()]
    assert sizes == [8, 8, 16] * 2
