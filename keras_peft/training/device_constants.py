"""What Python passes to torch, on the GPU already. Imports torch."""

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float32}


class DeviceConstants(TorchFunctionMode):
    """Within, nothing that was passed before is copied from the host.

    A CUDA graph holds no such copies. Numbers are written by a kernel, and
    arrays looked up among those that earlier steps have passed.
    """

    def __init__(self):
        super().__init__()
        self.known = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = None
        if function in (torch.as_tensor, torch.tensor):
            value, device = args[0], str(kwargs.get("device"))
            if device in ("None", "meta") or torch.is_tensor(value):
                pass
            elif type(value) in _DTYPES:
                dtype = kwargs.get("dtype") or _DTYPES[type(value)]
                return torch.full((), value, dtype=dtype, device=device)
            else:
                key = _key(np.asarray(value), kwargs)
        elif function is torch.Tensor.to and args[0].device.type == "cpu":
            with torch._C.DisableTorchFunction():
                array = args[0].view(torch.uint8).numpy()
                key = _key(array, (args[0].dtype, args[1:], kwargs))
        if key is None:
            return function(*args, **kwargs)
        if key not in self.known:
            self.known[key] = function(*args, **kwargs)
        return self.known[key]


def _key(array, others):
    return array.tobytes(), str(array.dtype), array.shape, str(others)
