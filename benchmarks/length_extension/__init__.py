"""Does a LoRA under a sparse mask extend a video model? Measured where the answer is known."""
