"""Keras models as LiteRT files, for phones and small devices."""
