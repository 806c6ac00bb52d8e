"""Text encoders and their tasks."""

from zoo.case import Case
from zoo.case import backbone
from zoo.case import task

LAYERS = 2

# Position tables are plain weights, and not among the embeddings.
SIZES = dict(
    vocabulary_size=50,
    num_layers=LAYERS,
    num_heads=2,
    hidden_dim=16,
    intermediate_dim=24,
)
POSITIONS = SIZES | dict(max_sequence_length=32)
BLOCKS = dict(attention=4 * LAYERS, mlp=2 * LAYERS)
# A pooler is a linear layer outside of the blocks, as is a projection from
# smaller embeddings.
POOLER = 1
PROJECTION = 1
# Tables of tokens and segments.
SEGMENTS = dict(embeddings=2)

ALBERT = backbone(
    "AlbertBackbone",
    # Every layer of the model goes twice through the same two blocks.
    POSITIONS | dict(embedding_dim=12, num_inner_repetitions=2),
    attention=4 * 2,
    mlp=2 * 2,
    linear=6 * 2 + PROJECTION + POOLER,
    **SEGMENTS,
)
BERT = backbone(
    "BertBackbone", POSITIONS, **BLOCKS, linear=6 * LAYERS + POOLER, **SEGMENTS
)
# The projections of keys and queries serve relative positions too.
DEBERTA = backbone(
    "DebertaV3Backbone",
    POSITIONS | dict(bucket_size=4),
    **BLOCKS,
    embeddings=1,
)
DISTIL_BERT = backbone("DistilBertBackbone", POSITIONS, **BLOCKS, embeddings=1)
ELECTRA = backbone(
    "ElectraBackbone",
    {k: v for k, v in POSITIONS.items() if k != "vocabulary_size"}
    | dict(vocab_size=50, embedding_dim=12),
    **BLOCKS,
    linear=6 * LAYERS + PROJECTION + POOLER,
    **SEGMENTS,
)
ESM = backbone(
    "ESMBackbone",
    POSITIONS,
    **BLOCKS,
    embeddings=1,
)
# Fourier transforms mix the tokens.
F_NET = backbone(
    "FNetBackbone",
    {k: v for k, v in POSITIONS.items() if k != "num_heads"},
    mlp=2 * LAYERS,
    linear=2 * LAYERS + PROJECTION + POOLER,
    **SEGMENTS,
)
ROBERTA = backbone("RobertaBackbone", POSITIONS, **BLOCKS, embeddings=1)
ROFORMER = backbone(
    "RoformerV2Backbone", SIZES | dict(head_size=8), **BLOCKS, **SEGMENTS
)
XLM_ROBERTA = backbone("XLMRobertaBackbone", POSITIONS, **BLOCKS, embeddings=1)
# A fifth projection is that of the relative positions.
XLNET = backbone(
    "XLNetBackbone",
    SIZES,
    attention=5 * LAYERS,
    mlp=2 * LAYERS,
    embeddings=1,
)

CASES: tuple[Case, ...] = (
    ALBERT,
    task("AlbertMaskedLM", ALBERT, {}),
    task("AlbertTextClassifier", ALBERT, {}, num_classes=3),
    BERT,
    task("BertMaskedLM", BERT, {}),
    task("BertTextClassifier", BERT, {}, num_classes=3),
    task("BertTextEmbedder", BERT, {}),
    DEBERTA,
    task("DebertaV3MaskedLM", DEBERTA, {}),
    task("DebertaV3TextClassifier", DEBERTA, {}, num_classes=3),
    DISTIL_BERT,
    task("DistilBertMaskedLM", DISTIL_BERT, {}),
    task("DistilBertTextClassifier", DISTIL_BERT, {}, num_classes=3),
    ELECTRA,
    ESM,
    task("ESMMaskedPLM", ESM, {}),
    task("ESMProteinClassifier", ESM, {}, num_classes=3),
    F_NET,
    task("FNetMaskedLM", F_NET, {}),
    task("FNetTextClassifier", F_NET, {}, num_classes=3),
    ROBERTA,
    task("RobertaMaskedLM", ROBERTA, {}),
    task("RobertaTextClassifier", ROBERTA, {}, num_classes=3),
    ROFORMER,
    task("RoformerV2MaskedLM", ROFORMER, {}),
    task("RoformerV2TextClassifier", ROFORMER, {}, num_classes=3),
    XLM_ROBERTA,
    task("XLMRobertaMaskedLM", XLM_ROBERTA, {}),
    task("XLMRobertaTextClassifier", XLM_ROBERTA, {}, num_classes=3),
    task("XLMRobertaTextEmbedder", XLM_ROBERTA, {}),
    XLNET,
)
