"""An adapter and its base → one model, proven to be what was trained."""
