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
import math
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from distillkit.data.tasks import NO_TARGET
from distillkit.io.seeds import generator

Params = dict[str, Tensor]
Batch = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Traits:
    """How an architecture reads its input, found by trying it; see :mod:`distillkit.core.probing`.

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
    """A model as a pure function of its trained parameters; made by :func:`~distillkit.core.loading.load_student`.

    Attributes:
        name: what :func:`~distillkit.core.loading.load_student` was asked for (a folder by its last component only).
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


def _fresh_adapter(name: str, like: Tensor, draw: torch.Generator) -> Tensor:
    """A fresh LoRA matrix as peft draws it: A uniform by He et al. with a = √5, B zero, so that ΔW starts at zero."""
    value = torch.zeros(like.shape)
    if ".lora_A." in name:
        torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
    return value.to(like.device, like.dtype)
