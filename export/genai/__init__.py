"""A keras-hub CausalLM as a folder that onnxruntime-genai runs."""
