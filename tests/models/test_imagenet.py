"""Classes of ImageNet by number and name, and prompts of them."""

import pytest

from sjd2_lightning.evaluation.prompts import class_prompts
from sjd2_lightning.models.imagenet import NUM_CLASSES, class_name, class_number


def test_names_and_numbers_lead_to_each_other():
    assert [class_number(class_name(number)) for number in range(NUM_CLASSES)] == list(range(NUM_CLASSES))
    assert class_number("Golden Retriever") == class_number(" 207 ") == 207
    assert class_name(744) == "744", "another class has its name"
    for wrong in ("a red cat", "1000", "-1", ""):
        with pytest.raises(ValueError, match="drawn from classes; give a number below 1000"):
            class_number(wrong)


def test_prompts_of_classes_are_different_and_a_longer_list_begins_with_a_shorter_one():
    longest = class_prompts(NUM_CLASSES)
    assert len({item.key for item in longest}) == len({item.prompt for item in longest}) == NUM_CLASSES
    assert class_prompts(5) == longest[:5]
    assert class_prompts(5, seed=1) != longest[:5]
    assert all(item.key == f"class-{class_number(item.prompt):03d}" for item in longest[:9])
    with pytest.raises(ValueError, match=r"there are 1000 classes; ask for 1\.\.1000"):
        class_prompts(1001)
