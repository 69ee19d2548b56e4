"""llama.cpp's own converter, kernels and runtime, for the GGUF targets."""
