"""Education dialogue: a teacher who is not told how the student likes to learn.

In the task of the MTPO paper a teacher explains a topic to a student with a learning preference
that only the student's reactions betray, and whole conversations are compared. There, all parts are
played by language models. Here the student and the judge are rules, so that the task fits on a CPU
and its optimum is known, while what makes it a multi-turn game is kept:

    teach your student about lava , moon and bread                  # the lesson
      a picture of lava                                             # what the teacher says
        hm . i am lost . i like a story .                           # what the student answers
      a story about lava
        great ! i see lava .
      a story about the moon and the bread                          # one thing at a time
        great ! i see moon .
      a story about bread
        great ! i see bread . thank you . [end of conversation]

The first message costs patience and pays later: it finds out the preference. The judge compares two
conversations by what was learned, by the student's mood and by their length, and the majority of
the three decides. Such a preference has cycles, and no reward is behind it.

`Classroom` is the student, `education_judge` the judge, `education_lessons` draws the lessons, and
`load_education_dialogue` reads the conversations that the authors released.

Source: arXiv:2405.14655; the rules are ours.
"""

from trl_ext.data.education_dialogue.classroom import Classroom
from trl_ext.data.education_dialogue.judge import education_judge
from trl_ext.data.education_dialogue.lessons import (
    education_demonstrations,
    education_lessons,
    teacher_says,
)
from trl_ext.data.education_dialogue.released import load_education_dialogue

__all__ = [
    "Classroom",
    "education_demonstrations",
    "education_judge",
    "education_lessons",
    "load_education_dialogue",
    "teacher_says",
]
