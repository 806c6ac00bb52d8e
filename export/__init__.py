"""Turn a merged Keras model into a folder that runs on a device."""
