"""The machine a run finds: its driver's figures, PyTorch's allocator settings. No torch."""
