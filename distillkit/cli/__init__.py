"""``python -m distillkit``: thin commands over the rooms below."""
