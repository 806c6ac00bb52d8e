"""Diffusion models follow the number of steps they are told."""

import keras
import numpy as np
import pytest
from keras_hub.src.models.stable_diffusion_3 import (
    flow_match_euler_discrete_scheduler,
)

from keras_peft.export.patches import schedule

Scheduler = flow_match_euler_discrete_scheduler.FlowMatchEulerDiscreteScheduler


# Of the noise, and of the time.
LARGEST = np.array([[1.0], [1000.0]])


def _call(scheduler, step, steps):
    given = (
        keras.ops.convert_to_tensor(step),
        keras.ops.convert_to_tensor(steps),
    )
    sigma, time = scheduler(*given)
    return keras.ops.convert_to_numpy(keras.ops.stack([sigma, time]))


@pytest.mark.slice
def test_a_schedule_follows_the_number_of_steps_which_keras_hub_passes_over():
    scheduler = Scheduler()
    scheduler.set_sigmas(5)
    with schedule.patched():
        found = [[_call(scheduler, i, n) for i in range(n + 1)] for n in (3, 7)]
    passed_over = _call(scheduler, 1, 3)
    for steps, rows in zip((3, 7), found, strict=True):
        scheduler.set_sigmas(steps)
        for step, row in enumerate(rows):
            wanted = _call(scheduler, step, steps)
            # Evenly spaced from the largest, with a few of its roundings.
            error = np.abs(row - wanted).reshape(2, -1) / LARGEST
            assert error.max() <= 2.0**-21
        if steps == 3:
            assert np.abs(passed_over - rows[1]).max() > 1e-3, (
                "keras-hub follows the number of steps now: remove the patch"
            )
