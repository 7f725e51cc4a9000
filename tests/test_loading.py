"""What `load_student` takes, and what it says of models, tokenizers and machines that do not fit."""

import json
import re
import shutil
import warnings

import pytest
import tokenizers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import distillkit as dk
from distillkit.cli.main import main
from distillkit.experiments.settings import Data
from standin_hub import SUBJECTS, TINY, sentences
from test_students import DECODERS, HUB_NAMES

CHINESE = ["这部电影非常好看我很喜欢", "剧情无聊而且演员的表演很差", "导演的想法新颖画面也很美", "浪费时间的电影不值得一看"]


def corpus(folder, rows):
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return dk.load_task(folder, max_length=24)


def rows(texts):
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts)]


# --- tokenizers and corpora ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("texts", "least"), [(CHINESE, 0.6), (CHINESE[:2] + ["a good film", "a bad film"] * 20, 0.1)])
def test_a_tokenizer_that_does_not_know_the_corpus(tmp_path, texts, least):
    """The share that the warning names is that of the unknown tokens among all."""
    task = corpus(tmp_path, rows(texts))
    with pytest.warns(UserWarning, match=r"does not know \d+% of the tokens") as warned:
        student = dk.load_student("offline:minilm", task)
    ids = [i for row in task.token_ids(student.tokenizer, "train") for i in row if i not in (
        student.tokenizer.cls_token_id, student.tokenizer.sep_token_id)]
    exact = ids.count(student.tokenizer.unk_token_id) / len(ids)
    assert exact > least and f"{exact:.0%} of the tokens" in str(warned[0].message)


def test_questions_in_an_unknown_language(tmp_path, world):
    """The unknown tokens of prompts and responses are counted, and a tokenizer of bytes has none."""
    task = corpus(tmp_path / "questions", [{"prompt": "what is warm", "response": text} for text in CHINESE])
    _, student = world
    student.tokenizer.save_pretrained(tmp_path / "decoder")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(student.tokenizer))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "decoder")
    with pytest.warns(UserWarning, match=r"does not know \d\d% of the tokens"):
        dk.load_student(tmp_path / "decoder", task, trainable="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.load_student("offline:tiny-opt", task)


@pytest.mark.parametrize("source", ["offline:minilm", "offline:tiny-opt", "offline:tiny-llama"])
def test_no_warning_where_next_to_all_is_known(tmp_path, source):
    task = corpus(tmp_path, rows(["a good film 🙂", *["a bad film"] * 9] * 4 + ["what a naïve façade – really"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.load_student(source, task)


# --- a decoder without padding and end tokens ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A GPT-2 whose tokenizer has no special token at all."""
    folder = tmp_path_factory.mktemp("bare") / "gpt2"
    raw = tokenizers.ByteLevelBPETokenizer()
    text = [sentence for label in range(len(SUBJECTS)) for sentence in sentences(label, 40, "bare")]
    raw.train_from_iterator(text, vocab_size=400, min_frequency=1, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(raw.to_str()))
    tokenizer.save_pretrained(folder)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=64, vocab_size=len(tokenizer), **ends,
                                     initializer_range=0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_classifier_without_a_padding_token(bare, standin_hub):
    """Batches are filled up with token 0, which has no effect there and stays a word elsewhere."""
    task = dk.load_task("rotten_tomatoes", max_length=16)
    student = dk.load_student(bare, task)
    params, batch = student.init(0), task.batch(student.tokenizer, "test", range(6))
    assert not batch["attention_mask"].all() and student.tokenizer.all_special_ids == []
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(bare, num_labels=2).eval()
    plain.load_state_dict({**plain.state_dict(), **params})
    ours = student.logits(params, batch)
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        assert torch.allclose(ours[row], plain(input_ids=ids[mask == 1][None]).logits[0], atol=1e-5)
    assert ours.std() > 1e-3
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, torch.tensor(7))}
    assert torch.equal(student.logits(params, other), ours), "what fills a batch up does not matter"
    words = student.tokenizer.decode([0])
    assert words and student.tokenizer.decode([0], skip_special_tokens=True) == words


def test_a_language_model_without_a_padding_token(bare, standin_hub):
    task = dk.load_task("arc_easy", max_length=48)
    student = dk.load_student(bare, task, trainable="full")
    params, batch = student.init(0), task.batch(student.tokenizer, "test", range(4))
    assert not batch["attention_mask"].all() and (batch["labels"] < 0).any()
    ours = student.log_likelihood(params, batch, batch["labels"])
    for row in range(4):
        prompt = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        response = batch["labels"][row][batch["labels"][row] >= 0]
        with torch.no_grad():
            logits = student.module(input_ids=torch.cat([prompt, response])[None]).logits[0].log_softmax(-1)
        places = torch.arange(len(response)) + len(prompt) - 1
        assert torch.allclose(ours[row, : len(response)], logits[places, response], atol=1e-5)
    start = dk.DistilledSet.from_real(task, student, fraction=0.05)
    goal = dk.BPTT(task, student, dk.Unroll(2, optimizer=dk.SGD(0.01)), metagrad=dk.Replay(), batch_size=4)
    (record,) = dk.Distiller(start, goal, lr=0.01).run(1)
    assert torch.isfinite(torch.tensor(record.loss))


# --- LoRA, precision and device --------------------------------------------------------------------------------------


def test_lora_on_camembert(bare, tmp_path, standin_hub):
    """Adapters on queries and values of both layers, which start at the pretrained model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained("roberta-base")
    config = transformers.CamembertConfig(**TINY | {"type_vocab_size": 1}, vocab_size=len(tokenizer),
                                          pad_token_id=tokenizer.pad_token_id)
    transformers.CamembertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task = dk.load_task("rotten_tomatoes", max_length=12)
    student, whole = (dk.load_student(tmp_path, task, trainable=trainable) for trainable in ("lora", "full"))
    params = student.init(0)
    places = {name.split(".attention.self.")[1].split(".")[0] for name in params if ".lora_" in name}
    assert places == {"query", "value"} and sum(".lora_" in name for name in params) == 8
    head = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): value
            for name, value in params.items() if ".lora_" not in name}
    batch = task.batch(student.tokenizer, "test", range(4))
    assert torch.allclose(student.logits(params, batch), whole.logits(whole.init(0) | head, batch), atol=1e-6)
    moved = {name: value + 0.1 for name, value in params.items()}
    assert not torch.allclose(student.logits(moved, batch), student.logits(params, batch), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torchs_own_precisions(task, standin_hub, dtype):
    student, named = (dk.load_student("bert-base-uncased", task, dtype=d) for d in (dtype, str(dtype).removeprefix("torch.")))
    assert student.dtype == named.dtype == dtype
    batch = task.batch(student.tokenizer, "test", range(3))
    assert torch.equal(student.logits(student.init(0), batch), named.logits(named.init(0), batch))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, "torch.float32", "half", 32, None, [torch.float32]])
def test_other_precisions_are_refused(task, standin_hub, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, float64, bfloat16"):
        dk.load_student("bert-base-uncased", task, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "cuda:99", "mps", "gpu", "", "meta", 3.5, ["cpu"]])
def test_devices_that_are_not_there(task, standin_hub, device):
    try:
        torch.empty(0, device=device)
        available = device != "meta"
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        available = False
    if available:
        pytest.skip(f"this machine has {device}")
    with pytest.raises(ValueError, match="device=.*leave device out to get 'c"):
        dk.load_student("bert-base-uncased", task, device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices_that_are_there(task, standin_hub, device):
    student = dk.load_student("bert-base-uncased", task, device=device)
    assert student.device.type == ("cpu" if device or not torch.cuda.is_available() else "cuda")


# --- chat templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # jinja's sandbox refuses it
    "{{ raise_exception('no system prompt') }}",
    "{% for m in messages %}",
])
def test_a_chat_template_that_does_not_render(bare, tmp_path, standin_hub, template):
    folder = shutil.copytree(bare, tmp_path / "mine")
    (folder / "chat_template.jinja").write_text(template)
    task = dk.load_task("arc_easy", max_length=48)
    student = dk.load_student(folder, task, trainable="full")
    with pytest.raises(ValueError, match="chat template"):
        task.batch(student.tokenizer, "test", [0])
    student.tokenizer.chat_template = None
    assert len(task.batch(student.tokenizer, "test", [0])["input_ids"]) == 1


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_explains_a_folder(bare, tmp_path, capsys, standin_hub):
    folder = shutil.copytree(bare, tmp_path / "mine")
    for name in ("pytorch_model.bin", "modeling_mine.py", "README.md", "bad\x1b[31m.py"):
        (folder / name).write_text("")
    assert main(["doctor", "--student", str(folder)]) == 0
    out = capsys.readouterr().out
    read, left = (next(line for line in out.splitlines() if line.startswith(f"  files {word}: "))
                  for word in ("read", "left out"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*read.split(": ")[1].split(", ")}
    assert all(name in left for name in ("pytorch_model.bin", "modeling_mine.py")) and "\x1b" not in out
    assert not any(name in left for name in ("README.md", "config.json"))


def test_doctor_explains_what_is_not_supported(bare, tmp_path, capsys):
    folder = shutil.copytree(bare, tmp_path / "mine")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(["doctor", "--student", str(folder)]) == 2
    told = capsys.readouterr()
    assert "files left out: pytorch_model.bin" in told.out and "save_file" in told.err


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*HUB_NAMES, *DECODERS} - {"albert-base-v2"}))
def test_the_top_layers_are_trained_and_nothing_below_them(task, standin_hub, name):
    whole, top, head = (dk.load_student(name, task, trainable=trainable) for trainable in ("full", "top:1", "head"))
    numbers = {parameter: re.search(r"\.(\d)\.", parameter) for parameter in whole.trained_names}
    of_top = {parameter for parameter, number in numbers.items() if number and number[1] == "1"}
    assert of_top and {*top.trained_names} >= of_top | {*head.trained_names} and {*head.trained_names} == top.fresh_names
    others = {*top.trained_names} - of_top - top.fresh_names
    assert not others or all("norm" in parameter or "ln_f" in parameter or "pooler" in parameter for parameter in others)
    # Other values of all that is trained leave the states below as they are, and change those of the top layer.
    batch = dict(top.tokenizer(["a warm story", "it was dull"], return_tensors="pt", padding=True))
    moved = {parameter: value + 0.1 for parameter, value in top.init(0).items()}
    before, after = top.layer_features(batch), top.layer_features(batch, moved)
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])
    assert torch.equal(top.logits(top.init(0), batch), whole.logits(whole.init(0), batch))


def test_real_rows_send_no_gradient_below_the_top_layers(task, standin_hub):
    """The backward pass costs half as much where half of the layers are frozen, and distilled examples still get gradients."""
    counted = {}
    for trainable in ("full", "top:1"):
        student = dk.load_student("bert-base-uncased", task, trainable=trainable)
        batch = dict(student.tokenizer(["a warm story", "it was dull"], return_tensors="pt", padding=True))
        params = {name: value.requires_grad_() for name, value in student.init(0).items()}
        loss = student.loss(params, batch, torch.tensor([0, 1]))
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss, list(params.values()))
        counted[trainable] = counter.get_total_flops()
    assert 0.4 < counted["top:1"] / counted["full"] < 0.55
    distilled = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    assert dk.meta_gradient(distilled, dk.BPTT(task, student, dk.Unroll(2), metagrad=dk.Replay())).embeds.abs().max() > 0


@pytest.mark.parametrize(("trainable", "cheaper"), [("top:3", dk.ForwardDifference), ("top:1", dk.Replay)])
def test_what_a_step_of_the_top_of_twelve_layers_costs(task, world, tmp_path, trainable, cheaper):
    """A difference of gradients is cheaper where a quarter of the layers is trained, an exact product where a twelfth is."""
    tokenizer, twelve = world[1].tokenizer, TINY | {"num_hidden_layers": 12}
    transformers.BertModel(transformers.BertConfig(**twelve, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    student = dk.load_student(tmp_path, task, trainable=trainable)
    distilled = dk.DistilledSet.from_real(task, student, per_class=1, length=8)

    def operations(strategy, steps):
        goal = dk.BPTT(task, student, dk.Unroll(steps, optimizer=dk.SGD(0.01)), metagrad=strategy, batch_size=2)
        with FlopCounterMode(display=False) as counter:
            strategy(goal.problem(distilled, seed=0))
        return counter.get_total_flops()

    strategies = (dk.Replay(), dk.ForwardDifference())
    costs = {type(strategy): operations(strategy, 3) - operations(strategy, 2) for strategy in strategies}
    assert min(costs, key=costs.get) is cheaper


def test_a_set_says_that_the_top_layers_were_trained(task, standin_hub):
    top, whole = (dk.load_student("bert-base-uncased", task, trainable=trainable) for trainable in ("top:1", "full"))
    start = dk.DistilledSet.from_real(task, top, per_class=1, length=8)
    distiller = dk.Distiller(start, dk.BPTT(task, top, dk.Unroll(2)), lr=0.1)
    for _ in distiller.run(1):
        pass
    assert distiller.distilled.meta["recipe"]["trainable"] == "top:1"
    assert dk.evaluate(distiller.distilled, task, top, seeds=[0], recipe="own").mean >= 0
    assert isinstance(distiller.objective.metagrad, dk.ForwardDifference)
    with pytest.raises(ValueError, match="top:1.*full"):
        dk.evaluate(distiller.distilled, task, whole, seeds=[0], recipe="own")


@pytest.mark.parametrize(("trainable", "name", "problem"), [
    ("top:3", "bert-base-uncased", "more layers than the 2"), ("top:1", "albert-base-v2", "share their weights"),
    ("top:0", "bert-base-uncased", "a number of layers, not 'top:0'"), ("top", "bert-base-uncased", "not 'top'"),
])
def test_top_layers_that_there_are_none_of(task, standin_hub, trainable, name, problem):
    with pytest.raises(ValueError, match=problem):
        dk.load_student(name, task, trainable=trainable)


def test_settings_take_the_top_layers():
    assert Data(name="deep", corpus="docstrings", student="offline:mpnet", trainable="top:3").trainable == "top:3"
    with pytest.raises(ValueError, match="trainable must .*top:0"):
        Data(name="deep", corpus="docstrings", student="offline:mpnet", trainable="top:0")
