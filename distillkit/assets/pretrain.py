"""Two tiny language models that come with the package, and how they are made.

A set that was distilled for one language model is worth most if another can train on its text.  Showing that needs two
models with different architectures and tokenizers, also on a machine without a model hub.  So ``tiny-opt`` (OPT,
byte-level BPE) and ``tiny-llama`` (Llama, BPE on pieces of words with single bytes for rare characters) are pre-trained
here, each within the hour on one CPU thread:

    python -m distillkit.assets.pretrain tiny-opt

*What they read.*  The docstrings of the libraries of :mod:`distillkit.data.docstrings`, without every sentence that the
corpora there hold, so that no score measures memory.  A docstring with a sentence of a validation or test split is left
out altogether.  Where the first sentence is one of a training split, its paragraph is left out.  A pass reads what remains
once under its dotted path, and the first sentence of each remaining paragraph several times next to that path.  So the
models know what a library speaks of, and were never shown a sentence that is asked about.

*How.*  `transformers.Trainer` with AdamW and a cosine that falls to 0.  Documents follow each other without padding.  The
first three quarters are read in rows of 128 tokens and the rest in rows of 256, as BERT's training was split (Devlin et
al., 2019), since short rows are quicker.  The same steps and seed give the same bytes on one thread.  Arithmetic is
float32: on CPUs without bfloat16 instructions autocast to bfloat16 was measured to be about fifteen times slower.

What is written is a model folder in the hub's layout, with a model card and the SHA-256 of every file that is loaded;
:func:`~distillkit.io.packaged.asset` checks them.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from distillkit.data import docstrings as sources
from distillkit.data.docstrings import first_sentence, mask_libraries, same_sentence_key, without_markup
from distillkit.io.checks import check_whole
from distillkit.io.escaping import one_line, say
from distillkit.io.packaged import ASSETS, FILES, MANIFEST, AssetError
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.storage import save_text
from distillkit.io.verify import sha256_of

LONGEST = 1000  # characters of a docstring
# Short forms of a sentence, and how often each is read in a pass.
FORMS = {"{path}: {sentence}": 1, "{sentence} -- {path}": 2, "{sentence} -> {name} ({module})": 1}
LENGTHS, LONG_ROWS_FROM = (128, 256), 0.75  # tokens in a row, and the share of the run that has short rows
PEAK, WARMUP = 2e-3, 0.03  # learning rate, and the share of the run in which it rises
STEPS = 1600  # about 45 minutes on one thread
BATCH = 4096  # tokens in a step, a multiple of the longest row
POINTS = 20  # of the loss curve
VALIDATION_TOKENS = 16384


# --- text ------------------------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """Documents to train on, each with its number of copies in a pass; documents to validate on; and what they are of."""

    train: list[tuple[str, int]]
    validation: list[str]
    facts: dict


def documents(docstrings: Mapping[str, str], held_out: frozenset[str], training: frozenset[str] = frozenset()) -> Text:
    """What a model reads of ``docstrings`` (dotted path → docstring).

    No document contains a sentence of ``held_out`` or ``training`` (keys of :func:`same_sentence_key`), even inside another
    sentence.  A docstring with a sentence of ``held_out`` is left out altogether, and one whose first sentence is of
    ``training`` loses its first paragraph.  One docstring in a hundred, by the hash of its first sentence, is for validation.
    """
    train, validation, count = [], [], 0
    is_held_out, is_asked = _finder(held_out), _finder(held_out | training)
    for path, docstring in progress(sorted(docstrings.items()), desc="reading docstrings", leave=False):
        sentence = first_sentence(docstring)
        if is_held_out(sentence or "") or is_held_out(docstring):
            continue
        paragraphs = re.split(r"\n\s*\n", docstring.strip())[is_asked(sentence or "") :]
        read = [(document, copies) for document, copies in _forms(path, paragraphs) if not is_asked(document)]
        count += bool(read)
        if derive_seed("pretrain-validation", same_sentence_key(sentence or docstring)) % 100 == 0:
            validation += [document for document, _ in read]
        else:
            train += read
    return Text(train, validation, {
        "docstrings": len(docstrings), "kept": count, "characters": sum(len(text) for text, _ in train),
        **{name: {"sentences": len(keys), "sha256": _digest(sorted(keys))}
           for name, keys in (("held_out", held_out), ("training", training))}})


def documents_of_libraries() -> Text:
    """:func:`documents` of the installed libraries, without the sentences of the corpora that are made of them."""
    docstrings = {}
    for library in progress(sources.LIBRARIES, desc="parsing libraries", leave=False):
        docstrings |= sources.documented(library)
    text = documents(docstrings, sources.sentence_keys("validation", "test"), sources.sentence_keys("train"))
    text.facts["libraries"] = {library: importlib.metadata.version(library) for library in sources.LIBRARIES}
    return text


def _forms(path: str, paragraphs: list[str]) -> Iterator[tuple[str, int]]:
    """The documents of a docstring, each with its copies: its paragraphs, and the first sentence of each in short forms."""
    if text := _plain(paragraphs):
        yield f"{path}\n{text}", 1
    module, _, name = path.rpartition(".")
    for sentence in dict.fromkeys(filter(None, map(first_sentence, paragraphs if module else ()))):
        for form, copies in FORMS.items():
            yield form.format(path=path, sentence=sentence, name=name, module=module), copies


def _finder(keys: frozenset[str]) -> Callable[[str], bool]:
    """A function that says whether one of these keys occurs in a text as a run of words, names masked.

    It looks at the text with markup and without: a link with a title holds words that no sentence has.
    """
    sentences = defaultdict(list)  # by their first words, or it would compare every key at every word
    for key in keys:
        words = key.split()
        sentences[tuple(words[:4])].append(words)
    sizes = {*map(len, sentences)}

    def occurs(text: str) -> bool:
        for plain in {re.sub(r":[\w:+-]+:(?=`)", "", text), without_markup(text)}:
            words = same_sentence_key(mask_libraries(plain)).split()
            if any(words[i : i + len(sentence)] == sentence for i in range(len(words)) for size in sizes
                   for sentence in sentences.get(tuple(words[i : i + size]), ())):
                return True
        return False

    return occurs


def _plain(paragraphs: list[str]) -> str:
    """Paragraphs as lines, rules under headings taken off, cut after a word at ``LONGEST`` characters."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"([-=~^*])\1{2,}", "", "\n\n".join(paragraphs)))
    text = "\n".join(line for paragraph in paragraphs if (line := " ".join(paragraph.split())))
    return text if len(text) <= LONGEST else re.sub(r"\s+\S*$", "", text[:LONGEST])


# --- models ----------------------------------------------------------------------------------------------------------

def opt_tokenizer(texts: list[str], size: int = 4096) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's special tokens; as in OPT, ``</s>`` stands in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return _wrapped(bpe, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")


def llama_tokenizer(texts: list[str], size: int = 3072) -> transformers.PreTrainedTokenizerFast:
    """BPE as SentencePiece does it for Llama: spaces are ``▁``, digits stand alone, rare characters fall back to bytes."""
    special = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = Regex(r"▁?\p{L}+|▁?\p{N}|▁?[^▁\s\p{L}\p{N}]+|▁|\s")
    bpe.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
    trainer = trainers.BpeTrainer(vocab_size=size - len(special), limit_alphabet=128, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(trained["vocab"], key=trained["vocab"].get)])}
    bpe.model = models.BPE(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]], unk_token="<unk>", fuse_unk=True,
                           byte_fallback=True)
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return _wrapped(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _wrapped(bpe: Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    bos = special["bos_token"]
    bpe.add_special_tokens(sorted({*special.values()}, key=bpe.token_to_id))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=LENGTHS[-1], **special)


# Of each kind: its tokenizer, its architecture, and a configuration of 4 layers and width 192.
KINDS = {
    "tiny-opt": (opt_tokenizer, transformers.OPTForCausalLM, transformers.OPTConfig(
        hidden_size=192, word_embed_proj_dim=192, num_hidden_layers=4, num_attention_heads=6, ffn_dim=768,
        activation_function="relu", dropout=0.0, attention_dropout=0.0)),
    "tiny-llama": (llama_tokenizer, transformers.LlamaForCausalLM, transformers.LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2)),
}


def fresh_model(name: str, tokenizer: transformers.PreTrainedTokenizerFast, seed: int) -> transformers.PreTrainedModel:
    """A model with random weights for that tokenizer: 2.6 million parameters with the 4,096 tokens of tiny-opt, 2.2 million
    with the 3,072 of tiny-llama."""
    _, build, config = KINDS[name]
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTHS[-1], "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global stream
        torch.manual_seed(derive_seed("pretrain-init", name, seed))
        return build(type(config)(**config.to_dict() | sizes | special))


# --- training --------------------------------------------------------------------------------------------------------

def train(name: str, text: Text, *, steps: int, seed: int = 0, runs: str | Path) -> tuple[transformers.Trainer, dict]:
    """Train a model; a run that was interrupted goes on from its last checkpoint.

    Args:
        name: ``"tiny-opt"`` or ``"tiny-llama"``.
        steps: length of the run, of ``BATCH`` tokens each.
        seed: draws the initial weights and the order of the documents.
        runs: folder for checkpoints; each run has a folder there, named after its settings and its text.

    Returns:
        the trainer, which holds model and tokenizer, and the record of the run, for ``training.json`` and the model card.

    Raises ValueError for no steps or too little text, and FloatingPointError if the loss is not finite.
    """
    check_whole("steps", steps)
    tokenizer = KINDS[name][0]([document for document, _ in text.train])
    settings = {"name": name, "steps": steps, "seed": seed, "batch": BATCH,
                "text": _digest([f"{count} {document}" for document, count in text.train] + text.validation),
                "tokenizer": _digest([tokenizer.backend_tokenizer.to_str()])}
    folder = Path(runs) / f"pretrain-{name}-{_digest([json.dumps(settings)])[:8]}"
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    model = fresh_model(name, tokenizer, seed)
    begun = transformers.TrainerState.load_from_json(f"{checkpoint}/trainer_state.json").global_step if checkpoint else 0
    batches, validation, passes = _batches(text, tokenizer, steps, seed)
    trainer = _trainer(model, tokenizer, batches, validation, seed, folder)
    seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    seconds *= steps / max(1, steps - begun)  # of the whole run, at the pace of its last start
    curve = _curve(trainer.state.log_history)
    if not math.isfinite(curve[-1]["validation_loss"]):
        raise FloatingPointError(f"{name}, step {steps}: the loss is {curve[-1]['validation_loss']}; lower pretrain.PEAK")
    return trainer, {
        "settings": settings, "architecture": type(model).__name__, "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer), "steps": steps, "tokens": steps * BATCH, "passes": round(passes, 2),
        "minutes": round(seconds / 60, 1), "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "tokenizers")},
        "text": text.facts, "curve": curve}


def _trainer(model, tokenizer, batches: list[Tensor], validation: Tensor, seed: int, folder: Path) -> transformers.Trainer:
    every = max(1, len(batches) // POINTS)
    return transformers.Trainer(
        model=model, processing_class=tokenizer, train_dataset=batches, eval_dataset=[validation],
        data_collator=lambda items: {"input_ids": items[0], "labels": items[0]},  # an item is the batch of a step
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=len(batches), seed=seed, per_device_train_batch_size=1,
            train_sampling_strategy="sequential", learning_rate=PEAK, lr_scheduler_type="cosine", warmup_steps=WARMUP,
            weight_decay=0.1, adam_beta2=0.95, logging_steps=every, eval_strategy="steps", eval_steps=every, save_steps=every,
            save_total_limit=1, use_cpu=True, remove_unused_columns=False, logging_nan_inf_filter=False))


def _batches(text: Text, tokenizer, steps: int, seed: int) -> tuple[list[Tensor], Tensor, float]:
    """The rows of tokens of each step [r, l], those to validate on [v, 256], and how many passes over the text that is."""
    documents, copies = encode(tokenizer, [document for document, _ in text.train]), [count for _, count in text.train]
    validation = torch.cat([torch.empty(0, dtype=torch.long), *encode(tokenizer, text.validation)])
    size = sum(len(ids) * count for ids, count in zip(documents, copies))
    rows = min(len(validation), VALIDATION_TOKENS) // LENGTHS[-1]
    if size < BATCH or rows < 1:
        raise ValueError(f"too little text: {size} tokens to train on and {len(validation)} to validate on, and there must "
                         f"be {BATCH} and {LENGTHS[-1]} or more; give more documents")
    tokens = token_stream(documents, copies, steps * BATCH, seed)
    batches = [step.view(-1, LENGTHS[number >= LONG_ROWS_FROM * steps]) for number, step in enumerate(tokens.split(BATCH))]
    return batches, validation[: rows * LENGTHS[-1]].view(-1, LENGTHS[-1]), steps * BATCH / size


def encode(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of each document, bos in front and eos at the end (once, where the two are the same token)."""
    bpe, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    bpe.encode_special_tokens = True  # a docstring that spells </s> means four characters
    ids = [torch.tensor(encoding.ids + [eos] * (eos != tokenizer.bos_token_id)) for encoding in bpe.encode_batch_fast(texts)]
    bpe.encode_special_tokens = False
    return ids


def token_stream(documents: list[Tensor], copies: Sequence[int], size: int, seed: int) -> Tensor:
    """``size`` tokens of passes over all documents, each as often as its copies, in an order of its own in each pass."""
    which = torch.arange(len(documents)).repeat_interleave(torch.tensor(copies))
    passes: list[Tensor] = []
    while sum(map(len, passes)) < size:
        order = torch.randperm(len(which), generator=generator("pretrain-order", seed, len(passes)))
        passes.append(torch.cat([documents[number] for number in which[order].tolist()]))
    return torch.cat(passes)[:size]


def _curve(logs: list[dict]) -> list[dict]:
    """The loss curve from a trainer's logs: at each point the mean training loss since the last one, and validation loss."""
    points = {log["step"]: {"step": log["step"], "tokens": log["step"] * BATCH, "train_loss": round(log["loss"], 4)}
              for log in logs if "loss" in log}
    losses = {log["step"]: round(log["eval_loss"], 4) for log in logs if "eval_loss" in log}
    return [point | {"validation_loss": losses[step]} for step, point in points.items()]


def write(trainer: transformers.Trainer, record: dict, out: str | Path = ASSETS) -> Path:
    """Write the model folder ``out/NAME``, weights in bfloat16, and return its path; an older one is replaced.

    Raises AssetError if ``out/NAME`` holds something else.
    """
    folder = Path(out) / record["settings"]["name"]
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise AssetError(f"will not overwrite {folder}: it has no {MANIFEST}, so it is not a model of this package; "
                         "choose another folder, or delete it yourself")
    trainer.model.to(torch.bfloat16).save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    save_text(folder / "training.json", json.dumps(record, indent=1) + "\n")
    save_text(folder / "README.md", card(record))
    digests = {file: sha256_of(folder / file) for file in FILES}
    save_text(folder / MANIFEST, json.dumps({"sha256": digests}, indent=1) + "\n")  # last: until then the folder is refused
    return folder


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# --- model card and command line -------------------------------------------------------------------------------------
def card(record: dict) -> str:
    """The model card, README.md, of the record of a run."""
    settings, text, name = record["settings"], record["text"], record["settings"]["name"]
    libraries, versions = (", ".join(map(" ".join, names.items())) for names in (text["libraries"], record["versions"]))
    rows = "\n".join(f"| {p['step']:,} | {p['tokens']:,} | {p['train_loss']:.3f} | {p['validation_loss']:.3f} |"
                     for p in record["curve"])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model of {record["parameters"] / 1e6:.1f} million parameters: `{record["architecture"]}`, \
{record["vocabulary"]:,} tokens, {LENGTHS[-1]} positions. It was trained by and for distillkit, so that text distilled for \
one architecture can be tried on another on a machine that reaches no model hub.

## Text

{text["kept"]:,} of the {text["docstrings"]:,} docstrings of {libraries} were read in part. What remained of each was \
read under its dotted path, cut at {LONGEST:,} characters; and the first sentence of each of its paragraphs, library names \
masked, was read {sum(FORMS.values())} times more, next to its name and path. No sentence of `docstrings` or \
`docstrings_qa` was read, of any split: a docstring with one of the {text["held_out"]["sentences"]:,} sentences of the \
validation and test splits was left out, and so were paragraphs with one of the {text["training"]["sentences"]:,} of the \
training splits. One docstring in a hundred was kept for the validation loss.

## Training

    python -m distillkit.assets.pretrain {name} --steps {record["steps"]} --seed {settings["seed"]} \
--threads {record["threads"]}

{record["steps"]:,} steps of {settings["batch"]:,} tokens, {record["tokens"]:,} in all ({record["passes"]:.1f} passes over \
the text), took {record["minutes"]:.0f} minutes. Threads: {record["threads"]}. AdamW, learning rate {PEAK:g}, falling to 0 \
along a cosine. Arithmetic was float32; the weights are stored in bfloat16. On a CPU without bfloat16 instructions autocast \
to bfloat16 was measured to be about fifteen times slower. Made with {versions}.

Loss in nats a token; training: the mean since the row above.

| step | tokens | training | validation |
|---:|---:|---:|---:|
{rows}

## Use and limits

For lessons, tests and small experiments. It continues phrases of API documentation and can be tuned to questions about \
it; it knows nothing else, says wrong things fluently, and was not made safe for any application. Licence: Apache-2.0. The \
docstrings are under the licences of their libraries (BSD and similar ones).
"""


def main(argv: list[str] | None = None) -> int:
    """Pre-train a model and write it; returns the exit code: 0, or 2 for bad input, 130 for an interruption."""
    parser = argparse.ArgumentParser(prog="python -m distillkit.assets.pretrain", description="Pre-train a tiny model.")
    parser.add_argument("name", choices=tuple(KINDS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"length of the run (default {STEPS}, about 45 minutes)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=ASSETS, help="folder for the model folder")
    parser.add_argument("--runs", default="runs", help="folder for checkpoints; delete that of a run to start it over")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        trainer, record = train(args.name, documents_of_libraries(), steps=args.steps, seed=args.seed, runs=args.runs)
        say(f"{write(trainer, record, args.out)}: {record['tokens']:,} tokens; {record['curve'][-1]}")
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"error: {one_line(error)}", error=True)
        return 2
    except KeyboardInterrupt:
        say("\ninterrupted; give the same command again to go on from the last checkpoint", error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
