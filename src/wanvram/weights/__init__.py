"""Checkpoints, random weights and tokenizers: everything the engine fills parameters and prompts from."""
