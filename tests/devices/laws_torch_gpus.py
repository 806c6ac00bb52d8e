"""Laws of recorded steps on torch, run by two processes with a GPU each."""

import os

import numpy as np
import pytest
import torch
from test_training_capture import fit
from test_training_capture import tiny
from torch import distributed

from keras_peft import training

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group("nccl")


@pytest.mark.parametrize(
    "parts",
    [
        (training.capture_steps, training.data_parallel),
        (training.data_parallel, training.capture_steps),
        (training.data_parallel, lambda m: training.prepare(m, capture=True)),
    ],
)
def test_two_processes_record_what_one_trains(parts):
    """Batches of 32 and 3 rows: 16 and 16, 1 and 2."""
    model = tiny()
    distributed.broadcast_object_list(shared := [model.get_weights()])
    model.set_weights(shared[0])
    expected, after = fit(model), model.get_weights()
    other = tiny()
    other.set_weights(shared[0])
    for part in parts:
        part(other)
    found = fit(other)
    recorder = other.train_function.args[2]
    assert len(recorder.recordings) == 2
    for name, values in expected.items():
        # The same sums in another order.
        assert np.allclose(found[name], values, rtol=1e-4), name
    for one, two in zip(after, other.get_weights(), strict=True):
        assert np.allclose(one, two, atol=1e-4)
