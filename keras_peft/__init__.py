"""Parameter-efficient fine-tuning for Keras, with quantized edge export.

>>> keras_peft.adapt(model, keras_peft.LoRA(rank=8))
>>> model.fit(...)
>>> keras_peft.save_adapter(model, "my-adapter/")
>>> keras_peft.merge(model)
>>> keras_peft.export.to_onnx(model, "my-app/", quantize="int8")
"""

from keras_peft import export
from keras_peft import layers
from keras_peft import optimizers
from keras_peft import training
from keras_peft.adapt import adapt
from keras_peft.adapt import disabled
from keras_peft.adapt import remove
from keras_peft.adapt import set_adapter
from keras_peft.adapter_io import load_adapter
from keras_peft.adapter_io import save_adapter
from keras_peft.base_format import quantized_base
from keras_peft.callbacks import AdapterCheckpoint
from keras_peft.check_base import check_base
from keras_peft.combine import combine_adapters
from keras_peft.convert import extract_lora
from keras_peft.convert import to_lora
from keras_peft.low_rank import LowRankReport
from keras_peft.merge import MergeReport
from keras_peft.merge import merge
from keras_peft.merge import unmerge
from keras_peft.methods.adalora import AdaLoRA
from keras_peft.methods.adapter_plus import AdapterPlus
from keras_peft.methods.bias_tuning import BiasTuning
from keras_peft.methods.boft import BOFT
from keras_peft.methods.bottleneck import BottleneckAdapter
from keras_peft.methods.compacter import Compacter
from keras_peft.methods.hra import HRA
from keras_peft.methods.ia3 import IA3
from keras_peft.methods.loha import LoHa
from keras_peft.methods.lokr import LoKr
from keras_peft.methods.lora import LoRA
from keras_peft.methods.miss import MiSS
from keras_peft.methods.norm_tuning import NormTuning
from keras_peft.methods.oft import OFT
from keras_peft.methods.p_tuning import PTuning
from keras_peft.methods.prefix_tuning import PrefixTuning
from keras_peft.methods.prompt_tuning import PromptTuning
from keras_peft.methods.reft import ReFT
from keras_peft.methods.road import RoAd
from keras_peft.methods.shira import SHiRA
from keras_peft.methods.token_tuning import TokenTuning
from keras_peft.methods.vera import VeRA
from keras_peft.methods.visual_prompt_tuning import VisualPromptTuning
from keras_peft.rank_allocation import RankAllocator
from keras_peft.rows import adapter_names
from keras_peft.summary import summary

__version__ = "0.1.0"

__all__ = [
    "AdaLoRA",
    "AdapterCheckpoint",
    "AdapterPlus",
    "BOFT",
    "BiasTuning",
    "BottleneckAdapter",
    "Compacter",
    "HRA",
    "IA3",
    "LoHa",
    "LoKr",
    "LoRA",
    "LowRankReport",
    "MergeReport",
    "MiSS",
    "NormTuning",
    "OFT",
    "RankAllocator",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "ReFT",
    "RoAd",
    "SHiRA",
    "TokenTuning",
    "VeRA",
    "VisualPromptTuning",
    "adapt",
    "adapter_names",
    "check_base",
    "combine_adapters",
    "disabled",
    "export",
    "extract_lora",
    "layers",
    "load_adapter",
    "merge",
    "optimizers",
    "quantized_base",
    "remove",
    "save_adapter",
    "set_adapter",
    "summary",
    "to_lora",
    "training",
    "unmerge",
]
