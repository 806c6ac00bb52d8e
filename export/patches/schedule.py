"""keras-hub's diffusion models keep the schedule of their first call.

That is the symbolic one which puts the model together, so the schedule has no
values until `configure_scheduler`, is forgotten by a file of the model, and
passes over `num_steps`, which is an input. Here it follows from that input.
"""

import sys
from contextlib import AbstractContextManager
from contextlib import nullcontext
from typing import Any

from keras import ops

from keras_peft.replacing import replaced

_MODULE = (
    "keras_hub.src.models.stable_diffusion_3."
    "flow_match_euler_discrete_scheduler"
)


def patched() -> AbstractContextManager[None]:
    """Within, schedules have as many steps as the model is told."""
    if _MODULE not in sys.modules:
        return nullcontext()
    scheduler = sys.modules[_MODULE].FlowMatchEulerDiscreteScheduler
    return replaced(scheduler, call=_call)


def _call(self: Any, inputs: Any, num_steps: Any) -> tuple[Any, Any]:
    """The noise left before a step, and its time; none after the last."""
    step = ops.reshape(ops.cast(inputs, "float32"), (1,))
    steps = ops.cast(num_steps, "float32")
    first = self._sigma_to_timestep(self.sigma_max)
    last = self._sigma_to_timestep(self.sigma_min)
    done = step / ops.maximum(steps - 1.0, 1.0)
    sigma = self._timestep_to_sigma(first + (last - first) * done)
    sigma = ops.where(step < steps, sigma, ops.zeros_like(sigma))
    return sigma, self._sigma_to_timestep(sigma)
