"""The pictures of the course: what a lesson draws that takes more lines than a lesson should show.

A module here belongs to one or two lessons and is imported beside them (``from pictures import cells``).  The package
``distillkit`` does not import it.
"""
