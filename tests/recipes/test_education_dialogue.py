"""The education dialogue on a small scale, and its real run with a server that only pretends."""

import http.server
import json
import math
from pathlib import Path
from threading import Thread

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.data.test_education_dialogue import chat_tokenizer
from tests.recipes.runs import modules_of, quick_run
from tests.sources import ROOT
from tests.tiny import tiny_llama
from trl_ext import cli
from trl_ext.cards import card_problems
from trl_ext.data.education_dialogue import Classroom, education_lessons, teacher_says

RECIPE = ROOT / "recipes" / "education_dialogue"
METHODS = ("single_turn", "rlhf", "mtpo_learned", "mtpo", "mtpo_tau")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("education_dialogue")
    return folder, quick_run("education_dialogue", folder, "--processes", "1")


@pytest.fixture(scope="module")
def figures(quick):
    return json.loads((quick[0] / "study.json").read_text(encoding="utf-8"))


def test_all_play_all_and_the_rates_of_both_sides_add_up_to_one(figures):
    rates = {(match["row"], match["column"]): match["win_rate"] for match in figures["matches"]}
    policies = {"sft", *METHODS}
    assert set(rates) == {(a, b) for a in policies for b in policies if a != b}
    assert all(rates[a, b] + rates[b, a] == pytest.approx(1) for a, b in rates)
    assert {row["policy"] for row in figures["teaching"]} == policies
    assert {(row["method"], row["step"]) for row in figures["curves"]} == {
        (method, step) for method in METHODS for step in (1, 2)
    }


def test_every_plan_has_a_rate_for_each_method_and_is_measured_up_to_its_last_step(recipe):
    for plan, measured in [
        (recipe.study.Plan(), {25, 50, 75, 100}),
        (recipe.study.LONG, {50, 100, 150, 200, 250, 300, 350, 400}),
    ]:
        assert set(plan.rates) == set(METHODS)
        assert set(plan.rates.values()) <= set(recipe.study.RATES)
        assert plan.measured == measured and max(measured) == plan.steps


def test_it_shows_the_paper_s_table_beside_its_own(quick):
    folder, said = quick
    for expected in ("MTPO-τ", "The row beats the column", "0.909", "delighted", "Figure"):
        assert expected in said
    assert (folder / "education_dialogue.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", METHODS)
def test_each_teacher_is_saved_with_a_sound_card(quick, method):
    home = quick[0] / "policies-0" / method
    assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1e5
    assert AutoTokenizer.from_pretrained(home).response_template["fields"]["tool_calls"]
    card = (home / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "win_rate_against_sft" in card


@pytest.fixture(scope="module")
def recipe():
    with modules_of("education_dialogue") as modules:
        yield modules


def test_what_is_played_here_is_what_trl_would_have_tokenised(recipe, quick):
    """Turn by turn the text of a conversation only grows, and the student is the lesson's."""
    world = recipe.world.make_world(quick[0], 0, recipe.world.SMALL)
    lessons = world.lessons["held_out"]
    talks = recipe.world.play(recipe.world.load_policy(world), world, lessons, seed=3)
    assert talks == recipe.world.play(recipe.world.load_policy(world), world, lessons, seed=3)
    for lesson, talk in zip(lessons, talks, strict=True):
        before: list[int] = []
        for n in range(len(talk)):
            text = lesson["prompt"] + talk[: n + 1]
            ids = world.tokenizer.apply_chat_template(text, return_dict=False)
            assert ids[: len(before)] == before
            before = ids
        room = Classroom()
        room.reset(**lesson)
        for turn, answer in zip(talk[::2], talk[1::2], strict=False):
            assert answer["content"] == room.say(recipe.world.message_of(turn))
        assert recipe.world.message_of(talk[-1]) is None or len(talk) == 22


def test_a_turn_is_rewarded_with_its_answer(recipe):
    (lesson,) = education_lessons(1, 1)["train"]
    style, (thing, *_) = lesson["preference"], lesson["things"]
    facts = {name: [lesson[name]] * 2 for name in ("things", "preference", "reaction")}
    seen: list = []
    reward = recipe.study.turn(lambda talks: [seen.extend(talks), [0.0] * len(talks)][1])
    said = [[teacher_says(f"a {style} about {thing}")], [{"role": "assistant", "content": "bye"}]]
    assert reward([lesson["prompt"]] * 2, said, **facts) == [0.0, 0.0]
    assert seen[0][-1]["content"] == f"great ! i see {thing} ."
    assert seen[1] == lesson["prompt"] + said[1]


def test_beginnings_end_before_a_turn_of_the_teacher(recipe, quick):
    rows = recipe.study.beginnings(recipe.world.make_world(quick[0], 0, recipe.world.SMALL), seed=0)
    assert all(row["prompt"][-1]["role"] in ("user", "tool") for row in rows)
    assert len({len(row["prompt"]) for row in rows}) > 3


# The real run


@pytest.fixture
def server(monkeypatch):
    """Says yes to every student's sentence, and prefers whatever is shown first."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer({"data": [{"id": "toy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            judged = body["max_tokens"] == 4
            text = "A, I think" if judged else f"yes {len(body['messages'])}"
            self.answer({"choices": [{"message": {"content": text}}]})

        def answer(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        monkeypatch.setenv("STUDENT_URL", f"http://127.0.0.1:{served.server_port}/v1")
        yield asked
        served.shutdown()


FACTS = {"topic": "tides", "student_preference": "games", "student_reaction": "yawning"}


def test_student_and_judge_of_the_real_run(server, monkeypatch):
    import asyncio

    monkeypatch.syspath_prepend(str(RECIPE))
    import student

    pupil = student.Student()
    pupil.reset(**FACTS, messages=[])
    assert asyncio.run(pupil.say("hello")) == "yes 2"
    assert asyncio.run(pupil.say("tides are waves")) == "yes 4"
    assert "games" in server[0]["messages"][0]["content"] and server[0]["model"] == "toy"
    talk = [teacher_says("hello"), {"role": "tool", "name": "say", "content": "yes"}]
    prompt = [{"role": "user", "content": "teach tides"}]
    assert asyncio.run(student.judge([prompt], [talk], [talk[:1]])) == [1.0]
    shown = server[-1]["messages"][0]["content"]
    assert "Teacher: hello\nStudent: yes" in shown and "teach tides" in shown


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_real_run_s_configuration(lora, server, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = chat_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 4096
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = "\n".join(json.dumps(FACTS) for _ in range(20))
    (tmp_path / "topics.jsonl").write_text(rows, encoding="utf-8")
    options = {
        "model_name_or_path": tmp_path / "model",
        "dtype": "float32",
        "dataset_name": tmp_path / "topics.jsonl",
        "dataset_train_split": "train[:18]",
        "dataset_test_split": "train[18:]",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "max_completion_length": 4,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if lora:
        options |= {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    words = [f"--{name}={value}" for name, value in options.items()]
    trainer = cli.main(["mtpo", "--config", str(RECIPE / "education_dialogue_qwen.yaml"), *words])
    out = Path(trainer.args.output_dir)
    row = trainer.state.log_history[0]
    # A judge who looks at the order only, asked in both.
    assert (row["win_rate"], row["judge/inconsistency"], row["turns"]) == (0.5, 1.0, 1.0)
    assert len(server) == 2 * (2 + 2 * 2), "two steps, two evaluations of two, in both orders"
    results = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    assert math.isfinite(results["eval_loss"])
    assert card_problems((out / "README.md").read_text(encoding="utf-8")) == []
