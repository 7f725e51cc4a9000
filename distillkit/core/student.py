"""Students: a Hugging Face model seen as a pure function of a parameter dictionary.

Dataset distillation trains the same network thousands of times and differentiates through each training run.  Both are
easy when the network is a *function* ``logits(params, batch)`` and awkward when it is an object that owns its weights.
A :class:`Student` wraps a ``transformers`` model once, never changes its weights, and evaluates it at any parameters it is
passed (``torch.func.functional_call``).

The task decides what a student is: a sequence classifier for a classification task; a language model for an instruction
task, which reads a prompt and is trained on the tokens of the response alone.

The parameters are everything (``"full"``), the head (``"head"``), the head and the top layers (``"top:3"``), or low-rank
adapters (``"lora"``, through ``peft``; Hu et al., 2022), with a classifier's head.  Token look-ups always use the *frozen
initial embedding table*: a distilled example enters as embeddings and so cannot train the table, and a comparison is fair only
if real text does not train it either.

Attention is loaded in its ``eager`` form, because the fused kernels have no second derivative (see
:mod:`distillkit.core.metagrad`).  No list says which architectures can be students: :mod:`distillkit.core.probing` tries a
model on a few tokens when it is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from distillkit.data.tasks import NO_TARGET
from distillkit.io.checks import require
from distillkit.io.seeds import generator

UNSEEN = -1e4  # a logit whose probability is 0
Params = dict[str, Tensor]
Batch = Mapping[str, Tensor]


@dataclasses.dataclass(eq=False, repr=False)
class Student:
    """A model as a pure function of its trained parameters; made by :func:`~distillkit.core.loading.load_student`.

    Attributes:
        name: the ``source`` of :func:`~distillkit.core.loading.load_student` (a folder by its last component only).
        module: the wrapped model in evaluation mode; its weights are never written to.
        tokenizer: its fast tokenizer.
        embedding: the frozen input embedding table, ``[v, d]``.
        kind: ``"classification"`` or ``"instruction"``, as its task.
        max_positions: longest input in tokens.
        trainable: ``"full"``, ``"head"``, ``"lora"`` or such as ``"top:3"``.
        weights: ``"pretrained"``: only the head is drawn afresh by :meth:`init`; ``"random"``: everything but the table.
        attention: ``"eager"`` or ``"sdpa"``.
        trained_names, fresh_names: the trained parameters, and those of them that :meth:`init` draws for a classifier.
        causal: each token sees only those before it.  This and the next three are measured by :mod:`distillkit.core.probing`.
        has_kinks: some unit's gradient jumps: ReLU, as in DistilBERT's head and throughout OPT, or the like.
        builds_masks: the model must get the mask ``[b, l]`` and build its own attention masks, since it does not take ours.
        scale: what the embedding layer multiplies a row of its table by; √d in Gemma models, otherwise 1.
        classes: names of the classes in the order of a classifier's logits; none for a language model.
        table_sha256: which embedding table it has: the SHA-256 of the checkpoint's rows as little-endian float32, before a
            cast to another dtype and before rows for new tokens.
        cache: anything that is computed once per student.
    """

    name: str
    module: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    embedding: Tensor
    kind: str
    max_positions: int
    trainable: str
    weights: str
    attention: str
    trained_names: tuple[str, ...]
    fresh_names: frozenset[str]
    causal: bool = False
    has_kinks: bool = False
    builds_masks: bool = False
    scale: float = 1.0
    classes: tuple[str, ...] = ()
    table_sha256: str = ""
    cache: dict = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.module.parameters())
        return f"Student({self.name!r}, {self.kind}, {size / 1e6:.1f} million parameters, trainable={self.trainable!r})"

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
        require((self.kind, sorted(self.classes)) == (task.kind, sorted(task.classes)),
                f"student {self.name!r} was loaded for {self.kind} with the classes {reprlib.repr(list(self.classes))}, task "
                f"{task.name!r} is {task.kind} with the classes {reprlib.repr(list(task.classes))}; load it for this task")
        return self if self.classes == tuple(task.classes) else dataclasses.replace(self, classes=tuple(task.classes))

    def init(self, seed: int) -> Params:
        """Parameters to start a training run from: pretrained body, a classifier's head fresh (or all fresh).

        Fresh parameters are drawn as the architecture itself initialises them, on the CPU and in float32 from ``seed``, so
        that every device and precision starts alike.

        Args:
            seed: any integer; the same seed gives the same parameters.

        Returns:
            name → detached tensor on the student's device; new tensors, never views of the module's weights.
        """
        parameters, draw = dict(self.module.named_parameters()), generator("student-init", seed)
        params = {name: parameters[name].detach().clone() for name in self.trained_names}
        adapters = [name for name in params if ".lora_" in name]
        fresh = {name: _fresh_adapter(name, params[name], draw) for name in adapters}
        names = tuple(n for n in params if n not in fresh and (self.weights == "random" or n in self.fresh_names))
        if names and names not in self.cache:
            model = self.module.get_base_model() if self.trainable == "lora" else self.module
            self.cache[names] = _blank(model, names)
        fresh |= _draw(*self.cache[names], draw) if names else {}
        return params | {name: value.to(params[name]) for name, value in fresh.items()}

    def scaled(self, embeds: Tensor) -> Tensor:
        """What the model takes as ``inputs_embeds`` for points ``embeds`` in the space of the embedding table."""
        return embeds if self.scale == 1 else embeds * self.scale

    def logits(self, params: Params, batch: Batch) -> Tensor:
        """Logits at ``params``: of the classes ``[b, c]``, or a language model's of the next token ``[b, l, v]``.

        Args:
            params: as :meth:`init` returns them.
            batch: ``input_ids`` ``[b, l]`` or ``inputs_embeds`` ``[b, l, d]``, and ``attention_mask`` ``[b, l]``.
        """
        logits = self._outputs(params, batch).logits
        if self.kind == "classification":
            return logits
        _, sources = self._to_the_right(batch["attention_mask"].to(self.device) != 0)
        return torch.empty_like(logits).scatter(1, sources.unsqueeze(-1).expand_as(logits), logits)

    def log_likelihood(self, params: Params, batch: Batch, responses: Tensor) -> Tensor:
        """Log-probability ``[b, r]`` of each response token after the prompt and the tokens before it; 0 where there is none.

        Args:
            batch: the prompts, as :meth:`logits` takes them.
            responses: token ids ``[b, r]``, short ones filled up with -100.

        Raises:
            ValueError: the student is a classifier, or ``responses`` has another shape.
        """
        require(self.kind == "instruction",
                f"student {self.name!r} is a classifier; load it for an instruction task to score responses")
        require(responses.ndim == 2 and not responses.is_floating_point(),
                f"responses must be token ids [b, r], not {responses.dtype} {tuple(responses.shape)}")
        responses = responses.to(self.device)
        logits = self._outputs(params, batch, responses, logits_to_keep=responses.shape[1]).logits
        return -F.cross_entropy(logits.transpose(1, 2), responses, reduction="none", ignore_index=NO_TARGET)

    def loss(self, params: Params, batch: Batch, targets: Tensor, *, dropout_seed: int | None = None) -> Tensor:
        """Mean cross-entropy of a batch; of a language model, mean over examples of the mean over response tokens.

        Args:
            targets: integer classes ``[b]``, float label *logits* ``[b, c]`` whose softmax is the soft label, or response
                ids ``[b, r]`` filled up with -100.
            dropout_seed: None: no dropout; otherwise dropout with the masks that this seed draws.
        """
        if dropout_seed is None:
            return self._loss(params, batch, targets)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(dropout_seed)
            self.module.train()
            try:
                return self._loss(params, batch, targets)
            finally:
                self.module.eval()

    def _loss(self, params: Params, batch: Batch, targets: Tensor) -> Tensor:
        if self.kind == "instruction":
            likelihoods = self.log_likelihood(params, batch, targets)
            return -(likelihoods.sum(1) / (targets.to(self.device) != NO_TARGET).sum(1)).mean()
        if "attention_labels" not in batch:
            return _cross_entropy(self.logits(params, batch), targets)
        logits, attention = self.with_first_attention(params, batch)
        return _cross_entropy(logits, targets) + _attention_loss(attention, batch)

    def with_first_attention(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class logits ``[b, c]``, and where the first token looks: attention probabilities ``[b, layers, heads, l]``.

        Raises:
            ValueError: the student does not give them, or its first token sees nothing but itself.
        """
        require(self.attention == "eager" and not self.causal and self.kind == "classification",
                f"student {self.name!r} has no attention labels: they are of the first token of an encoder that classifies, "
                f"loaded with attention='eager' (it is {'a decoder' if self.causal else 'an encoder'} for {self.kind}, "
                f"attention={self.attention!r}); load it so, or take a set without: dataclasses.replace(set, attention=None)")
        outputs = self._outputs(params, batch, output_attentions=True)
        return outputs.logits, torch.stack([layer[:, :, 0] for layer in outputs.attentions], 1)

    def features(self, batch: Batch, params: Params | None = None) -> Tensor:
        """Sentence representations ``[b, h]``: the mean of the last hidden states over the unmasked tokens.

        h is the width of the hidden states, which in ELECTRA and ALBERT is not the embeddings' d.
        """
        layers = self.layer_features(batch, params)
        return layers[:, -1] if self.causal else layers[:, layers.shape[1] // 2 - 1]

    def layer_features(self, batch: Batch, params: Params | None = None) -> Tensor:
        """The mean hidden state of each layer over the unmasked tokens, and for an encoder also that of the first token.

        Returns:
            ``[b, n, h]``, n the number of layers, twice that for an encoder (means, then first tokens); the embeddings' own
            layer is left out.
        """
        # A language model would compute logits of the whole vocabulary at every token for nothing.
        options = {"logits_to_keep": 1} if self.kind == "instruction" else {}
        hidden = self._outputs(params or {}, batch, output_hidden_states=True, **options).hidden_states[1:]
        mask = batch["attention_mask"].to(self.device)
        mask = (mask.flip(1) if self.causal else mask).unsqueeze(-1)
        means = [(states * mask).sum(1) / mask.sum(1) for states in hidden]
        return torch.stack(means if self.causal else means + [states[:, 0] for states in hidden], 1)

    def _outputs(self, params: Params, batch: Batch, responses: Tensor | None = None, **options) -> Any:
        """The module's outputs at ``params``."""
        return torch.func.functional_call(self.module, params, kwargs=self._inputs(batch, responses) | options)

    def _inputs(self, batch: Batch, responses: Tensor | None = None) -> dict[str, Any]:
        """The module's arguments; a language model's prompts are followed by all but the last response token.

        A decoder classifies by its last position, so its padding goes to the left; positions are counted from the first real
        token, as they are without padding.
        """
        mask = batch["attention_mask"].to(self.device) != 0
        if "inputs_embeds" in batch:
            embeds = batch["inputs_embeds"].to(self.device, self.dtype)
        else:
            embeds = F.embedding(batch["input_ids"].to(self.device), self.embedding)
        if not self.causal:
            return {"inputs_embeds": self.scaled(embeds), "attention_mask": self._attention_mask(mask)}
        positions, sources = self._to_the_right(mask)
        embeds, mask = embeds.gather(1, sources.unsqueeze(-1).expand_as(embeds)), mask.gather(1, sources)
        if responses is not None and responses.shape[1] > 1:
            read = responses[:, :-1]
            embeds = torch.cat([embeds, F.embedding(read.clamp_min(0), self.embedding)], 1)
            mask = torch.cat([mask, read != NO_TARGET], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(read.shape[1], device=self.device)], 1)
        return {"inputs_embeds": self.scaled(embeds), "attention_mask": self._attention_mask(mask),
                "position_ids": positions.clamp_min(0)}

    def branching_inputs(self, input_ids: Tensor, positions: Tensor, branches: Tensor) -> dict[str, Any]:
        """The module's arguments for prompts that are followed by several continuations, none of which sees another.

        Args:
            input_ids: ``[b, l]``; the tokens of a prompt, then those of each of its continuations.
            positions: of each token in its own text, ``[b, l]``; −1 for padding.
            branches: the number of the continuation that a token belongs to, from 1 on, ``[b, l]``; 0 for the prompt's.
        """
        embeds = F.embedding(input_ids.to(self.device), self.embedding)
        positions, branches = positions.to(self.device), branches.to(self.device)
        distance = positions[:, None, :, None] - positions[:, None, None, :]
        same = (branches[:, None, None, :] == 0) | (branches[:, None, :, None] == branches[:, None, None, :])
        visible = (positions >= 0)[:, None, None, :] & (distance >= 0) & same
        return {"inputs_embeds": self.scaled(embeds), "attention_mask": self._masks(visible, distance),
                "position_ids": positions.clamp_min(0)}

    def _to_the_right(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """For padding moved to the left: the position of each place, and the place it takes its token from, ``[b, l]``."""
        positions = torch.arange(mask.shape[1], device=self.device) - (~mask).sum(1, keepdim=True)
        return positions, positions % mask.shape[1]

    def _attention_mask(self, mask: Tensor) -> Any:
        """``mask`` ``[b, l]`` as the model takes it: a 4-D mask, one for each kind of layer, or itself.

        A ready-made 4-D mask is what transformers would build itself, without its data-dependent branches, which
        functional transforms cannot trace.  Where layers have a window (Mistral, Gemma, ModernBERT), transformers expects a
        ready-made mask to contain it.
        """
        if self.builds_masks:
            return mask.long()  # DeBERTa multiplies by it, and ModernBERT averages with it
        places = torch.arange(mask.shape[1], device=self.device)
        distance = places[:, None] - places
        return self._masks(mask[:, None, None, :] & (distance >= 0) if self.causal else mask[:, None, None, :], distance)

    def _masks(self, full: Tensor, distance: Tensor) -> Any:
        """The 4-D mask, one for each kind of layer.

        Args:
            full: which place sees which, ``[b, 1, l, l]`` (or ``[b, 1, 1, l]``: all see the same).
            distance: how many tokens the one lies behind the other, ``[l, l]`` or ``[b, 1, l, l]``.
        """
        config = cast("Any", self.module.config)
        kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        near = full
        if window is not None and (kinds is None or "sliding_attention" in kinds):
            # A decoder's window counts the token itself, an encoder's the tokens on either side.
            near = full & (distance < window if self.causal else distance.abs() <= window)
        if kinds is None:
            return self._bias(near)
        masks = {"full_attention": full, "sliding_attention": near}
        return {kind: self._bias(masks[kind]) for kind in sorted(set(kinds))}

    def _bias(self, visible: Tensor) -> Tensor:
        """0 where ``visible``, the lowest number elsewhere: ``[b, 1, l, l]``."""
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        # Decoders take their softmax in float32, where the lowest float64 would be −∞ and a row of nothing else NaN.
        lowest = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min)
        return bias.masked_fill(~visible, lowest).expand(-1, -1, visible.shape[-1], -1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return -(targets.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    return F.cross_entropy(logits, targets)


def _attention_loss(attention: Tensor, batch: Batch) -> Tensor:
    """KL(label ‖ attention), summed over positions; mean over examples (with their weights), layers and heads.

    Args:
        attention: the first token's probabilities ``[b, layers, heads, l]``.
        batch: ``attention_labels``, logits of that shape; ``attention_weight`` ``[b]``; ``attention_mask`` ``[b, l]``.
    """
    hidden = batch["attention_mask"].to(attention.device)[:, None, None] == 0
    labels = batch["attention_labels"].to(attention).masked_fill(hidden, UNSEEN).log_softmax(-1)
    log_probabilities = attention.clamp_min(torch.finfo(attention.dtype).tiny).log()
    divergence = (labels.exp() * (labels - log_probabilities)).sum(-1)
    return (divergence.mean((1, 2)) * batch["attention_weight"].to(attention)).mean()


def _blank(model: transformers.PreTrainedModel, names: Sequence[str]) -> tuple[Params, list]:
    """Empty parameters called ``names`` in a copy of a model without other weights, and that copy's modules, inside out."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        blank = type(model)(copy.deepcopy(cast("Any", model.config)))
    params = {}
    for name in names:
        # peft keeps a trained copy of a head under a longer name.
        path, _, leaf = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").rpartition(".")
        owner = blank.get_submodule(path)
        params[name] = torch.nn.Parameter(torch.empty(getattr(owner, leaf).shape), requires_grad=False)
        setattr(owner, leaf, params[name])
    return params, list(_inside_out(blank))


def _draw(params: Params, modules: list, generator: torch.Generator) -> Params:
    """New values of the empty ``params`` of :func:`_blank`, drawn from ``generator`` as the architecture draws them.

    Raises:
        ValueError: the architecture does not say how one of them starts.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())  # architectures draw from the global stream
        for value in params.values():
            value.fill_(math.nan)
        for model, module in modules:
            model._init_weights(module)
    undrawn = [name for name, value in params.items() if value.isnan().any()]
    require(not undrawn, f"{type(modules[-1][0]).__name__} does not say how its parameters {undrawn[:1]} are initialised, so "
            "they cannot be drawn afresh; take another architecture")
    return {name: value.clone() for name, value in params.items()}


def _inside_out(
    module: torch.nn.Module, model: Any = None
) -> Iterator[tuple[transformers.PreTrainedModel, torch.nn.Module]]:
    """Every module below and including ``module``, children first, with the model that initialises it."""
    model = module if isinstance(module, transformers.PreTrainedModel) else model
    for child in module.children():
        yield from _inside_out(child, model)
    yield model, module


def _fresh_adapter(name: str, like: Tensor, draw: torch.Generator) -> Tensor:
    """A fresh LoRA matrix as peft draws it: A uniform by He et al. with a = √5, B zero, so that ΔW starts at zero."""
    value = torch.zeros(like.shape)
    if ".lora_A." in name:
        torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=draw)
    return value
