"""The student: a rule that answers what the teacher says."""

import re
from collections.abc import Sequence
from typing import Any

# Words that give a style away, the style's own name first.
STYLES = {
    "story": ("story", "stories", "tale", "once"),
    "game": ("game", "games", "play", "try"),
    "picture": ("picture", "pictures", "draw", "look"),
    "question": ("question", "questions", "why", "think"),
}
REACTIONS = ("adapts", "disengages")
PATIENCE = 3  # unhappy answers after which the student leaves
MOST_TURNS = 10
END = "[end of conversation]"
WORD = "[a-z]+"


class Classroom:
    """One student: an environment for TRL's `environment_factory`, with the tool `say`.

    A message teaches the first thing of the lesson in it that the student does not know yet, if
    its first word of a style is of the style preferred. Otherwise a student who "adapts" learns
    with less joy, and one who "disengages" learns nothing and loses patience; both say what they
    like. Messages about nothing of the lesson cost patience too.
    """

    def __init__(self) -> None:
        self._things: list[str] = []

    def reset(self, things: Sequence[str], preference: str, reaction: str, **columns: Any) -> None:
        """Brings in the student of a row of `education_lessons`.

        Args:
            things: to be taught, each a word of the letters a to z.
            preference: one of `STYLES`.
            reaction: to other styles, one of `REACTIONS`.
            **columns: other columns, unused.

        Raises:
            ValueError: a style or reaction that there is not, or nothing that can be taught.
        """
        for name, value, known in (
            ("preference", preference, STYLES),
            ("reaction", reaction, REACTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is none of {', '.join(known)}.")
        if not things:
            raise ValueError("things=[] leaves nothing to teach. Give at least one.")
        if isinstance(things, str) or not all(re.fullmatch(WORD, thing) for thing in things):
            raise ValueError(
                f"things={things!r} could never be learned. Give a list of words of the letters "
                "a to z."
            )
        self._things, self._learned = list(things), set[str]()
        self._preference, self._adapts = preference, reaction == "adapts"
        self._turns, self._patience, self._over = 0, PATIENCE, False

    def say(self, message: str) -> str:
        """Says something to the student and hears the answer.

        Args:
            message: What you say.

        Returns:
            What the student answers.
        """
        if not self._things:
            raise ValueError("say: nobody is in the classroom. Call reset first.")
        if not isinstance(message, str):  # a model may call with anything
            raise ValueError(f"message={message!r} is no text.")
        if self._over:
            return END
        self._turns += 1
        answer = self._answer(re.findall(WORD, message.lower()))
        farewell = self._farewell()
        self._over = farewell is not None
        return f"{answer} {farewell} {END}" if farewell else answer

    def _answer(self, words: list[str]) -> str:
        mentioned = [word for word in words if word in self._things]
        unknown = [thing for thing in mentioned if thing not in self._learned]
        if not mentioned:
            self._patience -= 1
            wanted = next(thing for thing in self._things if thing not in self._learned)
            return f"what ? i want to learn about {wanted} ."
        if not unknown:
            return f"again ? i know {mentioned[0]} ."
        liked = _style(words) == self._preference
        if liked or self._adapts:
            self._learned.add(unknown[0])
            joy, hint = ("great !", "") if liked else ("okay .", f" i like a {self._preference} .")
            return f"{joy} i see {unknown[0]} .{hint}"
        self._patience -= 1
        return f"hm . i am lost . i like a {self._preference} ."

    def _farewell(self) -> str | None:
        if self._learned == set(self._things):
            return "thank you ."
        if self._patience == 0:
            return "i have to go ."
        return "time is up ." if self._turns == MOST_TURNS else None


def _style(words: list[str]) -> str | None:
    """Style of the first word that gives one away."""
    styles = (style for word in words for style, cues in STYLES.items() if word in cues)
    return next(styles, None)
