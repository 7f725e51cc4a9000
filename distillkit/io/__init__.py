"""The ground: seeds, checks, storage that survives, packaged models.  Knows nothing of distillation."""
