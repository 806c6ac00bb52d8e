"""Runs the laws of `tests/devices` on as many devices as they need."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from models import build

from keras_peft import training

BACKEND = keras.config.backend()
FLAGS = {"jax": {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}}
# At a port that is free.
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def hold(name, launch=(), **env):
    """Runs a file of `tests/devices`, and asserts that it passes."""
    laws = Path(__file__).parent / "devices" / name
    done = subprocess.run(
        [sys.executable, *launch, "-m", "pytest", "-x", "-q", str(laws)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slice
def test_laws_hold_on_several_devices():
    launch = TORCHRUN if BACKEND == "torch" else []
    flags = FLAGS.get(BACKEND, {})
    hold(f"laws_{BACKEND}.py", launch, **flags, OMP_NUM_THREADS="1")


def test_other_backends_are_told_what_to_use():
    model = build("functional")
    used = {
        "jax": "keras.distribution.DataParallel",
        "tensorflow": "tf.distribute.MirroredStrategy",
        "torch": "torchrun",
    }
    with pytest.raises(ValueError, match=used[BACKEND]):
        training.data_parallel(model)
    if BACKEND != "jax":
        for wrong in (
            training.FullyShardedDataParallel,
            lambda: training.distribute(model),
        ):
            with pytest.raises(ValueError, match=used[BACKEND]):
                wrong()
