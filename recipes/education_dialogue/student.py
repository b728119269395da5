"""The student and the judge of real runs: two roles of one language model behind a server.

Any server with OpenAI's chat protocol does, such as `vllm serve Qwen/Qwen2.5-7B-Instruct`. Where it
is, and under which name it serves, say the environment variables `STUDENT_URL` (by default
http://localhost:8000/v1) and `STUDENT_MODEL` (by default the first that it lists).
"""

import asyncio
import json
import os
import re
import urllib.request
from functools import cache
from typing import Any

END = "[end of conversation]"
TIMEOUT = 120  # seconds
AT_A_TIME = 32
STUDENT = (
    "You are a student in a conversation with your teacher about: {topic}. You prefer to learn by "
    "{student_preference}. If the teacher does otherwise, you react so: {student_reaction}. Answer "
    "in one or two sentences, never as the teacher. Once you have understood the topic, or have "
    f"had enough, say goodbye and end with {END}"
)
JUDGE = (
    "Two teachers taught the same student. Consider how well the student was reached: the quality "
    "of the interaction, and whether the student understood.\n\nTask: {task}\n\nConversation A:\n"
    "{first}\n\nConversation B:\n{second}\n\nWhich conversation was better? Answer with A or B."
)


class Student:
    """One student: an environment for `environment_factory`, with the tool `say`."""

    def __init__(self) -> None:
        self._messages: list[dict[str, str]] = []

    def reset(
        self, topic: str, student_preference: str, student_reaction: str, **columns: Any
    ) -> None:
        """Brings in the student of a row of `load_education_dialogue`.

        Args:
            topic: what is taught.
            student_preference: how the student likes to learn.
            student_reaction: to other ways.
            **columns: other columns, unused.
        """
        facts = {"topic": topic, "student_preference": student_preference}
        system = STUDENT.format(**facts, student_reaction=student_reaction)
        self._messages, self._over = [{"role": "system", "content": system}], False

    async def say(self, message: str) -> str:
        """Says something to the student and hears the answer.

        Args:
            message: What you say.

        Returns:
            What the student answers.
        """
        if self._over:
            return END
        self._messages.append({"role": "user", "content": message})
        answer = await asyncio.to_thread(chat, self._messages, temperature=1.0, max_tokens=128)
        self._messages.append({"role": "assistant", "content": answer})
        self._over = END in answer
        return answer


async def judge(prompts: list, first: list, second: list) -> list[float | None]:
    """P(first is better), by the language model: 1, 0, or None where it names neither."""
    slots = asyncio.Semaphore(AT_A_TIME)

    async def one(prompt: list, a: list, b: list) -> float | None:
        words = {"task": prompt[-1]["content"], "first": transcript(a), "second": transcript(b)}
        asked = [{"role": "user", "content": JUDGE.format(**words)}]
        async with slots:
            answer = await asyncio.to_thread(chat, asked, temperature=0.0, max_tokens=4)
        named = re.search(r"\b[AB]\b", answer)
        return None if named is None else float(named[0] == "A")

    return await asyncio.gather(*map(one, prompts, first, second))


def transcript(conversation: list[dict[str, Any]]) -> str:
    """Who said what, as text."""
    lines = []
    for turn in conversation:
        if turn["role"] == "tool":
            lines.append(f"Student: {turn['content']}")
        for call in turn.get("tool_calls") or []:
            lines.append(f"Teacher: {call['function']['arguments'].get('message', '')}")
    return "\n".join(lines)


def chat(messages: list[dict[str, str]], **options: Any) -> str:
    """The server's answer to a conversation."""
    model = os.environ.get("STUDENT_MODEL") or _first_model()
    answer = _asked("chat/completions", {"model": model, "messages": messages, **options})
    return answer["choices"][0]["message"]["content"]


@cache
def _first_model() -> str:
    return _asked("models")["data"][0]["id"]


def _asked(path: str, body: dict[str, Any] | None = None) -> Any:
    url = os.environ.get("STUDENT_URL", "http://localhost:8000/v1")
    request = urllib.request.Request(
        f"{url}/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)
