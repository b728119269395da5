"""The long-context recipe: its data, its measures of retrieval, its loss, and small whole runs."""

import itertools
import json
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.runs import modules_of
from tests.sources import ROOT
from trl_ext.cards import card_problems

RECIPE = ROOT / "recipes" / "long_context"
YAMLS = sorted(RECIPE.glob("*.yaml"))
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LENGTH = 96


@pytest.fixture(scope="module")
def recipe():
    with modules_of("long_context") as modules:
        yield modules


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of text in which the number of each file can be told."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for index in range(40):
        words = [
            draw.choice(["def", "return", "import", "None", "x", "y", "="]) for _ in range(300)
        ]
        (folder / f"part{index % 3}").mkdir(exist_ok=True)
        text = f"# file {index}\n{' '.join(words)}\n"
        (folder / f"part{index % 3}" / f"file{index}.py").write_text(text, encoding="utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_file.py").write_text("# file of a test\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.fixture(scope="module")
def tokenizer(recipe, texts):
    train = recipe.text.load_texts(str(texts))
    tokenizer = recipe.text.train_tokenizer(train["text"], 270)
    recipe.retrieval.add_symbols(tokenizer, 16)
    return tokenizer


@pytest.fixture(scope="module")
def symbols(recipe, tokenizer):
    return recipe.retrieval.symbols_of(tokenizer)


@pytest.fixture(scope="module")
def haystack(recipe, texts, tokenizer):
    (document,) = recipe.text.encoded(tokenizer, recipe.text.load_texts(str(texts))["text"][:1])
    return document


@pytest.fixture
def size(recipe):
    return recipe.methods.ModelOptions(**SMALL)


# Text


def test_every_file_is_in_one_split(recipe, texts):
    train, test = (recipe.text.load_texts(str(texts), split)["text"] for split in ("train", "test"))
    numbers = [int(text.split()[2]) for text in (*train, *test)]
    assert sorted(numbers) == list(range(40))  # neither the tests, nor the picture
    assert 1 <= len(test) < len(train)


def test_the_split_of_a_file_does_not_depend_on_the_others(recipe, texts, tmp_path):
    for split in ("train", "test"):
        for text in recipe.text.load_texts(str(texts), split)["text"]:
            number = int(text.split()[2])
            name = f"part{number % 3}/file{number}.py"
            (tmp_path / split / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / split / name).write_text(text)
        with pytest.raises(ValueError, match="no readable text"):
            recipe.text.load_texts(str(tmp_path / split), "test" if split == "train" else "train")


def test_the_standard_library_is_found(recipe):
    names = {path.name for path in recipe.text.stdlib_folder().glob("*.py")}
    assert {"argparse.py", "random.py"} <= names


def test_segments_are_the_documents_end_to_end(recipe, texts, tokenizer):
    documents = recipe.text.load_texts(str(texts))
    rows = recipe.text.segments(documents, tokenizer, LENGTH)["input_ids"]
    joined = [
        token
        for text in documents["text"]
        for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    ]
    assert {len(row) for row in rows} == {LENGTH}
    assert list(itertools.chain(*rows)) == joined[: len(joined) // LENGTH * LENGTH]
    exact = Dataset.from_dict({"text": ["abcdefg"]})  # and its end: twice four
    plain = recipe.text.train_tokenizer(["abc"], 257)
    assert len(recipe.text.segments(exact, plain, 4)) == 2


def test_a_tokenizer_of_bytes_writes_every_text_back(recipe):
    tokenizer = recipe.text.train_tokenizer(["abc"], 257)
    text = "naïve 3.14 ≠ π\n\tend"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 257 and len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


# Retrieval


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_recall_asks_for_what_stands_in_the_document(
    recipe, tokenizer, symbols, haystack, seed, rounds
):
    retrieval = recipe.retrieval
    row = retrieval.recall(haystack[:LENGTH], tokenizer, symbols, random.Random(seed), rounds)
    ids, labels = row["input_ids"], row["labels"]
    assert len(ids) == len(labels) == LENGTH
    questions = 2 * retrieval.PAIRS * rounds
    facts, asked = ids[: LENGTH - questions], ids[LENGTH - questions :]
    places = [place for place, token in enumerate(facts) if token in symbols]
    pairs = {facts[place]: facts[place + 1] for place in places[::2]}
    assert len(places) == 2 * retrieval.PAIRS and len(set(pairs.values())) == retrieval.PAIRS
    assert [pairs[key] for key in asked[::2]] == asked[1::2]
    for start in range(0, questions, 2 * retrieval.PAIRS):
        assert set(asked[start : start + 2 * retrieval.PAIRS : 2]) == set(pairs)
    learned = [place for place, label in enumerate(labels) if label != retrieval.IGNORED]
    assert learned == list(range(LENGTH - questions + 1, LENGTH, 2))
    assert all(labels[place] == ids[place] for place in learned)
    assert [token for token in facts if token not in symbols] == haystack[
        : len(facts) - len(places)
    ]


def test_passkeys_stand_at_every_depth_and_are_asked_for_at_the_end(
    recipe, tokenizer, symbols, haystack
):
    retrieval, depths, keys = recipe.retrieval, set(), set()
    before, after = (
        len(tokenizer(text)["input_ids"]) for text in ("\nThe pass key is ", ". Remember it.\n")
    )
    for seed in range(600):
        row = retrieval.passkey(haystack[:LENGTH], tokenizer, symbols, random.Random(seed))
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == LENGTH
        assert labels == [retrieval.IGNORED] * (LENGTH - 1) + [ids[-1]]
        first, last = (p for p, t in enumerate(ids) if t in symbols)
        assert ids[first] == ids[last] and last == LENGTH - 1
        assert tokenizer.decode(ids).count("The pass key is") == 2
        depths.add(first)
        keys.add(ids[-1])
    room = LENGTH - 2 * (before + 1) - after
    assert depths == set(range(before, before + room + 1)) and room > 10
    assert keys == set(symbols)


def test_a_share_of_the_segments_is_turned(recipe, texts, tokenizer):
    segments = recipe.text.segments(recipe.text.load_texts(str(texts)), tokenizer, LENGTH)
    mixed = recipe.retrieval.mixed_in(segments, tokenizer, 0.5, seed=1)
    turned = [row["labels"] != row["input_ids"] for row in mixed]
    assert 0.3 < sum(turned) / len(turned) < 0.7
    again = recipe.retrieval.mixed_in(segments, tokenizer, 0.5, seed=1)
    assert mixed["input_ids"] == again["input_ids"]
    untouched = recipe.retrieval.mixed_in(segments, tokenizer, 0.0)
    assert untouched["labels"] == untouched["input_ids"] == segments["input_ids"]


# Evaluation


class Fake:
    """Stands for a model: its logits are a function of the tokens alone."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits, self.shown = logits, []

    def eval(self):
        return self

    def __call__(self, input_ids, logits_to_keep, use_cache):
        self.shown.append(input_ids)
        return SimpleNamespace(logits=self.logits(input_ids)[:, -logits_to_keep:])


def oracle(vocabulary):
    """Looks up what followed the token when it was last seen."""

    def logits(ids_BT):
        found = torch.zeros(*ids_BT.shape, vocabulary)
        for row, ids in enumerate(ids_BT.tolist()):
            for place, token in enumerate(ids):
                earlier = [p for p in range(place) if ids[p] == token]
                if earlier:
                    found[row, place, ids[earlier[-1] + 1]] = 9.0
        return found

    return logits


@pytest.fixture
def windows(haystack):
    return [haystack[start : start + 2 * LENGTH] for start in range(0, 40, 10)]


def test_a_model_that_looks_up_finds_everything_and_one_that_cannot_finds_nothing(
    recipe, tokenizer, windows
):
    V = len(tokenizer)
    # Before a passkey stands a space; the oracle takes the one of the needle if none came after.
    seeing, blind = Fake(oracle(V)), Fake(lambda ids: torch.zeros(*ids.shape, V))
    for model, expected in ((seeing, 1.0), (blind, 0.0)):
        for row in recipe.evaluation.evaluate(model, tokenizer, windows, [LENGTH, 2 * LENGTH], 8):
            assert row["recall"] == expected
    assert row["perplexity"] == pytest.approx(V, rel=1e-5)  # uniform
    assert row["passkey"] == 0.0


def test_a_passkey_is_found_by_a_model_that_remembers_symbols(recipe, tokenizer, symbols, windows):

    def logits(ids_BT):
        seen = torch.zeros(*ids_BT.shape, len(tokenizer))
        seen[..., symbols] = (
            torch.nn.functional.one_hot(ids_BT, len(tokenizer))[..., symbols].cumsum(1).float()
        )
        return seen

    row = recipe.evaluation.evaluate(Fake(logits), tokenizer, windows, [LENGTH], 8)[0]
    assert (row["passkey"], row["windows"]) == (1.0, 4)
    assert row["recall"] < 0.7


def test_all_lengths_are_judged_on_the_same_tokens(recipe, tokenizer, windows):
    """A loss that depends on the target's neighbour alone cannot depend on the context."""
    table = torch.randn(len(tokenizer), len(tokenizer), generator=torch.Generator().manual_seed(0))
    model = Fake(lambda ids: table[ids])
    rows = recipe.evaluation.evaluate(model, tokenizer, windows, [16 + LENGTH, 2 * LENGTH], 16)
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-6)
    losses = [
        table.log_softmax(-1)[window[place - 1], window[place]].neg().item()
        for window in windows
        for place in range(2 * LENGTH - 16, 2 * LENGTH)
    ]
    assert rows[0]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_windows_lie_within_documents_and_do_not_overlap(recipe, texts, tokenizer):
    documents = recipe.text.load_texts(str(texts), "test")
    windows = recipe.evaluation.windows_of(documents, tokenizer, 64, 1000)
    whole = list(recipe.text.encoded(tokenizer, documents["text"][:]))
    for index, window in enumerate(windows):
        ids = whole[index // recipe.evaluation.WINDOWS_PER_DOCUMENT]
        assert window in [ids[start : start + 64] for start in range(0, len(ids), 64)]
    assert len({tuple(window) for window in windows}) == len(windows)
    assert len(recipe.evaluation.windows_of(documents, tokenizer, 64, 3)) == 3


def test_the_windows_of_two_processes_are_those_of_one(recipe, tokenizer, windows):
    V, scores = len(tokenizer), recipe.evaluation.window_scores
    shares = [
        scores(Fake(oracle(V)), tokenizer, some, [LENGTH], 8) for some in (windows[:1], windows[1:])
    ]
    assert recipe.evaluate.joined(shares) == scores(
        Fake(oracle(V)), tokenizer, windows, [LENGTH], 8
    )


# Training


def test_every_document_counts_the_same(recipe):
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    labels = torch.tensor([[1, 2, 3, 4, 5], [-100, -100, -100, -100, 6], [-100, -100, 2, 1, 0]])
    logp = logits.float().log_softmax(-1)
    by_hand = [
        -sum(logp[row, place - 1, labels[row, place]] for place in learned) / len(learned)
        for row, learned in enumerate([[1, 2, 3, 4], [4], [2, 3, 4]])
    ]
    loss = recipe.train.document_loss(logits, labels)
    assert loss.item() == pytest.approx(sum(by_hand).item() / 3, rel=1e-6)


def test_a_seed_chooses_and_orders_the_rows(recipe, tokenizer, tmp_path):
    cut = Dataset.from_dict({"input_ids": [[index] * 4 for index in range(100)]})
    options = recipe.train.StageOptions(method="rope", length=4)

    def rows(seed):
        arguments = recipe.train.TrainingArguments(
            output_dir=str(tmp_path), seed=seed, max_steps=5, per_device_train_batch_size=4
        )
        found = recipe.train.rows_of(options, arguments, tokenizer, cut)["input_ids"]
        return [row[0] for row in found]

    assert rows(0) == rows(0) != rows(1)
    assert len(set(rows(0))) == 20 and set(rows(0)) != set(range(20))


def run_of(recipe, folder, tokenizer, size, **changed):
    """Trains RoPE on four rows, two of them answers alone."""
    draw = random.Random(0)
    rows = [[draw.randrange(270) for _ in range(12)] for _ in range(4)]
    labels = [row if index % 2 else [-100] * 11 + row[-1:] for index, row in enumerate(rows)]
    torch.manual_seed(0)
    trainer = recipe.train.DocumentTrainer(
        model=recipe.methods.new_model("rope", size, len(tokenizer), 12, 0),
        args=recipe.train.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=1e9,  # clipping would hide a wrong scale
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **changed,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": labels}),
        data_collator=recipe.train.default_data_collator,
    )
    trainer.train()
    return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])


def test_accumulation_changes_nothing(recipe, tmp_path, tokenizer, size):
    whole = run_of(recipe, tmp_path, tokenizer, size, per_device_train_batch_size=4)
    halves = run_of(
        recipe,
        tmp_path,
        tokenizer,
        size,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-7)


# Methods


@pytest.mark.parametrize("method", ["rope", "tapa", "stickbreaking"])
def test_all_methods_have_one_size(recipe, tokenizer, size, method):
    rope = recipe.methods.new_model("rope", size, 300, 64, 0)
    model = recipe.methods.new_model(method, size, 300, 64, 0)
    remainder = 2 * 8 if method == "stickbreaking" else 0  # a vector per head
    assert model.num_parameters() == rope.num_parameters() + remainder


def test_pi_is_rope_at_divided_positions(recipe, size, tmp_path):
    rope = recipe.methods.new_model("rope", size, 300, 16, 0)
    rope.save_pretrained(tmp_path)
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    scaled = recipe.methods.extended(str(tmp_path), "pi", 4.0)
    expected = rope(input_ids=ids, position_ids=torch.arange(64)[None] / 4).logits
    torch.testing.assert_close(scaled(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rope(input_ids=ids).logits, expected, atol=1e-3)


def test_yarn_scales_by_the_pretrained_length(recipe, size, tmp_path):
    recipe.methods.new_model("rope", size, 300, 16, 0).save_pretrained(tmp_path)
    config = recipe.methods.extended(str(tmp_path), "yarn", 4.0).config
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    assert config.max_position_embeddings == 64


# Whole runs


def test_the_study_trains_measures_and_reports(recipe, texts, tmp_path, monkeypatch, capsys):
    words = {
        "source": texts,
        "folder": tmp_path,
        "length": 64,
        "multiples": "1 2",
        "long_multiple": 2,
        "steps": 40,
        "long_steps": 2,
        "windows": 6,
        "stride": 16,
        "processes": 1,
        "methods": "yarn tapa stickbreaking",
        "seeds": "0 1",
        **SMALL,
    }
    given = [part for name, value in words.items() for part in (f"--{name}", *str(value).split())]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    recipe.run.main()
    said = capsys.readouterr().out
    assert "RoPE + YaRN" in said and "TAPA" in said and "passkeys" in said
    rows = json.loads((tmp_path / "long_context.json").read_text())["rows"]
    found = {(r["seed"], r["stage"], r["method"], r["length"]) for r in rows}
    methods = ("yarn", "tapa", "stickbreaking")
    runs = [("short", "rope"), *itertools.product(("short", "long"), methods)]
    expected = {(s, *run, n) for s in (0, 1) for run in runs for n in (64, 128)}
    assert found == expected and len(rows) == len(found)
    own = ("tapa", "stickbreaking")
    learned = [r["perplexity"] for r in rows if r["method"] in own and r["length"] == 64]
    assert max(learned) < 150  # of 273 tokens
    for measure in recipe.report.MEASURES:
        assert (tmp_path / f"{measure}.png").read_bytes().startswith(b"\x89PNG")
    trained = [f"{method}-{stage}" for method in own for stage in ("short", "long")]
    for folder in ("rope-short", "yarn-long", *trained):
        home = tmp_path / "seed-1" / folder
        assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1000
        card = (home / "README.md").read_text(encoding="utf-8")
        assert card_problems(card) == [] and "(held out, 128 tokens) | perplexity |" in card


@pytest.fixture(scope="module")
def jsonl(texts, tmp_path_factory):
    """Stands for the data sets on the Hub: read as it comes, from a file."""
    path = tmp_path_factory.mktemp("stream") / "books.jsonl"
    files = sorted(texts.rglob("file*.py"))
    path.write_text("\n".join(json.dumps({"text": file.read_text()}) for file in files))
    return path


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_a_yaml_streams_trains_resumes_and_is_evaluated(
    recipe, path, jsonl, tokenizer, size, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    changed = {
        **(SMALL if "start" not in options else {}),
        "source": jsonl,
        "length": 64,
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "save_steps": 1,
        "warmup_steps": 1,
        "per_device_train_batch_size": 2,
        "retrieval_share": 0.0,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    if "start" in options:
        start = recipe.methods.new_model(options["method"], size, len(tokenizer), 64, 0)
        start.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
        changed["start"] = tmp_path / "start"
    else:
        changed["tokenizer"] = tmp_path / "tokenizer"
    given = [f"--{name}={value}" for name, value in changed.items()]
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *given])
    recipe.train.main()
    out = tmp_path / "out"
    first = torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(out).parameters()])
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--resume_from_checkpoint={out}/checkpoint-1"])
    recipe.train.main()
    model = AutoModelForCausalLM.from_pretrained(out)
    again = torch.cat([p.flatten() for p in model.parameters()])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    stage = json.loads((out / "stage.json").read_text())
    accumulated = options["gradient_accumulation_steps"]
    assert stage["tokens"] == 2 * 2 * accumulated * 64 and stage["text"] == jsonl.name
    assert card_problems((out / "README.md").read_text(encoding="utf-8")) == []
    words = f"--model {out} --source {jsonl} --lengths 64 128 --stride 16 --windows 3"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    recipe.evaluate.main()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "128 tokens) | recall |" in card
    assert len(json.loads((out / "long_context.json").read_text())) == 2
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size


# Refusals


def test_bad_input_is_refused(recipe, texts, tokenizer, symbols, haystack, windows, size, tmp_path):
    text, retrieval, evaluation = recipe.text, recipe.retrieval, recipe.evaluation
    plain = text.train_tokenizer(["abc"], 257)
    segments = Dataset.from_dict({"input_ids": [haystack[:LENGTH]]})
    recipe.methods.new_model("tapa", size, 300, 16, 0).save_pretrained(tmp_path)
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "words.jsonl").write_text('{"words": "abc"}')
    model, draw = Fake(None), random.Random(0)
    cases = {
        "vocab_size=100": lambda: text.train_tokenizer(["abc"], 100),
        "split='validation'": lambda: text.load_texts(str(texts), "validation"),
        "unknown kind": lambda: text.load_texts(str(tmp_path / "words.csv")),
        "no column 'text'": lambda: text.load_texts(str(tmp_path / "words.jsonl")),
        "symbols=4": lambda: retrieval.add_symbols(plain, 4),
        "retrieval_share=2": lambda: retrieval.mixed_in(segments, tokenizer, 2),
        "needs a tokenizer with symbols": lambda: retrieval.mixed_in(segments, plain, 0.5),
        "length=8 tokens": lambda: retrieval.recall(haystack[:8], tokenizer, symbols, draw),
        "length=20 tokens": lambda: retrieval.passkey(haystack[:20], tokenizer, symbols, draw),
        "no held-out document": lambda: evaluation.windows_of([{"text": "a"}], tokenizer, 9, 1),
        "do not fit windows": lambda: evaluation.evaluate(model, tokenizer, windows, [999], 8),
        "stride=96": lambda: evaluation.evaluate(model, tokenizer, windows, [LENGTH], LENGTH),
        "method='alibi'": lambda: recipe.methods.new_model("alibi", size, 300, 16, 0),
        "method='yarn'": lambda: recipe.methods.new_model("yarn", size, 300, 16, 0),
        "is a 'tapa' model": lambda: recipe.methods.extended(str(tmp_path), "pi", 4.0),
        "methods=": lambda: recipe.study.StudyOptions(methods=["alibi"]),
        "multiples=": lambda: recipe.study.StudyOptions(multiples=[0]),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message):
            refused()
