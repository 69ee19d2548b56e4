"""Conversations and a model → a trained adapter in an output folder."""
