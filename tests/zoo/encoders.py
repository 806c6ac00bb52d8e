"""Text encoders and their tasks."""

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2

BERT = backbone(
    "BertBackbone",
    dict(
        vocabulary_size=50,
        num_layers=LAYERS,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=24,
        max_sequence_length=32,
    ),
    attention=4 * LAYERS,
    mlp=2 * LAYERS,
    # The pooler is a linear layer outside of the blocks.
    linear=6 * LAYERS + 1,
    embeddings=2,
)

CASES: tuple[Case, ...] = (
    BERT,
    task("BertTextClassifier", BERT, {}, num_classes=3),
)
