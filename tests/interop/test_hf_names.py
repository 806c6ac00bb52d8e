"""Names and layouts that are read off keras-hub's converters."""

import keras
import numpy as np
import pytest
import transformers
from families import DECODER
from families import ENCODER
from families import FAMILIES
from families import IMAGE
from families import ours
from keras_hub.src.utils.transformers import preset_loader

from keras_peft.hf_layout import Layouts
from keras_peft.hf_layout import Part
from keras_peft.hf_layout import Ported
from keras_peft.hf_names import Names
from keras_peft.kernels import kernel_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_is_a_block_of_a_live_module(name, peers):
    """And the block holds the kernel's values, entry by entry."""
    peer, folder = peers[name]
    model = ours(name, folder)
    names, modules = Names(model), dict(peer.named_modules())
    assert names.prefix == peer.base_model_prefix or not names.wrapped
    for path in names.kernels:
        part = names.part(path)
        live = names.live(part.module)
        weight = modules[live].weight.detach().numpy()
        assert weight.shape == part.shape
        assert names.find(live) == part.module
        if part.module in names.heads.values():
            continue  # keras-hub does not read it.
        rows = weight.reshape(len(weight), -1)
        matrix = rows if part.transposed else rows.T
        block = matrix[np.ix_(part.inputs, part.outputs)]
        assert np.array_equal(block, kernel_of(names.layers[path]).read())


MORE = {
    "deit": ("DeiTConfig", IMAGE),
    "esm": (
        "EsmConfig",
        ENCODER | dict(position_embedding_type="rotary", token_dropout=False),
    ),
    "qwen_moe": (
        "Qwen2MoeConfig",
        DECODER
        | dict(
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            sliding_window=32,
        ),
    ),
    "swin_transformer": (
        "SwinConfig",
        dict(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
    ),
}


@pytest.mark.parametrize("family, row", MORE.items(), ids=MORE)
def test_names_of_more_families(family, row):
    config = getattr(transformers, row[0])(**row[1])
    peer = transformers.AutoModel.from_config(config)
    converter = getattr(preset_loader, f"convert_{family}")
    settings = converter.convert_backbone_config(config.to_dict())
    names = Names(converter.backbone_cls(**settings))
    assert names.family == family and len(names.kernels) >= 8
    modules = dict(peer.named_modules())
    for path in names.kernels:
        part = names.part(path)
        live = names.live(part.module)
        assert tuple(modules[live].weight.shape) == part.shape


def test_taking_notes_changes_no_weight(peers):
    model = ours("xlm-roberta", peers["xlm-roberta"][1])
    before = [keras.ops.convert_to_numpy(v) for v in model.variables]
    names = Names(model)
    after = [keras.ops.convert_to_numpy(v) for v in model.variables]
    assert all(map(np.array_equal, before, after))
    assert len(names.kernels) >= 12
    assert not any("assign" in vars(v) for v in model.variables)


# -- Layouts -----------------------------------------------------------------


def part_of(layer, hook):
    ported = Ported(layer.kernel, hook)
    return Layouts().part("module", [(ported, kernel_of(layer))], 0)


@pytest.fixture
def dense():
    layer = keras.layers.Dense(4)
    layer.build((None, 6))
    return layer


def test_a_layout_by_axes(dense):
    plain = part_of(dense, lambda tensor, shape: tensor)
    turned = part_of(dense, lambda tensor, shape: tensor.T)
    assert (plain.shape, plain.transposed) == ((6, 4), True)
    assert (turned.shape, turned.transposed) == ((4, 6), False)
    order = np.array([2, 0, 1, 5, 4, 3])
    moved = part_of(dense, lambda tensor, shape: tensor.T[order])
    assert np.array_equal(moved.inputs, order)
    assert np.array_equal(moved.outputs, np.arange(4))


@pytest.mark.parametrize(
    "hook",
    [
        lambda tensor, shape: np.roll(tensor.ravel(), 1).reshape(shape),
        lambda tensor, shape: np.sort(tensor.ravel()).reshape(shape)[::-1, :3],
        lambda tensor, shape: tensor.T * 2,
        lambda tensor, shape: tensor.T + 1,
        lambda tensor, shape: np.zeros_like(tensor.T),
    ],
)
def test_a_layout_that_is_no_block_of_rows_and_columns(hook, dense):
    assert part_of(dense, hook) is None


def test_layers_that_share_a_weight():
    layers = [keras.layers.Dense(size) for size in (4, 2, 2)]
    for layer in layers:
        layer.build((None, 6))
    hooks = (
        lambda tensor, shape: tensor[:4].T,
        lambda tensor, shape: tensor[4:6].T,
        lambda tensor, shape: tensor[6:].T,
    )
    kernels = [
        (Ported(layer.kernel, hook), kernel_of(layer))
        for layer, hook in zip(layers, hooks, strict=True)
    ]
    parts = [Layouts().part("qkv", kernels, i) for i in range(3)]
    assert all(isinstance(p, Part) and p.shape == (8, 6) for p in parts)
    assert np.array_equal(
        np.concatenate([p.outputs for p in parts]), np.arange(8)
    )
