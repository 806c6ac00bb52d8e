"""Parameter-efficient fine-tuning for Keras, with quantized edge export.

>>> keras_peft.adapt(model, keras_peft.LoRA(rank=8))
>>> model.fit(...)
>>> keras_peft.save_adapter(model, "my-adapter/")
>>> keras_peft.merge(model)
>>> keras_peft.export.to_onnx(model, "my-app/", quantize="int8")
"""

from keras_peft import export
from keras_peft import layers
from keras_peft.adapt import adapt
from keras_peft.adapt import disabled
from keras_peft.adapt import remove
from keras_peft.adapt import set_adapter
from keras_peft.adapter_io import load_adapter
from keras_peft.adapter_io import save_adapter
from keras_peft.callbacks import AdapterCheckpoint
from keras_peft.combine import combine_adapters
from keras_peft.low_rank import LowRankReport
from keras_peft.merge import MergeReport
from keras_peft.merge import merge
from keras_peft.merge import unmerge
from keras_peft.methods.adapter_plus import AdapterPlus
from keras_peft.methods.bottleneck import BottleneckAdapter
from keras_peft.methods.compacter import Compacter
from keras_peft.methods.lora import LoRA
from keras_peft.methods.reft import ReFT
from keras_peft.summary import summary

__version__ = "0.1.0"

__all__ = [
    "AdapterCheckpoint",
    "AdapterPlus",
    "BottleneckAdapter",
    "Compacter",
    "LoRA",
    "LowRankReport",
    "MergeReport",
    "ReFT",
    "adapt",
    "combine_adapters",
    "disabled",
    "export",
    "layers",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "set_adapter",
    "summary",
    "unmerge",
]
