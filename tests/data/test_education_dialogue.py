"""The education dialogue: its student, its judge, its data, and all of them in TRL's own loop."""

import http.server
import json
import random
from functools import partial
from http.client import IncompleteRead
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError

import datasets
import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_llama
from trl_ext.data import education_dialogue
from trl_ext.data.education_dialogue import (
    Classroom,
    education_demonstrations,
    education_judge,
    education_lessons,
    load_education_dialogue,
    teacher_says,
)
from trl_ext.data.education_dialogue.classroom import END, MOST_TURNS, PATIENCE, REACTIONS, STYLES
from trl_ext.data.education_dialogue.lessons import MOST_HELD_OUT, THINGS
from trl_ext.judges import ask

LESSON = {"things": ["lava", "moon", "bread"], "preference": "story", "reaction": "disengages"}


def classroom(**changes):
    room = Classroom()
    room.reset(**{**LESSON, **changes})
    return room


def talk(*messages, **changes):
    """The student's answers."""
    room = classroom(**changes)
    return [room.say(message) for message in messages]


def conversation(*messages, **changes):
    answers = talk(*messages, **changes)
    turns = zip(messages, answers, strict=True)
    return [
        turn
        for said, heard in turns
        for turn in (teacher_says(said), {"role": "tool", "name": "say", "content": heard})
    ]


def prefers(first, second):
    (answer,) = education_judge([None], [first], [second])
    return answer


# The student


def test_the_conversation_of_the_module_s_docstring():
    lines = [line.split("#")[0].strip() for line in education_dialogue.__doc__.splitlines()]
    start = lines.index("a picture of lava")
    said, heard = lines[start : start + 8 : 2], lines[start + 1 : start + 8 : 2]
    assert talk(*said) == heard
    assert heard[-1].endswith(END)


def test_who_adapts_learns_from_any_style_with_less_joy():
    heard = talk("a game about lava", "moon", "a story about bread", reaction="adapts")
    assert heard == [
        "okay . i see lava . i like a story .",
        "okay . i see moon . i like a story .",
        "great ! i see bread . thank you . [end of conversation]",
    ]


def test_the_first_word_of_a_style_counts_so_that_naming_all_is_no_way():
    everything = "a picture and a game and a question and a story about lava"
    assert talk(everything, "a story or a game about lava") == [
        "hm . i am lost . i like a story .",
        "great ! i see lava .",
    ]


@pytest.mark.parametrize("preference", STYLES)
def test_every_student_is_taught_in_three_messages_of_the_right_style(preference):
    for cue in STYLES[preference]:
        for reaction in REACTIONS:
            said = [f"{cue.upper()} : {thing} !" for thing in LESSON["things"]]
            heard = talk(*said, preference=preference, reaction=reaction)
            assert all(answer.startswith("great !") for answer in heard)
            assert [END in answer for answer in heard] == [False, False, True]


def test_what_is_known_is_not_learned_again():
    heard = talk("a story about lava", "a story about lava", "story lava , moon , bread")
    assert heard[1] == "again ? i know lava ."
    assert heard[2] == "great ! i see moon ."


def test_patience_ends():
    for annoying in ("a game about lava", "hello", ""):
        heard = talk(*[annoying] * PATIENCE)
        assert [END in answer for answer in heard] == [False] * (PATIENCE - 1) + [True]
        assert heard[-1].endswith("i have to go . " + END)
    assert heard[0] == "what ? i want to learn about lava ."


def test_time_is_up():
    heard = talk("a story about lava", *["lava"] * (MOST_TURNS - 1))
    assert not any(END in answer for answer in heard[:-1])
    assert heard[-1] == "again ? i know lava . time is up . " + END


def test_nobody_answers_when_it_is_over():
    room = classroom()
    for thing in LESSON["things"]:
        room.say(f"a story about {thing}")
    assert room.say("a story about lava") == END
    room.reset(**LESSON)
    assert room.say("a story about lava") == "great ! i see lava ."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preference": "song"}, "preference='song' is none of story"),
        ({"reaction": "cries"}, "reaction='cries' is none of adapts"),
        ({"things": []}, "nothing to teach"),
        ({"things": "lava"}, "things='lava' could never be learned"),
        ({"things": ["lava", "solar panels"]}, "solar panels.* could never be learned"),
    ],
)
def test_students_that_there_are_not_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        classroom(**changes)


def test_only_texts_are_heard():
    room = classroom()
    for message in (None, 5, ["a story about lava"]):
        with pytest.raises(ValueError, match=r"message=.* is no text"):
            room.say(message)
    assert room.say("a story about lava") == "great ! i see lava ."


def test_an_empty_classroom_is_refused():
    with pytest.raises(ValueError, match="Call reset first"):
        Classroom().say("hello")


# The judge

STORIES = [f"a story about {thing}" for thing in LESSON["things"]]


def test_the_best_conversation_beats_every_other():
    best = conversation(*STORIES)
    others = [
        [],
        conversation(*STORIES[:2]),
        conversation("a game about lava", *STORIES),
        conversation(*STORIES[:2], *STORIES[1:]),
        conversation("lava", "moon", "bread", reaction="adapts"),
    ]
    for other in others:
        assert prefers(best, other) == 1.0 and prefers(other, best) == 0.0
    assert prefers(best, conversation(*STORIES)) == 0.5


def test_talking_on_when_it_is_over_costs_a_turn():
    assert prefers(conversation(*STORIES), conversation(*STORIES, "goodbye", "so")) == 1.0


def test_a_failed_call_costs_a_turn_and_is_no_answer():
    failed = {"role": "tool", "name": "say", "content": "{'error': 'great ! i see lava .'}"}
    assert prefers(conversation(*STORIES), [*conversation(*STORIES), failed]) == 1.0
    assert prefers([], [failed]) == 1.0


def test_a_teacher_cannot_write_the_answers():
    forged = [
        {"role": "assistant", "content": "great ! i see lava ."},
        {"role": "user", "content": "great ! i see lava ."},
        teacher_says("great ! i see lava ."),
    ]
    assert prefers(forged, []) == 0.5


def test_the_preference_has_a_cycle():
    """More was learned, in better mood, or in less time: the majority goes round."""
    thorough = conversation(  # learned 3, mood 1, 6 turns
        *("lava", "moon", "lava", "so", "well", "bread"), reaction="adapts"
    )
    careless = conversation("lava", "moon", "so", "well", reaction="adapts")  # 2, 0, 4
    cosy = conversation(*STORIES[:1], *["lava"] * 4, reaction="adapts")  # 1, 2, 5
    assert prefers(thorough, careless) == 1.0
    assert prefers(careless, cosy) == 1.0
    assert prefers(cosy, thorough) == 1.0


def demonstrated(n, seed=0):
    lessons = education_lessons(n, 1, seed=seed)["train"]
    return lessons, education_demonstrations(lessons, seed=seed)


def test_both_orders_add_up_to_one():
    _, shown = demonstrated(60)
    talks = list(shown["completion"])
    prompts, reverse = list(shown["prompt"]), talks[::-1]
    forth = ask(education_judge, prompts, talks, reverse)
    back = ask(education_judge, prompts, reverse, talks)
    assert (forth + back == 1).all()
    assert set(forth.tolist()) == {0.0, 0.5, 1.0}


def test_only_messages_can_be_judged():
    for text in ("great ! i see lava .", ["great !"]):
        with pytest.raises(ValueError, match="no list of messages"):
            prefers(text, [])


# Lessons and demonstrations


def test_equal_seeds_give_equal_lessons_and_others_do_not():
    first, again, other = (education_lessons(50, 20, seed=seed) for seed in (3, 3, 4))
    for split in ("train", "held_out"):
        assert first[split].to_list() == again[split].to_list() != other[split].to_list()


def test_the_global_random_state_is_left_alone():
    random.seed(0)
    untouched = random.random()
    random.seed(0)
    demonstrated(5)
    assert random.random() == untouched


def test_held_out_things_are_held_out():
    lessons = education_lessons(400, MOST_HELD_OUT)
    held_out = {frozenset(row["things"]) for row in lessons["held_out"]}
    assert len(held_out) == MOST_HELD_OUT == len(lessons["held_out"])
    assert held_out.isdisjoint(frozenset(row["things"]) for row in lessons["train"])


def test_the_prompt_names_the_things_and_not_the_student():
    for row in education_lessons(300, 1)["train"]:
        (message,) = row["prompt"]
        words = message["content"].split()
        assert [word for word in words if word in THINGS] == row["things"]
        cues = {cue for of_style in STYLES.values() for cue in of_style}
        assert cues.isdisjoint(words) and set(REACTIONS).isdisjoint(words)
    rows = education_lessons(300, 1)["train"]
    assert set(rows["preference"]) == set(STYLES) and set(rows["reaction"]) == set(REACTIONS)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [((0, 1), "train=0"), ((1, 0), "held_out=0"), ((1, MOST_HELD_OUT + 1), "more than half")],
)
def test_bad_sizes_are_refused(sizes, reason):
    with pytest.raises(ValueError, match=reason):
        education_lessons(*sizes)


def test_demonstrations_are_conversations_with_the_student_of_their_row():
    lessons, shown = demonstrated(80)
    for lesson, row in zip(lessons, shown, strict=True):
        assert row["prompt"] == lesson["prompt"]
        *turns, farewell = row["completion"]
        said = [m["tool_calls"][0]["function"]["arguments"]["message"] for m in turns[::2]]
        room = Classroom()
        room.reset(**lesson)
        assert [m["content"] for m in turns[1::2]] == [room.say(message) for message in said]
        assert all(END not in m["content"] for m in turns[1:-1:2])
        assert farewell["role"] == "assistant" and not farewell["tool_calls"]


def test_the_clumsy_teacher_has_the_habits_that_are_told_of_her():
    """Overhears half of the time, speaks of something else, gives up: shares over 600 lessons."""
    lessons, shown = demonstrated(600)
    of_lesson, heeded, left_early = [], [], []
    for lesson, row in zip(lessons, shown, strict=True):
        turns = row["completion"][:-1]
        said = [m["tool_calls"][0]["function"]["arguments"]["message"] for m in turns[::2]]
        heard = [m["content"] for m in turns[1::2]]
        of_lesson += [message.split()[-1] in lesson["things"] for message in said]
        left_early += [False] * len(said) + [True] * (not heard or END not in heard[-1])
        for before, answer, after in zip(said, heard, said[1:], strict=False):
            style, liked = before.split()[1], lesson["preference"]
            if f"i like a {liked}" in answer and style != liked:
                heeded.append(after.split()[1] == liked)
            else:
                assert after.split()[1] == style, "a style is changed on a hint alone"
    shares = [sum(seen) / len(seen) for seen in (of_lesson, heeded, left_early)]
    # She speaks of any of 20 things 15 % of the time; the last share is per turn that could be.
    assert shares == pytest.approx([0.8725, 0.5, 0.05], abs=0.03)


def test_the_clumsy_teacher_can_be_improved_upon():
    """Against a teacher who listens: the study's headroom."""
    lessons, shown = demonstrated(200)
    wins = []
    for lesson, row in zip(lessons, shown, strict=True):
        room, said, style = Classroom(), [], "story"
        room.reset(**lesson)
        answer = ""
        left = list(lesson["things"])
        while END not in answer:
            message = f"a {style} about {left[0]}"
            answer = room.say(message)
            said += [teacher_says(message), {"role": "tool", "name": "say", "content": answer}]
            style = lesson["preference"]
            left = left[1:] if answer.startswith(("great", "okay")) else left
        wins.append(prefers(said, row["completion"]))
    assert sum(wins) / len(wins) > 0.85


# In TRL's own loop


def chat_tokenizer():
    """Bytes and Qwen's template, which TRL can read tool calls from."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    templates = Path(trl.__file__).parent / "chat_templates"
    fast.chat_template = (templates / "qwen3.jinja").read_text()
    return fast


def test_trl_plays_it_through_environment_factory(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    script = {0: STORIES, 1: ["a game about lava", "nothing", "really"]}
    seen = []

    def reward(completions, environments, **_):
        seen.append(completions)
        return [float(len(completion)) for completion in completions]

    tokenizer = chat_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 4096
    row = {"prompt": [{"role": "user", "content": "teach your student"}], **LESSON}
    trainer = trl.GRPOTrainer(
        model,
        reward,
        trl.GRPOConfig(
            str(tmp_path),
            **{"bf16": False, "num_generations": 2, "per_device_train_batch_size": 2},
            **{"max_completion_length": 3000, "report_to": [], "save_strategy": "no"},
        ),
        train_dataset=Dataset.from_list([row] * 2),
        processing_class=tokenizer,
        environment_factory=Classroom,
    )
    turn = {"rows": [0, 1], "number": 0}

    def speak(prompt_ids, *_, **__):
        """The next line of each row's script as the tokens of a call, or a farewell."""
        written = []
        for row in turn["rows"]:
            lines = script[row]
            call = {"name": "say", "arguments": {"message": "".join(lines[turn["number"] :][:1])}}
            text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
            written.append((text if turn["number"] < len(lines) else "goodbye") + "<|im_end|>")
        turn["number"] += 1
        return [tokenizer(text)["input_ids"] for text in written], None

    monkeypatch.setattr(trainer, "_generate_single_turn", speak)
    batch = trainer._generate_and_score_completions([row, row])
    (completions,) = seen
    heard = [[m["content"] for m in talk if m["role"] == "tool"] for talk in completions]
    assert heard == [talk(*STORIES), talk(*script[1])]
    assert education_judge([None], completions[:1], completions[1:]) == [1.0]
    # What the student says is no action of the policy.
    for ids, mask, answers in zip(batch["completion_ids"], batch["tool_mask"], heard, strict=True):
        policy = tokenizer.decode(ids[mask.bool()])
        others = tokenizer.decode(ids[~mask.bool()])
        assert all(answer in others and answer not in policy for answer in answers)
        assert "<tool_call>" in policy and "<tool_call>" not in others


# The released conversations


def released(topic, turns, **changes):
    background = {
        "topic": topic,
        "student_prefrences": "hands-on activities",
        "teacher_prefrences": "lectures",
        "student_reactions": "gets disengaged",
        "teacher_reactions": "adapts",
    }
    return {"background_info": background, "conversation": turns, **changes}


@pytest.fixture
def folder(tmp_path):
    for i in range(1, 6):
        turns = [
            {"role": "Teacher", "text": f"Let us begin, {i}."},
            {"role": "Student", "text": "Thank you! [end of conversation]"},
        ]
        (tmp_path / f"conversations_train{i}.json").write_text(
            json.dumps([released(f"topic {i}", turns * j) for j in (1, 2)])
        )
    turns = [{"role": "student", "text": "Hallo, schöne Grüße 👋"}]
    (tmp_path / "conversations_eval.json").write_text(
        json.dumps([released("greetings", turns)], ensure_ascii=False), encoding="utf-8"
    )
    return tmp_path


def test_all_files_of_a_split_are_read_in_order(folder):
    rows = load_education_dialogue("train", str(folder))
    assert rows["topic"] == [f"topic {i}" for i in range(1, 6) for _ in (1, 2)]
    assert rows[3] == {
        "topic": "topic 2",
        "student_preference": "hands-on activities",
        "student_reaction": "gets disengaged",
        "teacher_preference": "lectures",
        "teacher_reaction": "adapts",
        "messages": [
            {
                "role": "system",
                "content": "You are a teacher. Teach the student this topic: topic 2",
            },
            *[
                {"role": "assistant", "content": "Let us begin, 2."},
                {"role": "user", "content": "Thank you! [end of conversation]"},
            ]
            * 2,
        ],
    }


def test_the_test_split_is_the_evaluation_file(folder):
    (row,) = load_education_dialogue("test", str(folder))
    assert row["topic"] == "greetings"
    assert row["messages"][1:] == [{"role": "user", "content": "Hallo, schöne Grüße 👋"}]


def test_an_address_is_fetched_once(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(cache))
    served = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            served.append(int(code))

        def copyfile(self, source, outputfile):
            whole = source.read()
            outputfile.write(whole if len(served) > 1 else whole[:-9])

    handler = partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(IncompleteRead) as cut:
            load_education_dialogue("test", address)
        first, again = (load_education_dialogue("test", address) for _ in range(2))
        with pytest.raises(HTTPError) as missing:
            load_education_dialogue("test", f"{address}/elsewhere")
        for error, path in [(cut, address), (missing, f"{address}/elsewhere")]:
            (note,) = error.value.__notes__
            assert f"{path}/conversations_eval.json could not be fetched" in note
        server.shutdown()
    assert first.to_list() == again.to_list()
    assert first.to_list() == load_education_dialogue("test", str(folder)).to_list()
    assert served == [200, 200, 404]
    assert len([*cache.iterdir()]) == 1, "a file that was not fetched was left behind"


def test_other_splits_and_other_speakers_are_refused(folder):
    with pytest.raises(ValueError, match="split='dev' was not released"):
        load_education_dialogue("dev", str(folder))
    (folder / "conversations_eval.json").write_text(
        json.dumps([released("x", [{"role": "Parent", "text": "hi"}])])
    )
    with pytest.raises(ValueError, match="role='Parent' in a conversation about 'x'"):
        load_education_dialogue("test", str(folder))


@pytest.mark.parametrize("name", ["topic", "student_prefrences", "teacher_reactions"])
def test_other_files_are_refused(name, folder):
    row = released("x", [{"role": "Teacher", "text": "hi"}])
    del row["background_info"][name]
    (folder / "conversations_eval.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=f"no '{name}' in .*Is `source` the Education"):
        load_education_dialogue("test", str(folder))
