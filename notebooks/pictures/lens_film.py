"""The film that the README opens with, and its last moment as a UMAP: twelve examples of docstrings, sixty outer steps.

    python notebooks/pictures/lens_film.py runs/lens figures/lens.gif figures/lens_umap.png

It took nine minutes on two busy cores, and goes on where it was interrupted.
"""

import sys
from pathlib import Path

import distillkit as dk


def film(folder: Path, path: Path, still: Path) -> None:
    """Distil two examples per class, keep 31 frames in ``folder``, and write the film to ``path`` and a UMAP to ``still``."""
    task = dk.load_task("docstrings", max_length=64, limit=600)
    student = dk.load_student("offline:minilm", task)
    start = dk.DistilledSet.from_real(task, student, per_class=2, length=20, seed=1)
    objective = dk.BPTT(task, student, dk.Unroll(steps=4), batch_size=32)
    distiller = dk.Distiller(start, objective, lr=0.03, checkpoint=folder / "run")
    for _ in dk.record_film(distiller, folder / "film", 60, frames=31):
        pass
    lens = dk.Lens(folder / "film", student, task=task)
    lens.save_gif(path)
    lens.figure("umap").savefig(still, dpi=110)


if __name__ == "__main__":
    film(*map(Path, sys.argv[1:4]))
