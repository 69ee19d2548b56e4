"""A finished run → what others may see of it: the model card, and the files without paths and secrets."""
