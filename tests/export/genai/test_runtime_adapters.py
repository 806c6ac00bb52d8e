"""Adapters over one exported base, from files that the runtimes switch."""

import keras
import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
from adapted import IDS
from adapted import PLACES
from adapted import Exported
from adapted import close
from adapted import trained
from described import FAMILIES
from described import build
from described import logits

import keras_peft
from keras_peft.export import sum_adapters
from keras_peft.export.blockwise import quantize
from keras_peft.export.genai import adapter_file
from keras_peft.export.genai import adapters
from keras_peft.export.genai import families
from keras_peft.export.genai.decoder import Linear
from keras_peft.export.genai.decoder import parts
from keras_peft.export.genai.slots import Slots

LORA = keras_peft.LoRA(rank=3, alpha=5)
METHODS = {
    "lora": LORA,
    "ranks": keras_peft.LoRA(rank=2, rank_pattern={"_query_dense": 5}),
    "stable": keras_peft.LoRA(rank=4, scaling="rank_stabilized"),
    "pissa": keras_peft.LoRA(rank=2, init="pissa"),
    "dora": keras_peft.LoRA(rank=2, decompose=True),
    "adalora": keras_peft.AdaLoRA(rank=3),
    "loha": keras_peft.LoHa(rank=2),
    "miss": keras_peft.MiSS(rank=2),
    "vera": keras_peft.VeRA(rank=8),
    "oft": keras_peft.OFT(block_size=4),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """One warning per place says that its default is not constant."""
    onnxruntime.set_default_logger_severity(3)
    yield
    onnxruntime.set_default_logger_severity(2)


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request, tmp_path_factory):
    return Exported(build(request.param), tmp_path_factory.mktemp("any"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Exported(build("llama"), tmp_path_factory.mktemp("llama"))


def test_an_adapter_file_computes_the_adapted_model(any_family, tmp_path):
    where = any_family.layers
    expected = trained(any_family.model, tmp_path / "a", LORA, targets=where)
    path = any_family.write(tmp_path / "a")
    assert close(any_family(path), expected)
    base = logits(any_family.model, IDS)
    assert close(any_family(), base) and not close(base, expected)


@pytest.mark.parametrize("name", METHODS)
def test_every_change_of_kernels_becomes_an_adapter_file(name, llama, tmp_path):
    expected = trained(llama.model, tmp_path / "a", METHODS[name])
    assert close(llama(llama.write(tmp_path / "a")), expected)


def test_conversion_reports_what_is_lost(llama, tmp_path):
    trained(llama.model, tmp_path / "a", METHODS["dora"])
    whole = adapters.read(llama.model, tmp_path / "a")
    half = adapters.read(llama.model, tmp_path / "a", rank=4)
    # Rounding of float32, and far above it.
    assert whole.report.worst[1] < 2**-20 < 1e-2 < half.report.worst[1]
    assert half.rank == 4


# The norms' epsilon of the small model is not that of the published ones.
@pytest.mark.filterwarnings("ignore:The base of the adapter differs")
def test_peft_folders_become_the_same_file(llama, tmp_path):
    expected = trained(llama.model, tmp_path / "peft", LORA, format="peft")
    assert close(llama(llama.write(tmp_path / "peft")), expected)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_places_change_no_bit_of_the_base(name, bits, tmp_path):
    model = build(name)
    plan = {
        part.key: quantize(part.kernel, bits)
        for part in parts(families.describe(model), Linear)
        if bits
    }
    found = []
    for slots in (Slots(), PLACES):
        folder = tmp_path / str(slots.low_rank)
        folder.mkdir()
        found.append(Exported(model, folder, slots, plan)())
    assert np.array_equal(*found)


def test_layers_that_are_computed_as_one_share_one_place(llama, tmp_path):
    trained(llama.model, tmp_path / "a", keras_peft.LoRA(rank=3))
    arrays, _ = adapter_file.read_file(llama.write(tmp_path / "a"))
    packed = "_value_dense.lora_a"
    found = [v.shape for k, v in arrays.items() if k.endswith(packed)]
    assert found == [(64, 3 * 3)] * 2  # One per block.


def test_reading_leaves_a_model_with_its_own_adapter(llama, tmp_path):
    model = build("llama")
    trained(model, tmp_path / "a", LORA)
    keras_peft.adapt(model, keras_peft.LoRA(rank=2), name="own")
    for variable in model.trainable_variables:
        variable.assign_add(keras.ops.ones_like(variable) / 8)
    before = logits(model, IDS), len(model.trainable_variables)
    adapters.read(model, tmp_path / "a")
    assert list(model.peft.active) == ["own"]
    after = logits(model, IDS), len(model.trainable_variables)
    assert np.array_equal(before[0], after[0]) and before[1] == after[1]


def test_a_sum_of_files_is_the_sum_of_changes(llama, tmp_path):
    weights = [0.7, -1.5]
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        method = keras_peft.LoRA(rank=2 + seed)
        trained(llama.model, folder, method, seed)
    files = [llama.write(folder, folder.name) for folder in folders]
    summed = tmp_path / "sum.onnx_adapter"
    sum_adapters(files, weights, summed)
    keras_peft.combine_adapters(folders, weights, tmp_path / "combined")
    keras_peft.load_adapter(llama.model, tmp_path / "combined")
    expected = logits(llama.model, IDS)
    keras_peft.remove(llama.model)
    assert close(llama(summed), expected)


def test_requests_of_onnxruntime_genai_switch_adapters(llama, tmp_path):
    expected = {None: logits(llama.model, IDS)}
    runtime = onnxruntime_genai.Model(str(llama.folder))
    shelf = onnxruntime_genai.Adapters(runtime)
    for seed, name in enumerate(("one", "two")):
        expected[name] = trained(llama.model, tmp_path / name, LORA, seed=seed)
        shelf.load(str(llama.write(tmp_path / name, name)), name)
    for name in ("one", None, "two", "one"):
        parameters = onnxruntime_genai.GeneratorParams(runtime)
        parameters.set_search_options(max_length=32)
        generator = onnxruntime_genai.Generator(runtime, parameters)
        if name is not None:
            generator.set_active_adapter(shelf, name)
        generator.append_tokens(IDS[0].astype("int32"))
        found = np.asarray(generator.get_logits())[0, -1]
        assert close(found, expected[name][0, -1])


# -- Errors ------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(llama, tmp_path):
    other = build("llama", seed=5)
    trained(other, tmp_path / "a", LORA)
    with pytest.raises(ValueError, match="other values"):
        adapters.read(llama.model, tmp_path / "a")


def test_a_file_of_another_base_is_refused(llama, tmp_path):
    trained(llama.model, tmp_path / "a", LORA)
    arrays, base = adapter_file.read_file(llama.write(tmp_path / "a"))
    path = tmp_path / "b.onnx_adapter"
    adapter_file.write_file(path, arrays, base - 1)
    with pytest.raises(ValueError, match="another base"):
        llama(path)
    with pytest.raises(ValueError, match="one base"):
        files = [llama.folder / "a.onnx_adapter", path]
        sum_adapters(files, [1, 1], tmp_path / "c.onnx_adapter")


def test_a_layer_without_a_place_is_named(llama, tmp_path):
    keras_peft.adapt(llama.model, LORA, targets="embeddings")
    keras_peft.save_adapter(llama.model, tmp_path / "a")
    keras_peft.remove(llama.model)
    with pytest.raises(ValueError, match="linear layers.*token_embedding"):
        llama.write(tmp_path / "a")


def test_a_damaged_file_is_refused(llama, tmp_path):
    trained(llama.model, tmp_path / "a", LORA)
    path = llama.write(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="No adapter file"):
        llama(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "a.onnx_adapter"
    with pytest.raises(ValueError, match=r"infinity.*x\.lora_a"):
        array = np.array([[np.inf]], "float32")
        adapter_file.write_file(path, {"x.lora_a": array}, 1)
    assert not path.exists()
