"""Edits in plain transformers models: attached by hooks, baked into weights, as adapters."""
