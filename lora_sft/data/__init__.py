"""Rows with their origin → conversations."""
