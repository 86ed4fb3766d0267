"""Prompt extension: by a local language model or by a service."""
