"""Real text: found, read, checked, split, tokenised.  :func:`distillkit.data.load.load_task` is the entrance."""
