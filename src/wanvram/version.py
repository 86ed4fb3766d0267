"""The version, where everything can import it: `wanvram` itself reaches torch through its profiler."""

__version__ = "0.1.0"
