"""Parameter-efficient fine-tuning for Keras, with quantized edge export."""

__version__ = "0.1.0"
