"""Conversation → text with the model's part marked → tokens and labels."""

IGNORED = -100
"""The label of a token that is not learned; `ignore_index` of PyTorch's cross-entropy."""
