"""A stand-in for the Hugging Face hub: a cache folder in which hub names resolve, offline, to something tiny.

The *real* `transformers` and `datasets` are run on it, so that the code for a workstation with the hub's models and
data is executed by tests on a machine without a network. A model has the architecture, the parameter names and the
kind of tokenizer of the real one, and random weights; a data set has the real one's columns, features and split names,
and a few dozen sentences whose words tell their class, so that something can be learned from them.

A new model is a line in `MODELS`, a new data set a line in `DATASETS` or, if it asks questions, in `QUESTIONS`. In a
subprocess, use `environment(folder)`: huggingface_hub reads its settings when it is imported. In the process itself,
`patched(folder)` changes them later.
"""

import hashlib
import os
import random
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import tokenizers
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from datasets.naming import camelcase_to_snakecase

COMMIT = "5" * 40
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 512}
# Larger weights than real ones, so that attention, windows and positions matter to logits of so few layers.
BOLD = TINY | {"initializer_range": 0.2}
BOLD_DECODER = BOLD | {"num_key_value_heads": 1, "head_dim": 16}
TINY_DISTIL = {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 512}

# hub id -> (model class that has the real checkpoint's parameters, its configuration, kind of tokenizer)
MODELS = {
    "bert-base-uncased": (transformers.BertForPreTraining, transformers.BertConfig(**TINY), "wordpiece"),
    "distilbert-base-uncased": (transformers.DistilBertForMaskedLM, transformers.DistilBertConfig(**TINY_DISTIL),
                                "wordpiece"),
    "roberta-base": (transformers.RobertaForMaskedLM,
                     transformers.RobertaConfig(**TINY | {"max_position_embeddings": 514, "type_vocab_size": 1}),
                     "bytes"),
    "sentence-transformers/all-MiniLM-L6-v2": (transformers.BertModel, transformers.BertConfig(**TINY), "wordpiece"),
    "facebook/opt-1.3b": (transformers.OPTForCausalLM,
                          transformers.OPTConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, ffn_dim=64,
                                                 word_embed_proj_dim=32, max_position_embeddings=512), "bytes"),
    "meta-llama/Llama-3.2-1B": (transformers.LlamaForCausalLM,
                                transformers.LlamaConfig(**TINY | {"num_key_value_heads": 1}), "bytes"),
    "gpt2": (transformers.GPT2LMHeadModel,
             transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=512), "bytes"),
    "microsoft/mpnet-base": (transformers.MPNetForMaskedLM,
                             transformers.MPNetConfig(**BOLD | {"max_position_embeddings": 514}), "mpnet"),
    "answerdotai/ModernBERT-base": (transformers.ModernBertForMaskedLM,
                                    transformers.ModernBertConfig(**BOLD, global_attn_every_n_layers=2, local_attention=8,
                                                                  classifier_pooling="mean"), "bytes"),
    "microsoft/deberta-v3-base": (transformers.DebertaV2ForMaskedLM,
                                  transformers.DebertaV2Config(**BOLD, relative_attention=True, position_buckets=8,
                                                               pos_att_type=["p2c", "c2p"], share_att_key=True,
                                                               norm_rel_ebd="layer_norm", position_biased_input=False,
                                                               type_vocab_size=0, legacy=False), "unigram"),
    "google/electra-base-discriminator": (transformers.ElectraForPreTraining,
                                          transformers.ElectraConfig(**BOLD, embedding_size=16), "wordpiece"),
    "albert-base-v2": (transformers.AlbertForPreTraining,
                       transformers.AlbertConfig(**BOLD, embedding_size=16, classifier_dropout_prob=0.1), "unigram"),
    "mistralai/Mistral-7B-v0.1": (transformers.MistralForCausalLM,
                                  transformers.MistralConfig(**BOLD_DECODER, sliding_window=8), "bytes"),
    "google/gemma-2-2b": (transformers.Gemma2ForCausalLM,
                          transformers.Gemma2Config(**BOLD_DECODER, sliding_window=8, query_pre_attn_scalar=16,
                                                    attn_logit_softcapping=2.0, final_logit_softcapping=1.0), "bytes"),
    "google/gemma-3-270m": (transformers.Gemma3ForCausalLM,
                            transformers.Gemma3TextConfig(**BOLD_DECODER, sliding_window=8, query_pre_attn_scalar=16,
                                                          layer_types=["sliding_attention", "full_attention"]), "bytes"),
    "Qwen/Qwen3-0.6B": (transformers.Qwen3ForCausalLM,
                        transformers.Qwen3Config(**BOLD_DECODER, use_sliding_window=True, sliding_window=8,
                                                 max_window_layers=1), "bytes"),
    "microsoft/Phi-3-mini-4k-instruct": (transformers.Phi3ForCausalLM,
                                         transformers.Phi3Config(**BOLD | {"num_key_value_heads": 2}, sliding_window=8),
                                         "bytes"),
    "EleutherAI/pythia-70m": (transformers.GPTNeoXForCausalLM,
                              transformers.GPTNeoXConfig(**BOLD, rotary_pct=0.25, tie_word_embeddings=False), "bytes"),
}

# hub id -> (text column, label column, class names, further columns, {split: rows per class}); None: labels are all -1
FULL, NO_VALIDATION = {"train": 40, "validation": 20, "test": 20}, {"train": 40, "test": 20}
DATASETS = {
    "cornell-movie-review-data/rotten_tomatoes": ("text", "label", ["neg", "pos"], [], FULL),
    "stanfordnlp/sst2": ("sentence", "label", ["negative", "positive"], ["idx"], FULL | {"test": None}),
    "stanfordnlp/imdb": ("text", "label", ["neg", "pos"], [], NO_VALIDATION | {"unsupervised": None}),
    "fancyzhx/ag_news": ("text", "label", ["World", "Sports", "Business", "Sci/Tech"], [], NO_VALIDATION),
    "CogComp/trec": ("text", "coarse_label", ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"], ["fine_label"],
                     NO_VALIDATION),
}

# hub id -> (configuration, features, {split: rows}); see `_question` for the rows
_TEXT, _LIST = datasets.Value("string"), datasets.List(datasets.Value("string"))
QUESTIONS = {
    "allenai/ai2_arc": ("ARC-Easy",
                        {"id": _TEXT, "question": _TEXT, "choices": {"text": _LIST, "label": _LIST}, "answerKey": _TEXT},
                        {"train": 60, "validation": 20, "test": 20}),
    "cais/mmlu": ("all", {"question": _TEXT, "subject": _TEXT, "choices": _LIST,
                          "answer": datasets.ClassLabel(names=["A", "B", "C", "D"])},
                  {"auxiliary_train": 60, "validation": 20, "dev": 8, "test": 20}),
}

SUBJECTS = [
    "dull tired boring flat lifeless weak clumsy stale",
    "warm funny moving brilliant charming fresh tender clever",
    "market shares profit bank trade price merger investor",
    "science software computer rocket planet laboratory robot network",
    "river island capital mountain country border city coast",
    "season match player coach goal team league champion",
]
FRAMES = ["a {} and {} story", "it was {} , almost {}", "the {} made everyone think of {}",
          "so {} that nobody missed the {}", "we saw a {} here and a {} there", "what a {} {} day",
          "they spoke of the {} and then of the {}"]


def fill(folder: Path) -> Path:
    """Put every model and data set of the tables into a Hugging Face home at `folder`, and return it."""
    folder = Path(folder)
    for hub_id in MODELS:
        _put_model(folder, hub_id)
    for hub_id in DATASETS:
        _put_dataset(folder, hub_id)
    for hub_id, (config, features, sizes) in QUESTIONS.items():
        rows = {split: [_question(hub_id, split, number) for number in range(size)] for split, size in sizes.items()}
        _put_rows(folder, hub_id, config, features, rows)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The environment of a subprocess that is to see the stand-in instead of the hub, and no corpus of this machine."""
    hidden = {"HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "DISTILLKIT_DATA"}
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def patched(folder: Path) -> Iterator[Path]:
    """The same inside this process, where the libraries have read their settings already."""
    home = str(folder)
    hub = {"HF_HOME": home, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": True}
    data = {"HF_CACHE_HOME": home, "HF_DATASETS_CACHE": folder / "datasets", "HF_HUB_OFFLINE": True}
    with (
        mock.patch.multiple(huggingface_hub.constants, **hub),
        mock.patch.multiple(datasets.config, **data),
        mock.patch.dict(os.environ, environment(folder), clear=True),
    ):
        yield folder


def sentences(label: int, count: int, seed: str) -> list[str]:
    """`count` distinct sentences of a class, lower case, of 4 to 12 words, two of which belong to that class only."""
    rng, found = random.Random(f"{seed}-{label}"), {}
    while len(found) < count:
        found[rng.choice(FRAMES).format(*rng.sample(SUBJECTS[label].split(), 2))] = None
    return list(found)


def rounding(student) -> float:
    """The relative error to allow in what a float64 student computes.

    GPT-2 and the encoders compute in float64 throughout. The other decoders take softmax and norms in float32 whatever their
    precision, so that two ways to the same number differ by a few float32 roundings, depending on the processor.
    """
    return 1e-6 if student.causal and student.module.config.model_type != "gpt2" else 1e-10


def _put_model(folder: Path, hub_id: str) -> None:
    build, config, kind = MODELS[hub_id]
    tokenizer = _tokenizer(kind)
    config = type(config)(**config.to_dict() | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config)
    home = folder / "hub" / f"models--{hub_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    model.save_pretrained(home / "snapshots" / COMMIT)
    tokenizer.save_pretrained(home / "snapshots" / COMMIT)


def _tokenizer(kind: str):
    """A tokenizer of the real kind, made from the stand-in's own sentences, the same in every process."""
    text = [sentence for label in range(len(SUBJECTS)) for sentence in sentences(label, 100, "tokenizer")]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted({word for sentence in text for word in sentence.split()} | {*string.punctuation} - {*letters})
    if kind in ("wordpiece", "mpnet"):
        bert = kind == "wordpiece"
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if bert else ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
        pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces + words))}
        build = transformers.BertTokenizerFast if bert else transformers.MPNetTokenizer
        return build(vocab=vocabulary, do_lower_case=True)
    if kind == "unigram":
        pieces = [*letters, "▁", *(f"▁{word}" for word in words), *string.punctuation]
        special = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
        scores = [(piece, 0.0) for piece in special] + [(piece, -len(special) / len(piece)) for piece in pieces]
        return transformers.AlbertTokenizer(vocab=scores)
    raw = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    raw.train_from_iterator(text, vocab_size=400, min_frequency=1, show_progress=False, special_tokens=special)
    model = tokenizers.Tokenizer.from_str(raw.to_str())
    return transformers.RobertaTokenizerFast(tokenizer_object=model)


def _put_dataset(folder: Path, hub_id: str) -> None:
    text, label, classes, further, sizes = DATASETS[hub_id]
    features = {text: _TEXT, label: datasets.ClassLabel(names=classes)} | dict.fromkeys(further, datasets.Value("int32"))
    rows = {split: [{text: sentence, label: value} | dict.fromkeys(further, number)
                    for number, (sentence, value) in enumerate(pairs)]
            for split, pairs in _splits(len(classes), sizes).items()}
    _put_rows(folder, hub_id, "default", features, rows)


def _put_rows(folder: Path, hub_id: str, config: str, features: dict, splits: dict[str, list[dict]]) -> None:
    """Write what `load_dataset` leaves behind: one Arrow stream a split, and `dataset_info.json`."""
    owner, name = hub_id.split("/")
    digest = hashlib.sha256(hub_id.encode()).hexdigest()
    home = folder / "datasets" / f"{owner}___{camelcase_to_snakecase(name)}" / config / "0.0.0" / digest[:40]
    home.mkdir(parents=True)
    features, infos = datasets.Features(features), datasets.SplitDict(dataset_name=name)
    for split, rows in splits.items():
        with ArrowWriter(path=str(home / f"{name}-{split}.arrow"), features=features) as writer:
            for row in rows:
                writer.write(row)
            count, size_in_bytes = writer.finalize()
        infos.add(datasets.SplitInfo(split, num_bytes=size_in_bytes, num_examples=count, dataset_name=name))
    info = datasets.DatasetInfo(features=features, splits=infos, builder_name="parquet", dataset_name=name,
                                config_name=config, version="0.0.0")
    info.write_to_directory(str(home))


def _question(hub_id: str, split: str, number: int) -> dict:
    """A sentence of one subject, and words of four of them to choose from: the one of its own subject is right."""
    rng = random.Random(f"{hub_id}-{split}-{number}")
    subjects = rng.sample(range(len(SUBJECTS)), 4)
    answer = rng.randrange(4)
    question = rng.choice(sentences(subjects[answer], 40, f"{hub_id}-{split}"))
    choices = [rng.choice(SUBJECTS[subject].split()) for subject in subjects]
    if hub_id == "cais/mmlu":
        subject = "" if split == "auxiliary_train" else ["poetry", "trade"][number % 2]
        return {"question": question, "subject": subject, "choices": choices, "answer": answer}
    keys = "ABCD" if number % 10 else "1234"  # a few of the real ones have numbers
    return {"id": f"{split}-{number}", "question": question, "choices": {"text": choices, "label": [*keys]},
            "answerKey": keys[answer]}


def _splits(classes: int, sizes: dict[str, int | None]) -> dict[str, list[tuple[str, int]]]:
    """Rows of sentence and label in random order; no sentence is in two splits."""
    pools = [iter(sentences(label, 100, "rows")) for label in range(classes)]
    splits = {}
    for split, size in sizes.items():
        rows = [(next(pool), label) for _ in range(size or 20) for label, pool in enumerate(pools)]
        random.Random(split).shuffle(rows)
        splits[split] = rows if size else [(sentence, -1) for sentence, _ in rows]
    return splits
