"""Small models of every shape in which layers are held."""

import keras
import numpy as np

import keras_peft

k = keras.layers


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    """Layers in an attribute, a list and a dict."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embed = k.Embedding(20, 8)
        self.blocks = [k.Dense(8, activation="relu") for _ in range(2)]
        self.named = {"out": k.Dense(3)}

    def build(self, input_shape):
        self.embed.build(input_shape)
        for layer in (*self.blocks, self.named["out"]):
            layer.build((*input_shape, 8))
        self.built = True

    def call(self, inputs):
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.named["out"](keras.ops.mean(hidden, axis=1))


def subclassed():
    model = Subclassed()
    model.build((None, 6))
    return model


def functional():
    inputs = keras.Input((5,))
    shared = k.Dense(5, activation="tanh", name="shared")
    hidden = shared(shared(inputs))
    return keras.Model(inputs, k.Dense(3, name="out")(hidden))


def sequential():
    layers = [k.Dense(8, activation="relu"), k.Dense(3)]
    return keras.Sequential([keras.Input((5,)), *layers])


def convolutional():
    inputs = keras.Input((8, 8, 3))
    hidden = k.Conv2D(6, 3, use_bias=False)(inputs)
    hidden = k.BatchNormalization()(hidden)
    hidden = k.DepthwiseConv2D(3, activation="relu")(hidden)
    hidden = k.GlobalAveragePooling2D()(hidden)
    return keras.Model(inputs, k.Dense(3)(hidden))


def bert_backbone(dropout=0.0):
    import keras_hub

    return keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=dropout,
    )


def bert_classifier(dropout=0.0):
    import keras_hub

    return keras_hub.models.BertTextClassifier(
        bert_backbone(dropout),
        num_classes=3,
        preprocessor=None,
        dropout=dropout,
    )


def own_classifier():
    backbone = bert_backbone()
    hidden = backbone(backbone.input)["sequence_output"]
    pooled = k.GlobalAveragePooling1D()(hidden)
    return keras.Model(backbone.input, k.Dense(3, name="logits")(pooled))


def gpt2(dropout=0.0):
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=dropout,
    )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)


def llama(dropout=0.0):
    import keras_hub

    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        dropout=dropout,
    )
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def mixtral():
    import keras_hub

    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=20,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
        num_experts=3,
        top_k=2,
    )
    return keras_hub.models.MixtralCausalLM(backbone, preprocessor=None)


def recurrent():
    both_ways = k.Bidirectional(k.LSTM(4, return_sequences=True))
    return keras.Sequential(
        [
            keras.Input((6,)),
            k.Embedding(20, 5, mask_zero=True),
            both_ways,
            k.RNN([k.GRUCell(5), k.SimpleRNNCell(4)]),
            k.Dense(3),
        ]
    )


def vit():
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone, num_classes=3, preprocessor=None
    )


def resnet():
    import keras_hub

    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(8, 8, 3),
    )
    return keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=3, preprocessor=None
    )


MODELS = {
    "functional": functional,
    "sequential": sequential,
    "subclassed": subclassed,
    "convolutional": convolutional,
    "bert-backbone": bert_backbone,
    "bert-classifier": bert_classifier,
    "own-classifier": own_classifier,
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "recurrent": recurrent,
    "vit": vit,
    "resnet": resnet,
}
# One of each way to hold layers, for the backends that run a slice.
SLICE = (
    "functional",
    "subclassed",
    "convolutional",
    "bert-classifier",
    "gpt2",
    "recurrent",
)


def build(name):
    """The same model each time and everywhere, no weight zero or one."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if "seed_generator" not in variable.path:
            value = rng.uniform(0.02, 0.2, size=variable.shape)
            if len(variable.shape) > 1:
                value = rng.normal(scale=0.3, size=variable.shape)
            else:  # Biases start at zero, norms' scales at one.
                value += keras.ops.convert_to_numpy(variable)
            variable.assign(value.astype("float32"))
    return model


def data(name, samples=8):
    """`(inputs, targets)` for a model; targets are class numbers."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 20, (samples, 6)).astype("int32")
    mask = np.ones((samples, 6), "bool")
    mask[0, 4:] = False
    classes = rng.integers(0, 3, samples)
    if name in ("functional", "sequential"):
        return rng.normal(size=(samples, 5)).astype("float32"), classes
    if name == "subclassed":
        return tokens, classes
    if name == "recurrent":
        return np.where(mask, tokens, 0), classes
    if name in ("convolutional", "vit", "resnet"):
        images = rng.normal(size=(samples, 8, 8, 3))
        return images.astype("float32"), classes
    if name in ("gpt2", "llama", "mixtral"):
        return {"token_ids": tokens, "padding_mask": mask}, tokens
    segments = np.zeros_like(tokens)
    inputs = {"token_ids": tokens, "segment_ids": segments}
    return {**inputs, "padding_mask": mask}, classes


def outputs(model, name):
    """What the model computes, as one float32 array."""
    found = keras.tree.flatten(model(data(name)[0], training=False))
    return np.concatenate(
        [keras.ops.convert_to_numpy(o).ravel() for o in found]
    )


def draw_biases(model):
    """Gives biases other values than 0."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.name == "bias":
            variable.assign(rng.normal(size=variable.shape))
    return model


def learn_classes(model, inputs, labels, epochs):
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(inputs, labels, epochs=epochs, verbose=0)
    return model


def fit(model, name, epochs=2, optimizer=None, inputs=None, **kwargs):
    """Trains with plain `fit`, Adam by default; returns the losses."""
    usual, targets = data(name)
    inputs = usual if inputs is None else inputs
    if name == "bert-backbone":
        targets = {
            "sequence_output": np.zeros((8, 6, 8), "float32"),
            "pooled_output": np.zeros((8, 8), "float32"),
        }
        objective = {key: "mse" for key in targets}
    else:
        objective = keras.losses.SparseCategoricalCrossentropy(True)
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    model.compile(optimizer=optimizer, loss=objective)
    # keras-hub's own `fit` adds a preprocessing pipeline around this one.
    history = keras.Model.fit(
        model,
        inputs,
        targets,
        epochs=epochs,
        batch_size=4,
        shuffle=False,
        verbose=0,
        **kwargs,
    )
    return history.history["loss"]


def loss_on_jax(model, inputs):
    """`(a loss as a function of what trains, what trains)`."""

    def loss(trainable):
        others = [v.value for v in model.non_trainable_variables]
        outputs, _ = model.stateless_call(
            trainable, others, inputs, training=True
        )
        return keras.ops.mean(outputs)

    return loss, [v.value for v in model.trainable_variables]


def kept_on_jax(model, inputs):
    """Numbers that the backward pass needs of the forward pass."""
    import jax

    _, pull = jax.vjp(*loss_on_jax(model, inputs))
    return sum(array.size for array in jax.tree.leaves(pull))


def values(variables):
    """`{path: array}`, without the states of random generators."""
    return {
        variable.path: keras.ops.convert_to_numpy(variable)
        for variable in variables
        if "seed_generator" not in variable.path
    }


def same_bits(before, after):
    return before.keys() == after.keys() and all(
        before[path].tobytes() == after[path].tobytes() for path in before
    )


def summary_of(model):
    """What `keras_peft.summary` prints."""
    printed = []
    keras_peft.summary(model, print_fn=printed.append)
    return "\n".join(printed)
