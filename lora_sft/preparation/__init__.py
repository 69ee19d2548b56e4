"""Conversations → examples on disk, ready to train on, with every row and token accounted for."""
