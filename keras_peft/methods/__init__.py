from keras_peft.methods.lora import LoRA

__all__ = ["LoRA"]
