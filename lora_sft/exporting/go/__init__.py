"""A chat template → the Go template that Ollama needs, derived and proven."""
