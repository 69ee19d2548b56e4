"""Base model, quantization, adapter and tokenizer."""
