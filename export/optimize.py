"""The rewrites that make a traced graph small and fast, in their order."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from keras_peft.export.passes import constant_shapes
from keras_peft.export.passes import deduplicate_initializers
from keras_peft.export.passes import einsum_to_matmul
from keras_peft.export.passes import fold_constants
from keras_peft.export.passes import fold_scale
from keras_peft.export.passes import gelu
from keras_peft.export.passes import gemm_to_matmul
from keras_peft.export.passes import half_turn
from keras_peft.export.passes import key_transpose
from keras_peft.export.passes import mask_by_adding
from keras_peft.export.passes import name_initializers
from keras_peft.export.passes import normalization
from keras_peft.export.passes import plain_gather
from keras_peft.export.passes import residual_apart
from keras_peft.export.passes import rewriting
from keras_peft.export.passes import select


def optimize(model: ir.Model, variables: Mapping[str, np.ndarray]) -> None:
    """Applies every rewrite to a graph with named inputs, in place.

    Args:
        model: A traced graph.
        variables: Values of the Keras model's variables by path.
    """
    # Names first: later rewrites reshape and join what the names go by.
    name_initializers.apply(model, variables)
    fold_constants.apply(model)
    normalization.apply(model)
    gelu.apply(model)
    key_transpose.apply(model)
    half_turn.apply(model)
    constant_shapes.apply(model)
    select.apply(model)
    # Later rewrites look at who reads a value.
    rewriting.drop_unused(model)
    einsum_to_matmul.apply(model)
    gemm_to_matmul.apply(model)
    plain_gather.apply(model)
    # What every layer computes anew, as a mask, it shares from here on.
    rewriting.share_equal(model)
    mask_by_adding.apply(model)
    fold_scale.apply(model)
    residual_apart.apply(model)
    deduplicate_initializers.apply(model)
    rewriting.clean(model)
