"""Lens: a microscope for distilled text, four linked panes over the outer steps (:class:`~distillkit.view.lens.lens.Lens`).

What it shows is computed without a widget: :mod:`~distillkit.view.lens.film` keeps and measures the steps,
:mod:`~distillkit.view.lens.maps` lays them out in the plane, :mod:`~distillkit.view.lens.panes` has tokens, heads and
candidates.  The front end (``js/``, ``lens.css``) only draws.
"""
