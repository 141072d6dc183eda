"""The classes of ImageNet by number and name: what a model of classes is asked for."""

from __future__ import annotations

from functools import cache

NUM_CLASSES = 1000


@cache
def class_numbers() -> dict[str, int]:
    """Numbers of the classes by their names in small letters; of two of one name the lower number."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return {name.lower(): number for number, name in reversed(list(enumerate(IMAGENET_CLASSNAMES)))}


def class_name(number: int) -> str:
    """Name of a class, from 0 to 999; its number where another class has the same name."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    name = IMAGENET_CLASSNAMES[number]
    return name if class_numbers()[name.lower()] == number else str(number)


def class_number(prompt: str, num_classes: int = NUM_CLASSES) -> int:
    """The class that a prompt names, by number or name.

    Args:
        prompt: a number from 0, or a name; case does not count.
        num_classes: number of classes that there are.

    Raises:
        ValueError: it names none.
    """
    word = prompt.strip().lower()
    number = int(word) if word.isdecimal() else class_numbers().get(word, -1)
    if not 0 <= number < num_classes:
        raise ValueError(
            f"prompt {prompt!r}: this model is drawn from classes; give a number below "
            f"{num_classes} or the name of a class of ImageNet, such as 'golden retriever'"
        )
    return number
