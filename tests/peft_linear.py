"""A PEFT model of one `Linear`, to compare one layer with."""

import numpy as np


def peft_linear(config, settings, kernel, bias):
    """With the kernel `(inputs, outputs)` and the bias of a Keras layer.

    `config` is the name of PEFT's class, `settings` its arguments.
    """
    import peft
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(*kernel.shape)

        def forward(self, x):
            return self.linear(x)

    base = Model()
    with torch.no_grad():
        base.linear.weight.copy_(torch.from_numpy(np.array(kernel.T)))
        base.linear.bias.copy_(torch.from_numpy(np.array(bias)))
    config = getattr(peft, config)(target_modules=["linear"], **settings)
    return peft.get_peft_model(base, config)
