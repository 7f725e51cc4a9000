"""What a meta-gradient costs: every strategy of the kit beside the ways others take, on one problem.

    python tests/benchmarks/metagrad.py                                  # the table of costs, about an hour on two cores
    python tests/benchmarks/metagrad.py --steps 2 8 --trainable full     # a part of it
    python tests/benchmarks/metagrad.py --students random:opt-small
    python tests/benchmarks/metagrad.py --accuracy                       # how far forward differences may be trusted
    python tests/benchmarks/metagrad.py --resume                         # go on with an interrupted one of the same options
    python tests/benchmarks/metagrad.py --readme                         # write RESULTS.md's tables from the stored results

*Cost* is time relative to plain training of the same inner steps with the same attention: 1 is training without any
meta-gradient.  The outer loss is a fixed random linear function of the parameters, whose own time is taken off, so that
the unroll alone is measured; what a real outer batch costs stands apart.  Plain training and a contender take turns
(A B A B ...), and the median of the ratios is reported: a noisy neighbour slows both.

*Share of the matrix rate* is the contender's floating-point operations per second, by PyTorch's counter, over what the device
does in one large float32 matrix product.

*Live bytes* are those of tensors, not of the process (:mod:`distillkit.io.memory`); on a GPU, the allocator's peak.  Tensors
shaped like a trained parameter are counted apart, in sets of parameters: parameters kept for the way back, gradients,
cotangents.  So are the gradients of the examples that ``ForwardDifference`` keeps for each step.  The rest are activations
and what autograd saves of them.

*Error* and *cosine* compare the gradient of the examples with ``StoreAll``'s, inner step by inner step, for the loss on a
real outer batch.

Beside the kit's strategies stand peers, written here in their authors' manner and proved equal to ``StoreAll`` by the tests:

* ``unroll, autograd``: one graph through all steps by ``autograd.grad(create_graph=True)``, as in higher and in MTT's code.
* ``unroll, torch.func``: ``torch.func.grad`` of the unrolled loss, each inner gradient a ``torch.func.grad`` too.
* ``TorchOpt``: its differentiable ``MetaSGD`` (Ren et al., 2023), where it is installed.
* ``MixFlow-MG``: the walk back step by step, its second-order products forward over reverse (Kemaev et al., 2025,
  arXiv 2505.00793).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor

import distillkit as dk
from distillkit.core.inner import Phi
from distillkit.core.metagrad import compare, step_contributions, update_vjp
from distillkit.core.objectives import trained_loss
from distillkit.core.problem import MetaGradient, Problem, outer_loss_and_grads
from distillkit.core.student import Params, Student
from distillkit.evaluation.evaluate import flop_counter
from distillkit.experiments.results import now, read, with_tables, write
from distillkit.io.deadline import NEVER, Deadline
from distillkit.io.memory import LiveBytes
from distillkit.io.progress import progress
from distillkit.io.seeds import generator

README = Path(__file__).resolve().parents[2] / "figures" / "RESULTS.md"
RESULTS = README.parent / "results"
VERSIONED = ("torch", "transformers", "peft", "torchopt")
# Architectures with random weights, for a machine without their checkpoints: cost does not depend on the weights, error does.
_OPT = {"hidden_size": 384, "word_embed_proj_dim": 384, "num_attention_heads": 12, "ffn_dim": 1536}
_OPT_LARGE = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "num_attention_heads": 32, "ffn_dim": 8192}
_TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
RANDOM = {
    "random:opt-small": (transformers.OPTConfig, {**_OPT, "num_hidden_layers": 6, "max_position_embeddings": 512}),
    "random:opt-1.3b": (transformers.OPTConfig, {**_OPT_LARGE, "num_hidden_layers": 24}),
    "random:bert-base": (transformers.BertConfig, {}),
    "random:opt-tiny": (transformers.OPTConfig, {**_TINY, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "random:bert-tiny": (transformers.BertConfig, {**_TINY, "intermediate_size": 64}),
}
ACCURACY = {"step_size": (0.01, 0.1, 0.3, 0.5), "steps": (2, 8, 32), "change": (0.003,)}
WAYS = {"by the rule": None, "forward": False, "central": True}
NUDGED = "exact, weights moved by rounding"
FELT = 1e-6  # share of the largest contribution; float32 resolves 1.2e-7 in a sum


# Peers ---------------------------------------------------------------------------------------------------------------


def _meta_gradient(loss: Tensor | float, d_phi: Phi, d_steps: Tensor) -> MetaGradient:
    return MetaGradient(float(loss), d_phi.embeds, d_phi.targets, d_steps)


def _outer(problem: Problem, params: Params) -> Tensor:
    return sum(part(params) for part in problem.outer)


def autograd_unroll(problem: Problem) -> MetaGradient:
    """Plain SGD steps in one graph, kept whole: what a dozen lines of PyTorch do."""
    phi, sizes = problem.phi(), problem.step_sizes.clone().requires_grad_()
    params = {n: p.detach().requires_grad_() for n, p in problem.params.items()}
    for t in range(len(problem.rows)):
        loss = sum(problem.loss(params, t, phi))
        grads = torch.autograd.grad(loss, tuple(params.values()), create_graph=True, materialize_grads=True)
        params = {n: p - sizes[t] * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = _outer(problem, params)
    *d_phi, d_steps = torch.autograd.grad(loss, (*phi.tensors(), sizes), materialize_grads=True)
    return _meta_gradient(loss.detach(), Phi(*d_phi), d_steps)


def functional_unroll(problem: Problem) -> MetaGradient:
    """The same as a function of (φ, η) that is handed to ``torch.func.grad``."""

    def outer(phi: tuple[Tensor, ...], sizes: Tensor) -> Tensor:
        params = problem.params
        for t in range(len(problem.rows)):
            grads = torch.func.grad(lambda p, t=t: sum(problem.loss(p, t, Phi(*phi))))(params)
            params = {n: p - sizes[t] * grads[n] for n, p in params.items()}
        return _outer(problem, params)

    phi = tuple(p.detach() for p in problem.phi().tensors())
    (d_phi, d_steps), loss = torch.func.grad_and_value(outer, argnums=(0, 1))(phi, problem.step_sizes)
    return _meta_gradient(loss.detach(), Phi(*d_phi), d_steps)


class _Held(torch.nn.Module):
    """Parameters under names that a module may hold; TorchOpt puts each step's new ones in their place."""

    def __init__(self, params: Params):
        super().__init__()
        self.names = {n: f"p{i}" for i, n in enumerate(params)}
        for n, p in params.items():
            self.register_parameter(self.names[n], torch.nn.Parameter(p.detach()))

    def forward(self) -> Params:
        return {n: getattr(self, held) for n, held in self.names.items()}


def torchopt_unroll(problem: Problem) -> MetaGradient:
    """TorchOpt's ``MetaSGD``, its learned step sizes given as a schedule."""
    import torchopt

    phi, sizes, held = problem.phi(), problem.step_sizes.clone().requires_grad_(), _Held(problem.params)
    optimizer = torchopt.MetaSGD(held, lr=lambda count: sizes[count])
    for t in range(len(problem.rows)):
        optimizer.step(sum(problem.loss(held(), t, phi)))
    loss = _outer(problem, held())
    *d_phi, d_steps = torch.autograd.grad(loss, (*phi.tensors(), sizes), materialize_grads=True)
    return _meta_gradient(loss.detach(), Phi(*d_phi), d_steps)


def mixflow(problem: Problem) -> MetaGradient:
    """Keep θ_t and g_t; walk back with ∇²ℓ·γ as the ``jvp`` along γ of the gradient with respect to θ, φ and labels."""
    params, state, kept = problem.params, problem.optimizer.init(problem.params), []
    for t in range(len(problem.rows)):
        new, new_state, grads, _ = problem.step(t, params, state)
        kept.append((params, state, grads))
        params, state = new, new_state
    loss, cotangents = outer_loss_and_grads(problem, params)
    phi, sigma = tuple(p.detach() for p in problem.phi().tensors()), None
    total, d_steps = [torch.zeros_like(p) for p in phi], torch.zeros_like(problem.step_sizes)
    for t in reversed(range(len(problem.rows))):
        params, state, grads = kept.pop()
        direct, gamma, sigma, d_steps[t] = update_vjp(
            problem.optimizer, params, state, grads, problem.step_sizes[t], cotangents, sigma
        )
        along, d_phi = _forward_over_reverse(problem, t, params, phi, gamma)
        cotangents = {n: d + along[n] for n, d in direct.items()}
        for tensor, part in zip(total, d_phi, strict=True):
            tensor += part
    return _meta_gradient(loss, Phi(*total), d_steps)


def _forward_over_reverse(problem: Problem, t: int, params: Params, phi: tuple[Tensor, ...], gamma: Params):
    def gradients(theta: Params):
        return torch.func.grad(lambda th, ph: sum(problem.loss(th, t, Phi(*ph))), argnums=(0, 1))(theta, phi)

    _, products = torch.func.jvp(gradients, (params,), (gamma,))
    return products


# Who takes part ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to the meta-gradient: a strategy of the kit, or a peer's function."""

    name: str
    run: Callable[[Problem], MetaGradient]
    attention: str = "eager"
    peer: bool = False
    needs: str | None = None

    @property
    def installed(self) -> bool:
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    @property
    def keeps_phi(self) -> bool:
        """Whether the gradient of the examples is kept for each step on the way there."""
        return isinstance(self.run, dk.ForwardDifference) and self.run.every == 1


CONTENDERS = (
    Contender("StoreAll", dk.StoreAll()),
    Contender("Replay", dk.Replay()),
    Contender("Replay, every 4th set", dk.Replay(every=4)),
    Contender("ForwardDifference", dk.ForwardDifference()),
    Contender("ForwardDifference, central", dk.ForwardDifference(central=True)),
    Contender("ForwardDifference, fused", dk.ForwardDifference(), attention="sdpa"),
    Contender("unroll, autograd", autograd_unroll, peer=True),
    Contender("unroll, torch.func", functional_unroll, peer=True),
    Contender("TorchOpt", torchopt_unroll, peer=True, needs="torchopt"),
    Contender("MixFlow-MG", mixflow, peer=True),
)


# The problem ---------------------------------------------------------------------------------------------------------


def real_problem(task: dk.Task, student: Student, steps: int, settings: dict) -> Problem:
    """T steps of SGD on real sentences taken as a distilled set, scored on a real outer batch."""
    unroll = dk.Unroll(steps, optimizer=dk.SGD(settings["step_size"]))
    per_class = math.ceil(settings["examples"] / len(task.classes))
    found = dk.DistilledSet.from_real(task, student, per_class=per_class, length=settings["length"])
    problem = dk.BPTT(task, student, unroll, metagrad=dk.Replay(), batch_size=settings["outer_batch"]).problem(found, 0)
    # Evenly over the classes, in whose order they lie.
    chosen = torch.arange(settings["examples"]) * len(found) // settings["examples"]  # on the host, as the mask is
    return dataclasses.replace(
        problem,
        embeds=problem.embeds[chosen],
        mask=problem.mask[chosen],
        targets=problem.targets[chosen],
        rows=[torch.arange(settings["examples"])] * steps,
    )


def with_linear_outer(problem: Problem) -> Problem:
    """The same training run, scored by a fixed random linear function of the parameters."""
    draw = generator("benchmark-outer")
    weights = {n: torch.randn(p.shape, generator=draw).to(p) / math.sqrt(p.numel()) for n, p in problem.params.items()}

    def linear(params: Params) -> Tensor:
        return torch.stack([p.flatten() @ weights[n].flatten() for n, p in params.items()]).sum()

    return dataclasses.replace(problem, outer=[linear])


def plain(problem: Problem) -> None:
    """The inner steps alone."""
    params, state = problem.params, problem.optimizer.init(problem.params)
    for t in range(len(problem.rows)):
        params, state, *_ = problem.step(t, params, state)


# Measuring -----------------------------------------------------------------------------------------------------------


def seconds(device: torch.device, work: Callable, *args) -> float:
    """Wall-clock time of ``work(*args)``, on a GPU until it is really done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def live_bytes(contender: Contender, problem: Problem) -> dict[str, float]:
    """Peak of live bytes: in all, without what is counted apart (``activations``), and the number of parameter ``sets``."""
    device, shapes = problem.student.device, [p.shape for p in problem.params.values()]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with LiveBytes(apart=shapes) as live:
        contender.run(problem)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else live.total.peak
    kept = len(problem.rows) * _size(problem.phi().tensors()) if contender.keeps_phi else 0
    sets = live.apart.peak / _size(problem.params.values())
    return {"bytes": peak, "activations": live.rest.peak - kept, "kept_examples": kept, "sets": round(sets, 2)}


def _size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def accuracy_of(contributions: Tensor, exact: Tensor) -> dict[str, list]:
    """Cosine and relative error with respect to ``exact``, and its share of the largest contribution, by inner step."""
    steps = compare(contributions, exact)
    return {key: [_rounded(step[key]) for step in steps] for key in ("cosine", "error", "share")}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative error in norm."""
    return float((ours - theirs).norm() / theirs.norm())


def one_sample(contender: Contender, problem: Problem) -> dict[str, float]:
    """Plain training and then the contender, on the clock."""
    device = problem.student.device
    base = seconds(device, plain, problem)
    apart = seconds(device, outer_loss_and_grads, problem, problem.params)
    own = seconds(device, contender.run, problem) - apart
    return {"cost": own / base, "seconds": own, "plain_seconds": base}


class Bench:
    """One student, and what is measured on it; problems and exact contributions are made once for each T.

    Args:
        task, students: the corpus, and the student once for each kind of attention.
        settings: of the run.
        deadline: when to end with TimeUp; what is being measured then is lost.
    """

    def __init__(self, task: dk.Task, students: dict[str, Student], settings: dict, deadline: Deadline = NEVER):
        self.task, self.students, self.settings, self.deadline = task, students, settings, deadline
        self.problem, self.exact = functools.cache(self._problem), functools.cache(self._exact)

    def _problem(self, attention: str, steps: int) -> Problem:
        return real_problem(self.task, self.students[attention], steps, self.settings)

    def _exact(self, steps: int) -> Tensor:
        try:
            return step_contributions(dk.StoreAll(), self.problem("eager", steps))
        except torch.OutOfMemoryError:  # Replay is exact too
            return step_contributions(dk.Replay(), self.problem("eager", steps))

    def row(self, contender: Contender, steps: int) -> dict:
        """A row of the table, with ``failed`` in place of figures where the contender could not run."""
        row = {"contender": contender.name, "steps": steps, "attention": contender.attention, "peer": contender.peer}
        if not contender.installed:
            return row | {"failed": "not installed"}
        problem = self.problem(contender.attention, steps)
        try:
            row |= examined(contender, problem, self.exact(steps))
            row |= self.timed(contender, with_linear_outer(problem))
        except (RuntimeError, NotImplementedError, ValueError) as error:  # out of memory, or no derivative of its kind
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return row | {"made": now()}

    def timed(self, contender: Contender, problem: Problem) -> dict:
        """Medians over rounds, in each of which the contender takes its turn after plain training."""
        # A long run averages over its own length: the rounds of a T above 8 take about as long together as those of 8.
        rounds, samples = -(-self.settings["repeats"] * 8 // max(len(problem.rows), 8)), []
        while len(samples) < rounds:
            if samples:
                self.deadline.check()
            samples.append(one_sample(contender, problem))
        medians = {key: _rounded(median(sample[key] for sample in samples)) for key in samples[0]}
        return medians | {"costs": [_rounded(sample["cost"]) for sample in samples]}


def examined(contender: Contender, problem: Problem, exact: Tensor) -> dict:
    """One contender's bytes, operations and accuracy; this is its warm-up, too."""
    linear = with_linear_outer(problem)
    row = live_bytes(contender, linear)
    with flop_counter() as counter:
        contender.run(linear)
    row["flops"] = counter.get_total_flops()
    if contender.peer:
        return row | {"total_error": _rounded(difference(contender.run(problem).embeds, exact.sum(0)))}
    return row | accuracy_of(step_contributions(contender.run, problem), exact)


def matrix_rates(device: torch.device) -> dict[str, float]:
    """Floating-point operations per second of one large matrix product; TF32 and bfloat16 too on a GPU."""
    size = 8192 if device.type == "cuda" else 1024
    kinds = {"float32": (torch.float32, "highest")}
    if device.type == "cuda":
        kinds |= {"tf32": (torch.float32, "high"), "bfloat16": (torch.bfloat16, "highest")}
    rates, precision = {}, torch.get_float32_matmul_precision()
    for name, (dtype, setting) in kinds.items():
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        torch.set_float32_matmul_precision(setting)
        seconds(device, torch.mm, matrix, matrix)
        rates[name] = _rounded(2 * size**3 / min(seconds(device, torch.mm, matrix, matrix) for _ in range(5)))
    torch.set_float32_matmul_precision(precision)
    return rates


def outer_batch_cost(problem: Problem, repeats: int) -> float:
    """What the loss on the real outer batch and its gradient cost, in inner steps of plain training."""
    device, pairs = problem.student.device, []
    for _ in range(repeats + 1):  # the first is the warm-up
        step = seconds(device, plain, problem) / len(problem.rows)
        pairs.append(seconds(device, outer_loss_and_grads, problem, problem.params) / step)
    return _rounded(median(pairs[1:]))


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


# Whole runs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A measurement under way: its result, written to ``path`` after every step of it."""

    result: dict
    path: Path
    task: dk.Task
    sources: list[str]
    device: str | None

    @property
    def settings(self) -> dict:
        return self.result["settings"]

    def save(self) -> None:
        """An hour's work is not to be lost with its last minute."""
        write(self.path, self.result)

    def entries(self) -> Iterator[tuple[dict, dict[str, Student]]]:
        """For each student and kind of parameters that can be loaded: its entry in the result, and the student."""
        for source in self.sources:
            for trainable in self.settings["trainable"]:
                entry = self.entry(shown(source), trainable)
                entry.pop("failed", None)
                try:
                    students = self.loaded(source, trainable)
                except (ValueError, OSError, ImportError) as error:
                    entry["failed"] = "not loaded: " + str(error).replace(source, shown(source)).splitlines()[0]
                else:
                    own = students["eager"].init(0).values()
                    entry |= {"parameters": sum(p.numel() for p in own), "set_bytes": _size(own)}
                    yield entry, students
                self.save()

    def entry(self, student: str, trainable: str) -> dict:
        """Its entry in the result: the one an interrupted run has left, or a new one."""
        for found in self.result["entries"]:
            if (found["student"], found["trainable"]) == (student, trainable):
                return found
        self.result["entries"].append({"student": student, "trainable": trainable, "rows": []})
        return self.result["entries"][-1]

    def loaded(self, source: str, trainable: str) -> dict[str, Student]:
        """The student once for each kind of attention."""
        options = {"trainable": trainable, "device": self.device}
        with located(source, self.task) as place:
            return {a: dk.load_student(place, self.task, attention=a, **options) for a in ("eager", "sdpa")}


@contextlib.contextmanager
def located(source: str, task: dk.Task) -> Iterator[str]:
    """Where :func:`load_student` finds ``source``; one of :data:`RANDOM` is made for the while, with MiniLM's tokenizer."""
    if source not in RANDOM:
        yield source
        return
    tokenizer = dk.load_student("offline:minilm", task, device="cpu").tokenizer
    kind, sizes = RANDOM[source]
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.cls_token_id,
               "eos_token_id": tokenizer.sep_token_id}
    config = kind(**sizes, **special, vocab_size=len(tokenizer), num_labels=len(task.classes))
    with tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def shown(source: str) -> str:
    """A name for tables: a folder's last component, anything else as it is."""
    return Path(source).name if Path(source).exists() else source


def measure_cost(run: Run) -> None:
    """Fill the result with the cost of every contender."""
    for entry, students in run.entries():
        bench, title = begun(run, entry, students), f"{entry['student']}, {entry['trainable']}"
        for steps, contender in progress(missing(entry, run.settings), desc=title, unit="row"):
            add_row(run, entry, bench, contender, steps)


def begun(run: Run, entry: dict, students: dict[str, Student], deadline: Deadline = NEVER) -> Bench:
    """What measures the rows of ``entry``, after the matrix rates and the cost of the outer batch were measured."""
    bench = Bench(run.task, students, run.settings, deadline)
    if "rates" not in run.result:
        run.result["rates"] = matrix_rates(students["eager"].device)
    if "outer_batch_cost" not in entry:
        problem = bench.problem("eager", min(run.settings["steps"]))
        entry["outer_batch_cost"] = outer_batch_cost(problem, run.settings["repeats"])
    return bench


def missing(entry: dict, settings: dict) -> list[tuple[int, Contender]]:
    """T and contender of each row that ``entry`` lacks."""
    stored = {(row["steps"], row["contender"]) for row in entry["rows"]}
    return [(t, contender) for t in settings["steps"] for contender in CONTENDERS if (t, contender.name) not in stored]


def add_row(run: Run, entry: dict, bench: Bench, contender: Contender, steps: int) -> None:
    """Measure a row, and write the result."""
    order = [(t, other.name) for t in run.settings["steps"] for other in CONTENDERS]
    rows = [*entry["rows"], bench.row(contender, steps)]
    entry["rows"] = sorted(rows, key=lambda row: order.index((row["steps"], row["contender"])))
    run.save()


def measure_accuracy(run: Run) -> None:
    """Fill the result with what forward differences get right, by step size, T and ``change``."""
    grid = [(size, steps) for size in run.settings["step_sizes"] for steps in run.settings["steps"]]
    for entry, students in run.entries():
        made = {(row["step_size"], row["steps"]) for row in entry["rows"]}
        left = [cell for cell in grid if cell not in made]
        for size, steps in progress(left, desc=f"{entry['student']}, {entry['trainable']}", unit="run"):
            entry["rows"] += differences(run.task, students["eager"], steps, run.settings | {"step_size": size})
            run.save()


def differences(task: dk.Task, student: Student, steps: int, settings: dict) -> list[dict]:
    """Differences of each kind with every ``change`` on one problem."""
    problem = real_problem(task, student, steps, settings)
    exact, rows = step_contributions(dk.Replay(), problem), []  # Replay is exact, and 32 graphs need not fit into memory
    loss = _rounded(trained_loss(problem))
    for way, central in WAYS.items():
        for change in settings["changes"]:
            strategy = dk.ForwardDifference(central=central, change=change)
            row = {"step_size": settings["step_size"], "steps": steps, "way": way, "change": change}
            rows.append(row | {"loss": loss} | accuracy_of(step_contributions(strategy, problem), exact))
    moved = nudged(problem)
    row = {"step_size": settings["step_size"], "steps": steps, "way": NUDGED, "change": None}
    row["loss"] = _rounded(trained_loss(moved))
    return [*rows, row | accuracy_of(step_contributions(dk.Replay(), moved), exact)]


def nudged(problem: Problem) -> Problem:
    """The same training run, every initial weight moved by up to half a unit in its last place.

    How far the *exact* meta-gradient moves with it says how much of it float32 can know.
    """
    draw = generator("benchmark-nudge")

    def moved(p: Tensor) -> Tensor:
        return p * (1 + torch.finfo(p.dtype).eps * (torch.rand(p.shape, generator=draw).to(p) - 0.5))

    return dataclasses.replace(problem, params={name: moved(p) for name, p in problem.params.items()})


def machine(device: str | None) -> dict:
    """Kind of processor, and threads; nothing that names the machine."""
    kind = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    on_gpu = torch.cuda.is_available() and not str(device or "cuda").startswith("cpu")
    return {
        "processor": torch.cuda.get_device_name() if on_gpu else kind,
        "cuda": on_gpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Of what matters to these figures and is installed."""
    here = {p: importlib.metadata.version(p) for p in VERSIONED if importlib.util.find_spec(p) is not None}
    return {"python": platform.python_version(), **here}


# Tables --------------------------------------------------------------------------------------------------------------


def tables(result: dict) -> str:
    """The result as Markdown: a heading and a table for each student and kind of parameters."""
    draw = accuracy_table if result["kind"] == "accuracy" else cost_table
    machine_, settings = result["machine"], result["settings"]
    threads = "" if machine_["cuda"] else f", {machine_['threads']} threads"
    blocks = [
        f"{machine_['processor']}{threads}, torch {result['versions']['torch']}; {settings['examples']} examples of "
        f"{settings['length']} tokens of `{settings['corpus']}` a step."
    ]
    for entry in result["entries"]:
        heading = f"**`{entry['student']}`, trained: {entry['trainable']}**"
        if "failed" in entry:
            blocks.append(f"{heading}: {entry['failed']}")
            continue
        size = f"{entry['parameters']:,} parameters, a set is {entry['set_bytes'] / 1e6:.3g} MB"
        blocks += [f"{heading} ({size})", draw(entry, result)]
    return "\n\n".join(blocks)


def cost_table(entry: dict, result: dict) -> str:
    """One row per contender: cost for each T, live memory at two of them, and the worst inner step of all."""
    steps = sorted({row["steps"] for row in entry["rows"]})
    high = steps[-1]
    ends = dict.fromkeys((next((s for s in steps if s > 1), high), high))  # of one step nothing is kept
    clock = [f"seconds, T = {high}"] if result["machine"]["cuda"] else []
    rate = result.get("rates", {}).get("float32")
    share = [f"share of the matrix rate, T = {high}"] if rate else []
    titles = ["", *(f"T = {t}" for t in steps), *(f"activations MB, T = {t}" for t in ends),
              *(f"all MB, T = {t}" for t in ends), f"sets, T = {high}",
              "worst cosine", "worst error", *clock, *share]
    lines = [_line(titles), _line(["---"] + ["---:"] * (len(titles) - 1))]
    for name in dict.fromkeys(row["contender"] for row in entry["rows"]):
        rows = {row["steps"]: row for row in entry["rows"] if row["contender"] == name}
        cells = [_cell(rows, t, "cost", "{:.2f}") for t in steps]
        cells += [_cell(rows, t, "activations", "{:.1f}", 1e-6) for t in ends]
        cells += [_cell(rows, t, "bytes", "{:.0f}", 1e-6) for t in ends]
        cells += [_cell(rows, high, "sets", "{:.1f}"), *_worst(rows.values())]
        cells += [_cell(rows, high, "seconds", "{:.4g}") for _ in clock]
        lines.append(_line([name, *cells, *(_share(rows.get(high, {}), rate) for _ in share)]))
    return "\n".join([*lines, "", f"The outer batch of {result['settings']['outer_batch']} costs "
                      f"{entry['outer_batch_cost']:.2f} inner steps. {against_peers(entry)}"])


def against_peers(entry: dict) -> str:
    """ForwardDifference beside the fastest peer, in words."""
    found = []
    for steps in sorted({row["steps"] for row in entry["rows"]}):
        able = [row for row in entry["rows"] if row["steps"] == steps and row.get("seconds")]
        peers = [row for row in able if row["peer"]]
        ours = [row for row in able if row["contender"].startswith("ForwardDifference") and "central" not in row["contender"]]
        if peers and ours:
            best = min(row["seconds"] for row in ours) / min(row["seconds"] for row in peers)
            found.append(f"{best:.2f} at T = {steps}")
    return f"ForwardDifference takes this share of the fastest peer's time: {', '.join(found)}." if found else ""


def accuracy_table(entry: dict, result: dict) -> str:
    """A row a kind of difference and ``change``; the worst inner step of each problem."""
    problems = list(dict.fromkeys((row["step_size"], row["steps"]) for row in entry["rows"]))
    lines = [_line(["", "change", *(f"η = {size}, T = {steps}" for size, steps in problems)])]
    lines.append(_line(["---"] + ["---:"] * (len(problems) + 1)))
    for way, change in dict.fromkeys((row["way"], row["change"]) for row in entry["rows"]):
        rows = {(r["step_size"], r["steps"]): r for r in entry["rows"] if (r["way"], r["change"]) == (way, change)}
        cells = [" / ".join(_worst([_felt(rows[p])])) if p in rows else "" for p in problems]
        lines.append(_line([way, change or "", *cells]))
    lost = {(r["step_size"], r["steps"]): r["steps"] - len(_felt(r)["cosine"]) for r in entry["rows"]}
    note = "; ".join(f"{count} of {steps} steps at η = {size}, T = {steps}" for (size, steps), count in lost.items() if count)
    return "\n".join([*lines, "", "Worst inner step: cosine / relative error. Steps that contribute less than "
                      f"{FELT:g} of what the largest does are left out: {note or 'none'}."])


def _felt(row: dict) -> dict:
    """``row`` without the steps whose contribution is lost in the sum of all."""
    kept = [i for i, share in enumerate(row["share"]) if share is None or share >= FELT]
    return row | {key: [row[key][i] for i in kept] for key in ("cosine", "error")}


def _line(cells) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _cell(rows: dict, steps: int, key: str, form: str, scale: float = 1.0) -> str:
    row = rows.get(steps, {})
    if "failed" in row:
        reason = row["failed"] if row["failed"] == "not installed" else "failed"  # why it failed is in the JSON
        return reason if key == "cost" else ""
    return form.format(row[key] * scale) if row.get(key) is not None else ""


def _share(row: dict, rate: float) -> str:
    """Operations per second as a share of ``rate``."""
    return f"{row['flops'] / row['seconds'] / rate:.1%}" if row.get("seconds") and "flops" in row else ""


def _worst(rows) -> list[str]:
    """Lowest cosine and largest error over all inner steps of all rows; for a peer the error of the whole."""
    cosines = [c for row in rows for c in row.get("cosine", [])]
    errors = [e for row in rows for e in row.get("error", [row.get("total_error", 0.0)] if "total_error" in row else [])]
    if None in cosines or None in errors:
        return ["not finite", "not finite"]
    return [f"{min(cosines):.4f}" if cosines else "", f"{max(errors):.1e}" if errors else ""]


# The command ---------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"what load_student is given, or one of {', '.join(RANDOM)}"
    made.add_argument("--students", nargs="+", default=["offline:minilm"], help=names)
    made.add_argument("--trainable", nargs="+", choices=["full", "lora", "head"], help="default: all; full for --accuracy")
    made.add_argument("--steps", nargs="+", type=int, help="inner steps T; default 1 2 4 8 16 32, for --accuracy 2 8 32")
    made.add_argument("--repeats", type=int, default=5, help="rounds of timing; fewer for T above 8")
    made.add_argument("--threads", type=int, help="default: torch's")
    made.add_argument("--step-size", type=float, default=0.1)
    made.add_argument("--corpus", default="docstrings", help="what load_task is given")
    made.add_argument("--examples", type=int, default=8, help="examples a step")
    made.add_argument("--length", type=int, default=32, help="tokens an example")
    made.add_argument("--outer-batch", type=int, default=32)
    made.add_argument("--device", help="default: the GPU if there is one")
    made.add_argument("--out", type=Path, help="default: metagrad.json or metagrad_accuracy.json in figures/results")
    made.add_argument("--accuracy", action="store_true", help="measure forward differences instead of costs")
    made.add_argument("--resume", action="store_true", help="go on with the interrupted run that has written --out")
    made.add_argument("--readme", action="store_true", help="measure nothing: write the tables of figures/RESULTS.md")
    return made


def settings_of(args: argparse.Namespace) -> dict:
    """What a run is made with, as JSON values."""
    common = {
        "students": [shown(source) for source in args.students],
        "trainable": args.trainable or (["full"] if args.accuracy else ["full", "lora", "head"]),
        "steps": args.steps or (list(ACCURACY["steps"]) if args.accuracy else [1, 2, 4, 8, 16, 32]),
        "corpus": shown(args.corpus),
        "examples": args.examples,
        "length": args.length,
        "outer_batch": args.outer_batch,
    }
    if args.accuracy:
        return common | {"step_sizes": list(ACCURACY["step_size"]), "changes": list(ACCURACY["change"])}
    return common | {"step_size": args.step_size, "repeats": args.repeats}


def fresh_result(kind: str, settings: dict, device: str | None = None) -> dict:
    """A result of this machine that has no entry yet."""
    return {"kind": kind, "settings": settings, "machine": machine(device), "versions": versions(),
            "date": time.strftime("%Y-%m-%d"), "entries": []}


def taken_up(path: Path, fresh: dict) -> dict:
    """The result at ``path``; ValueError if it was measured otherwise than ``fresh`` is going to be."""
    found = read(path)
    for key in ("kind", "settings", "machine", "versions"):
        if found[key] != fresh[key]:
            raise ValueError(f"{path} has other {key}: {found[key]} there, {fresh[key]} here; measure anew without --resume")
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, write the JSON, print the tables."""
    args = parser().parse_args(argv)
    path = args.out or RESULTS / ("metagrad_accuracy.json" if args.accuracy else "metagrad.json")
    if args.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(with_tables(text, RESULTS, marker="benchmark", draw=tables), encoding="utf-8")
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    result = fresh_result("accuracy" if args.accuracy else "cost", settings_of(args), args.device)
    if args.resume and path.is_file():
        result = taken_up(path, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = Run(result, path, dk.load_task(args.corpus, max_length=args.length), args.students, args.device)
    (measure_accuracy if args.accuracy else measure_cost)(run)
    print(tables(result))


if __name__ == "__main__":
    main()
