"""Other people's PyTorch code on the simulated device: its GPU memory, without a GPU. Nothing below this package knows it."""

MEMORY_IS = "the caller's"
