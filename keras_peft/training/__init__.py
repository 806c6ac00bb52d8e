"""What makes `fit` fast and small.

>>> keras_peft.adapt(causal_lm, keras_peft.LoRA(rank=8))
>>> keras_peft.training.prepare(causal_lm, remat="full")
>>> causal_lm.compile("adam")
>>> causal_lm.fit(inputs, targets, callbacks=[keras_peft.training.Progress()])
"""

from keras_peft.training.capture import capture_steps
from keras_peft.training.causal_attention import causal_attention
from keras_peft.training.chunked_loss import chunk_loss
from keras_peft.training.data_parallel import data_parallel
from keras_peft.training.length_buckets import LengthBuckets
from keras_peft.training.packing import pack
from keras_peft.training.prepare import prepare
from keras_peft.training.prepare import restore
from keras_peft.training.progress import Progress
from keras_peft.training.rematerialize import rematerialize
from keras_peft.training.segments import separate_segments
from keras_peft.training.sharding import FullyShardedDataParallel
from keras_peft.training.sharding import distribute
from keras_peft.training.smoothed import SmoothedCrossentropy

__all__ = [
    "FullyShardedDataParallel",
    "LengthBuckets",
    "Progress",
    "SmoothedCrossentropy",
    "capture_steps",
    "causal_attention",
    "chunk_loss",
    "data_parallel",
    "distribute",
    "pack",
    "prepare",
    "rematerialize",
    "restore",
    "separate_segments",
]
