"""The two packaged language models, and :mod:`distillkit.assets.pretrain`, which makes them anew."""
