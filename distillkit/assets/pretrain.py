"""Two tiny language models that come with the package, and how they are made.

A set that was distilled for one language model is worth most if another can train on its text.  Showing that needs two
models which know something, of different architecture and with different tokenizers, and a machine without a model hub
has none.  So ``tiny-opt`` (OPT, byte-level BPE) and ``tiny-llama`` (Llama, BPE on pieces of words with single bytes for
rare characters) are pre-trained here, each within the hour on one CPU thread:

    python -m distillkit.assets.pretrain tiny-opt --minutes 45

*What they read.*  The docstrings of the libraries of :mod:`distillkit.data.corpora`.  Each is read once a pass under its dotted
path, and several times as its first sentence next to that path, which is the knowledge that later questions ask for.  A
docstring in which a sentence of the questions' validation or test split occurs, anywhere, is left out altogether.

*How.*  Documents follow each other without padding.  The learning rate follows the time spent (or the steps made, if
their number is given, which makes a run repeatable to the bit), so that a run of any length ends with small steps.  The
first three quarters are read in rows of 128 tokens and the rest in rows of 256, as BERT's training was split (Devlin et
al., 2019), since short rows are quicker.  Arithmetic is float32: on CPUs without bfloat16 instructions autocast to
bfloat16 was measured to be about fifteen times slower.

What is written is a model folder in the hub's layout, with a model card and the SHA-256 of every file that is loaded;
:func:`asset` checks them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from distillkit.data import corpora
from distillkit.data.corpora import first_sentence, mask_libraries, same_sentence_key
from distillkit.io.checkpoint import check_settings
from distillkit.io.checks import check_choice
from distillkit.io.escaping import one_line, say
from distillkit.io.files import read_file, write_file
from distillkit.io.packaged import ASSETS, FILES, MANIFEST, AssetError
from distillkit.io.progress import progress
from distillkit.io.restart import started
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.signals import Ended, ending_signals
from distillkit.io.storage import Claim, save_text
from distillkit.io.verify import sha256_of

KIND = "pretraining-checkpoint"

LONGEST = 1000  # characters of a docstring
# Short forms of a docstring, and how often each is read in a pass.
FORMS = {"{path}: {sentence}": 1, "{sentence} -- {path}": 2, "{sentence} -> {name} ({module})": 1}
LENGTHS, MICRO = (128, 256), 2048  # tokens in a row, and in what is computed at once
PEAK, WARMUP, LONG_ROWS_FROM = 2e-3, 0.03, 0.75
POINTS = 20  # of the loss curve
VALIDATION_TOKENS = 16384
CHECKPOINT_SECONDS = 180


# --- text ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents to train on, each with its number of copies in a pass; documents to validate on; and what they are of."""

    train: list[tuple[str, int]]
    validation: list[str]
    facts: dict


def documents(docstrings: Mapping[str, str], held_out: frozenset[str]) -> Text:
    """What a model reads of ``docstrings`` (dotted path → docstring).

    Left out is every docstring in which a sentence of ``held_out`` (keys as of ``corpora.same_sentence_key``) occurs,
    be it as part of another sentence.  One docstring in a hundred, by the hash of its first sentence, is for validation.
    """
    train, validation, kept = [], [], 0
    occurs = _finder(held_out)
    for path, docstring in progress(sorted(docstrings.items()), desc="reading docstrings", leave=False):
        sentence = first_sentence(docstring)
        if (sentence and same_sentence_key(sentence) in held_out) or occurs(docstring):
            continue
        kept += 1
        module, _, name = path.rpartition(".")
        read = [(f"{path}\n{_plain(docstring)}", 1)]
        if sentence and module:
            values = {"path": path, "sentence": sentence, "name": name, "module": module}
            read += [(form.format(**values), copies) for form, copies in FORMS.items()]
        if derive_seed("pretrain-validation", same_sentence_key(sentence or docstring)) % 100 == 0:
            validation += [document for document, _ in read]
        else:
            train += read
    facts = {
        "docstrings": len(docstrings),
        "kept": kept,
        "characters": sum(len(text) for text, _ in train),
        "held_out": {"sentences": len(held_out), "sha256": _digest(sorted(held_out))},
    }
    return Text(train, validation, facts)


def library_documents() -> Text:
    """:func:`documents` of the installed libraries, without the sentences that questions will judge it on."""
    from distillkit.data import instruction

    docstrings = {}
    with corpora.collector_paused():
        for library in progress(corpora.LIBRARIES, desc="parsing libraries", leave=False):
            docstrings |= corpora.documented(library)
    text = documents(docstrings, instruction.held_out())
    versions = {library: importlib.metadata.version(library) for library in corpora.LIBRARIES}
    return dataclasses.replace(text, facts=text.facts | {"libraries": versions})


def _finder(held_out: frozenset[str]):
    """A function that tells whether one of these keys occurs in a docstring as a run of words, names masked."""
    keys = [key.split() for key in held_out]
    starts: dict[tuple[str, ...], list[list[str]]] = {}  # by the first words, or it would compare every key at every word
    for key in keys:
        starts.setdefault(tuple(key[:4]), []).append(key)
    sizes = {len(start) for start in starts}

    def occurs(docstring: str) -> bool:
        words = same_sentence_key(mask_libraries(re.sub(r":[\w:+-]+:(?=`)", "", docstring))).split()
        return any(
            words[i : i + len(key)] == key
            for size in sizes
            for i in range(len(words) - size + 1)
            for key in starts.get(tuple(words[i : i + size]), ())
        )

    return occurs


def _plain(docstring: str) -> str:
    """Paragraphs as lines, rules under headings taken off, cut after a word at ``LONGEST`` characters."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"([-=~^*])\1{2,}", "", docstring))
    text = "\n".join(line for paragraph in paragraphs if (line := " ".join(paragraph.split())))
    return text if len(text) <= LONGEST else re.sub(r"\s+\S*$", "", text[:LONGEST])


# --- models ----------------------------------------------------------------------------------------------------------


def opt_tokenizer(texts: list[str], size: int = 4096) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's special tokens; as in OPT, ``</s>`` stands in front of every text."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
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
    found = json.loads(bpe.to_str())["model"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(found["vocab"], key=found["vocab"].get)])}
    merges = [tuple(pair) for pair in found["merges"]]
    bpe.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    return _wrapped(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def _wrapped(bpe: Tokenizer, **special: str) -> transformers.PreTrainedTokenizerFast:
    bos = special["bos_token"]
    bpe.add_special_tokens(sorted({*special.values()}, key=cast("Any", bpe.token_to_id)))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=LENGTHS[-1], **special)


def opt_model(**shared) -> transformers.OPTForCausalLM:
    """OPT of 4 layers and width 192: 2.6 million parameters with 4,096 tokens."""
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        hidden_size=192, word_embed_proj_dim=192, num_hidden_layers=4, num_attention_heads=6, ffn_dim=768,
        activation_function="relu", dropout=0.0, attention_dropout=0.0, **shared,
    ))


def llama_model(**shared) -> transformers.LlamaForCausalLM:
    """Llama of 4 layers and width 192, three heads to a key: 2.2 million parameters with 3,072 tokens."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, **shared,
    ))


KINDS = {"tiny-opt": (opt_tokenizer, opt_model), "tiny-llama": (llama_tokenizer, llama_model)}


# --- training --------------------------------------------------------------------------------------------------------


def rate(done: float) -> float:
    """Factor on the learning rate when the share ``done`` (0..1) of the run is over: linear up, half a cosine down to 0."""
    if done < WARMUP:
        return (done + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


class Pretraining:
    """One run, from its text to a model folder; a run that was interrupted goes on.

    Args:
        name: ``"tiny-opt"`` or ``"tiny-llama"``.
        text: what to read.
        steps: length of the run in steps; the same steps and seed give the same bytes on one thread.
        minutes: length of the run in time, if not in steps.
        seed: draws the initial weights and the order of the documents.
        batch: tokens in a step, a multiple of 256.
        runs: folder for the checkpoint, ``runs/pretrain-NAME``.

    Raises:
        ValueError: settings that cannot be, too little text, or a checkpoint of a run with other settings or other text.
    """

    def __init__(self, name: str, text: Text, *, steps: int | None = None, minutes: float | None = None, seed: int = 0,
                 batch: int = 4096, runs: str | Path = "runs"):
        check_choice("name", name, KINDS)
        given = minutes if steps is None else steps
        if (steps is None) == (minutes is None) or given is None or given <= 0:
            raise ValueError(f"give steps or minutes, one of them and above 0, not steps={steps!r}, minutes={minutes!r}")
        if batch < 1 or batch % LENGTHS[-1]:
            raise ValueError(f"batch must be a multiple of {LENGTHS[-1]} tokens, not {batch!r}")
        self.name, self.text, self.steps, self.minutes, self.seed, self.batch = name, text, steps, minutes, seed, batch
        self.checkpoint = Path(runs) / f"pretrain-{name}"
        self.losses: list[float] = []  # one a step
        self.curve: list[dict] = []
        self.seconds = 0.0
        self.tokenizer = KINDS[name][0]([document for document, _ in text.train])
        self.model = _fresh_model(name, self.tokenizer, seed)
        self.parameters = dict(self.model.named_parameters())
        matrices, vectors = ([p for p in self.parameters.values() if (p.ndim > 1) is wanted] for wanted in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
        self.settings = {
            "name": name, "steps": steps, "minutes": minutes, "seed": seed, "batch": batch,
            "text": _digest([f"{copies} {document}" for document, copies in text.train] + text.validation),
            "tokenizer": _digest([self.tokenizer.backend_tokenizer.to_str()]),
        }
        if self.checkpoint.exists():
            self._resume()
        self._prepare()

    @property
    def done(self) -> float:
        """Share of the run that is over, 0..1."""
        if self.steps:
            return min(1.0, len(self.losses) / self.steps)
        assert self.minutes is not None  # one of the two is given
        return min(1.0, self.seconds / (60 * self.minutes))

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return len(self.losses) * self.batch

    def run(self) -> Iterator[float]:
        """Train to the end, yielding the loss of every step (mean over its tokens, in nats).

        Raises:
            FloatingPointError: the loss is not finite.
        """
        saved = time.perf_counter()
        with progress(total=1000, initial=round(1000 * self.done), desc=self.name, unit="‰") as bar:
            while self.done < 1:
                begun, before = time.perf_counter(), self.done
                loss = self._step()
                self.seconds += time.perf_counter() - begun
                if int(POINTS * self.done) > int(POINTS * before):
                    begun = time.perf_counter()
                    self._measure()
                    self.seconds += time.perf_counter() - begun
                if self.done == 1 or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.perf_counter()
                bar.update(round(1000 * self.done) - bar.n)
                bar.set_postfix(loss=f"{loss:.3f}", step=len(self.losses))
                yield loss

    def save(self) -> None:
        """Write a checkpoint of the whole run."""
        tensors = {f"model.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(p, {}).items()}
        data = {"settings": self.settings, "seconds": self.seconds, "losses": self.losses, "curve": self.curve}
        write_file(self.checkpoint, kind=KIND, tensors=tensors, data=data)

    def write(self, out: str | Path = ASSETS) -> Path:
        """Write the model folder ``out/NAME``, weights in bfloat16, and return its path; an older one is replaced.

        Raises:
            AssetError: ``out/NAME`` holds something else.
        """
        folder = Path(out) / self.name
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise AssetError(f"will not overwrite {folder}: it has no {MANIFEST}, so it is not a model of this package; "
                             "choose another folder, or delete it yourself")
        folder.mkdir(parents=True, exist_ok=True)
        cast("Any", copy.deepcopy(self.model)).to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        record = self.record()
        save_text(folder / "training.json", json.dumps(record, indent=1) + "\n")
        save_text(folder / "README.md", card(record))
        manifest = {"sha256": {file: sha256_of(folder / file) for file in FILES}}
        save_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")  # last: until then the folder is refused
        return folder

    def record(self) -> dict:
        """What is known about the run, for ``training.json`` and the model card."""
        versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "tokenizers")}
        return {
            "settings": self.settings,
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.parameters.values()),
            "vocabulary": len(self.tokenizer),
            "steps": len(self.losses),
            "tokens": self.tokens,
            "passes": round(len(self.losses) / self.steps_per_pass, 2),
            "minutes": round(self.seconds / 60, 1),
            "threads": torch.get_num_threads(),
            "versions": versions,
            "text": self.text.facts,
            "curve": self.curve,
        }

    def _step(self) -> float:
        length = LENGTHS[self.done >= LONG_ROWS_FROM]
        inputs, targets = self._batch(length)
        total, share = 0.0, MICRO // length
        for x, y in zip(inputs.split(share), targets.split(share)):
            loss = self._loss(x, y) * (len(x) / len(inputs))
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{self.name}, step {len(self.losses) + 1}: the loss is {total}; lower pretrain.PEAK")
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK * rate(self.done)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        return total

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(input_ids=x, use_cache=False).logits  # [b, l, v]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    @torch.no_grad()
    def _measure(self) -> None:
        share = MICRO // LENGTHS[-1]
        pieces = list(zip(*(part.split(share) for part in self.validation)))
        loss = sum(self._loss(x, y).item() * len(x) for x, y in pieces) / len(self.validation[0])
        since = self.losses[self.curve[-1]["step"] if self.curve else 0 :]
        self.curve.append({
            "step": len(self.losses), "tokens": self.tokens, "minutes": round(self.seconds / 60, 2),
            "train_loss": round(sum(since) / len(since), 4), "validation_loss": round(loss, 4),
        })

    def _batch(self, length: int) -> tuple[Tensor, Tensor]:
        number, i = divmod(len(self.losses), self.steps_per_pass)
        return _rows(self._pass(number)[i * self.batch : (i + 1) * self.batch + 1], length)

    def _pass(self, number: int) -> Tensor:
        """All tokens of a pass, the documents in an order of its own."""
        current, tokens = self._current
        if current != number or tokens is None:
            which = torch.arange(len(self.copies)).repeat_interleave(self.copies)
            order = torch.randperm(len(which), generator=generator("pretrain-order", self.seed, number))
            tokens = torch.cat([self.encoded[i] for i in which[order].tolist()])
            self._current = number, tokens
        return tokens

    def _encode(self, texts: list[str]) -> list[Tensor]:
        """Token ids of each document, bos in front and eos at the end (once, where the two are the same token)."""
        bpe, eos = self.tokenizer.backend_tokenizer, self.tokenizer.eos_token_id
        end = [] if eos == self.tokenizer.bos_token_id else [eos]
        bpe.encode_special_tokens = True  # a docstring that spells </s> means four characters
        ids = [torch.tensor(bpe.encode(text).ids + end, dtype=torch.int32)
               for text in progress(texts, desc="tokenizing", leave=False)]
        bpe.encode_special_tokens = False
        return ids

    def _prepare(self) -> None:
        """Turn the text into tokens."""
        self.encoded = self._encode([document for document, _ in self.text.train])
        self.copies = torch.tensor([copies for _, copies in self.text.train])
        self._current: tuple[int | None, Tensor | None] = (None, None)  # number and tokens of the pass that is being read
        size = sum(copies * len(ids) for copies, ids in zip(self.copies.tolist(), self.encoded))
        validation = torch.cat([torch.empty(0, dtype=torch.int32), *self._encode(self.text.validation)])
        self.steps_per_pass, rows = (size - 1) // self.batch, min(len(validation) - 1, VALIDATION_TOKENS) // LENGTHS[-1]
        if self.steps_per_pass < 1 or rows < 1:
            raise ValueError(f"too little text: {size} tokens to train on and {len(validation)} to validate on, and there must "
                             f"be more than batch={self.batch} and more than {LENGTHS[-1]}; give more documents")
        self.validation = _rows(validation[: rows * LENGTHS[-1] + 1], LENGTHS[-1])

    def _resume(self) -> None:
        stored = read_file(self.checkpoint, kind=KIND)
        check_settings(self.checkpoint, stored.data["settings"], self.settings)
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(stored.tensors[f"model.{name}"])
                adam = {k: stored.tensors.get(f"adam.{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {k: v for k, v in adam.items() if v is not None}
        self.seconds, self.losses, self.curve = (stored.data[k] for k in ("seconds", "losses", "curve"))


def _fresh_model(name: str, tokenizer: transformers.PreTrainedTokenizerFast, seed: int) -> transformers.PreTrainedModel:
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global stream
        torch.manual_seed(derive_seed("pretrain-init", name, seed))
        return KINDS[name][1](
            vocab_size=len(tokenizer), max_position_embeddings=LENGTHS[-1], tie_word_embeddings=True, **ids
        )


def _rows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[rows, length]`` of a stretch of rows · length + 1 tokens."""
    tokens = tokens.long()
    return tokens[:-1].view(-1, length), tokens[1:].view(-1, length)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


# --- model card and command line -------------------------------------------------------------------------------------


def card(record: dict) -> str:
    """The model card, README.md, of a run's :meth:`Pretraining.record`."""
    settings, text, name = record["settings"], record["text"], record["settings"]["name"]
    length = f"--steps {settings['steps']}" if settings["steps"] else f"--minutes {settings['minutes']:g}"
    rows = "\n".join(
        f"| {r['step']:,} | {r['tokens']:,} | {r['minutes']:.1f} | {r['train_loss']:.3f} | {r['validation_loss']:.3f} |"
        for r in record["curve"]
    )
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

{text["kept"]:,} of the {text["docstrings"]:,} docstrings of {_named(text["libraries"])}. Each was read under its dotted \
path, cut at {LONGEST:,} characters; and its first sentence, library names masked, was read {sum(FORMS.values())} times \
more, next to its name and path. Left out were all docstrings in which one of the {text["held_out"]["sentences"]:,} first \
sentences of the validation and test split of `docstrings_qa` occurs; those of its training split were read. \
One docstring in a hundred was kept for the validation loss.

## Training

    python -m distillkit.assets.pretrain {name} {length} --seed {settings["seed"]} --threads {record["threads"]}

{record["steps"]:,} steps of {settings["batch"]:,} tokens, {record["tokens"]:,} in all ({record["passes"]:.1f} passes over \
the text), took {record["minutes"]:.0f} minutes. Threads: {record["threads"]}. AdamW, learning rate {PEAK:g}, falling to 0 \
along a cosine. Arithmetic was float32; the weights are stored in bfloat16. On a CPU without bfloat16 instructions autocast \
to bfloat16 was measured to be about fifteen times slower. Made with {_named(record["versions"])}.

Loss in nats a token; training: the mean since the row above.

| step | tokens | minutes | training | validation |
|---:|---:|---:|---:|---:|
{rows}

## Use and limits

For lessons, tests and small experiments. It continues phrases of API documentation and can be tuned to questions about \
it; it knows nothing else, says wrong things fluently, and was not made safe for any application. Licence: Apache-2.0. The \
docstrings are under the licences of their libraries (BSD and similar ones).
"""


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="python -m distillkit.assets.pretrain", description=(__doc__ or "").split("\n\n")[0])
    top.add_argument("name", choices=tuple(KINDS))
    length = top.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="length of the run (default 45)")
    length.add_argument("--steps", type=int, help="length of the run, repeatable to the bit")
    top.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    top.add_argument("--seed", type=int, default=0)
    top.add_argument("--out", type=Path, default=ASSETS, help="folder for the model folder (default: the package's)")
    top.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the checkpoint (default runs)")
    top.add_argument("--fresh", action="store_true", help="forget an earlier, perhaps unfinished, run")
    return top


def main(argv: list[str] | None = None) -> int:
    """Pre-train a model and write it; returns the exit code: 0, or 2 for bad input, 130 for an interruption."""
    args = parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    minutes = 45.0 if args.minutes is None and args.steps is None else args.minutes
    checkpoint = args.runs / f"pretrain-{args.name}"
    try:
        documents = library_documents()
        with ending_signals(), started(Claim(checkpoint), checkpoint, fresh=args.fresh):
            run = Pretraining(args.name, documents, steps=args.steps, minutes=minutes, seed=args.seed, runs=args.runs)
            for _ in run.run():
                pass
            say(f"{run.write(args.out)}: {run.tokens:,} tokens, {run.tokens / run.seconds:,.0f} a second; {run.curve[-1]}")
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"error: {one_line(error)}", error=True)
        return 2
    except Ended as ended:
        say(f"\nended by {ended.signal.name}; give the same command again to go on", error=True)
        return ended.code
    except KeyboardInterrupt:
        say("\ninterrupted; give the same command again to go on", error=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
