"""The command `keras-peft`.

A package of its own: importing `keras_peft` brings Keras along, which a
command that only runs an exported folder has no use for.
"""
