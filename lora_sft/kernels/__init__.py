"""Parts of a training step, written for speed: small functions with hand-derived gradients, each proven before use."""
