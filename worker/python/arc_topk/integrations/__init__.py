"""Training frameworks, each in a module of its own that imports it: ``transformers`` and ``lightning``."""
