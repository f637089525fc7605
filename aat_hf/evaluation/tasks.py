"""Synthetic long-context tasks after RULER (Hsieh et al., 2024, arXiv:2404.06654), made from a seed.

The prompts are RULER's, without its solved example before the question. Words are made up from syllables, so that no
list of words is needed; they split into several tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from aat_hf.compare import ComparisonError

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_HOPS = 4  # assignments after the first, as in RULER
_COMMON, _OFTEN, _SELDOM = 10, 30, 3  # how many words are common; how often they and the others appear


@dataclass(frozen=True)
class Example:
    """One question about a long text.

    Attributes:
        prompt: The text with the question.
        opening: How the answer begins; the model goes on from there.
        answers: All of them must be in what it writes.
        new_tokens: How much it may write.
    """

    prompt: str
    opening: str
    answers: tuple[str, ...]
    new_tokens: int


def score(written: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that are in the text, case aside (RULER's string_match_all)."""
    return sum(answer.lower() in written.lower() for answer in answers) / len(answers)


def make_example(task: str, seed: int, number: int, fits: Callable[[Example], bool]) -> Example:
    """The longest example of a task that fits.

    Args:
        task: A name of `TASKS`.
        seed: One seed always gives the same examples.
        number: Which one.
        fits: Whether an example is short enough; longer ones never fit when a shorter one does not.

    Raises:
        ComparisonError: Not even the shortest fits.
    """

    def build(size: int) -> Example:
        return TASKS[task](random.Random(f"{seed} {task} {number}"), size)

    if not fits(build(1)):
        raise ComparisonError(f"the shortest example of task {task!r} is too long: allow more tokens")
    low, high = 1, 2
    while fits(build(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(build(middle)) else (low, middle)
    return build(low)


def _needle(rng: random.Random, size: int) -> Example:
    """A number hidden between `size` lines of noise (RULER's niah_single_1)."""
    key, value = _word(rng), str(rng.randrange(1_000_000, 10_000_000))
    depth = rng.random()
    lines = [_NOISE] * size
    lines.insert(round(depth * size), f"One of the special magic numbers for {key} is: {value}.")
    asked = f"the special magic number for {key} mentioned in the provided text"
    prompt = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n{}\nWhat is {}?"
    ).format("\n".join(lines), asked)
    return Example(prompt, f"{asked[0].upper()}{asked[1:]} is", (value,), 16)


def _variables(rng: random.Random, size: int) -> Example:
    """A chain of assignments between `size` lines of noise (RULER's variable tracking)."""
    value = rng.randrange(10_000, 100_000)
    names = [_name(rng) for _ in range(_HOPS + 1)]
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before}" for before, after in pairwise(names)]
    depths = sorted(rng.random() for _ in chain)
    lines = [_NOISE] * size
    for placed, (depth, assignment) in enumerate(zip(depths, chain, strict=True)):
        lines.insert(round(depth * size) + placed, assignment)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{}\n"
        "Question: Find all variables that are assigned the value {} in the text above."
    ).format("\n".join(lines), value)
    opening = (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return Example(prompt, opening, tuple(names), 30 + 10 * len(names))


def _words(rng: random.Random, size: int) -> Example:
    """A list in which ten words are common, with `size` others (RULER's common words extraction)."""
    words = list(dict.fromkeys(_word(rng) for _ in range(2 * (_COMMON + size))))
    rng.shuffle(words)
    common, others = words[:_COMMON], words[_COMMON : _COMMON + size]
    listed = common * _OFTEN + others * _SELDOM
    rng.shuffle(listed)
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n{}\nQuestion: What are the {} most common words in the above list?"
    ).format(" ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1)), _COMMON)
    opening = f"Answer: The top {_COMMON} words that appear most often in the list are:"
    return Example(prompt, opening, tuple(common), 12 * _COMMON)


TASKS: dict[str, Callable[[random.Random, int], Example]] = {
    "needle": _needle,
    "variables": _variables,
    "words": _words,
}


def _word(rng: random.Random) -> str:
    """A word of three syllables."""
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))


def _name(rng: random.Random) -> str:
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))
