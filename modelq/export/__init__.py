"""Exports: a quantized model as a Hugging Face folder that inference engines load."""
