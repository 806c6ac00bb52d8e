import os

import pytest

# Before anything imports Keras: TensorFlow reads these once.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread each: workers that all take every core slow each other down.
    for variable in (
        "OMP_NUM_THREADS",
        "TF_NUM_INTEROP_THREADS",
        "TF_NUM_INTRAOP_THREADS",
    ):
        os.environ.setdefault(variable, "1")


# Many architectures, and the peers: torch, which compiles nothing, is through
# them in a fraction of the time.
MOVED = {
    "blockwise",
    "genai",
    "interop",
    "test_blocks.py",
    "test_encoder_decoders.py",
    "test_keras_quantized_base.py",
    "test_kernel_reads.py",
    "test_models.py",
    "test_modules.py",
    "test_packed_base.py",
    "test_packed_experts.py",
    "test_prompts.py",
    "test_raw_weights.py",
    "test_training_chunked_loss.py",
    "test_training_packing.py",
    "test_training_rematerialize.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        path = item.path.relative_to(config.rootpath / "tests")
        if MOVED.intersection(path.parts):
            item.add_marker("moved")


# Keras is imported late, so that a process that only hands out tests does not
# spend seconds on it.
@pytest.fixture(autouse=True)
def seed():
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def release_memory():
    yield
    import keras

    keras.backend.clear_session()
