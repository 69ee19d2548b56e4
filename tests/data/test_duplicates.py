"""Texts that are the same, or nearly, are found; all of them, and no others."""

import random
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_sft.data.duplicates import clusters, exact_duplicates

DICE = random.Random(7)
WORDS = [f"word{number}" for number in range(5000)]


def long_text(words=60):
    return DICE.choices(WORDS, k=words)


def with_another_word(words):
    place = DICE.randrange(len(words))
    return [*words[:place], "another", *words[place + 1 :]]


def join(texts):
    return [" ".join(words) for words in texts]


def by_brute_force(texts):
    """Every pair compared: the definition in a few lines."""
    words = [re.findall(r"[a-z0-9]+", text.lower()) for text in texts]
    shingles = [{tuple(own[start : start + 5]) for start in range(len(own) - 4)} for own in words]
    numbers = list(range(len(texts)))
    for one in range(len(texts)):
        for other in range(one):
            same = words[one] == words[other] != []
            either = shingles[one] | shingles[other]
            if same or (either and len(shingles[one] & shingles[other]) / len(either) >= 0.8):
                numbers = [numbers[one] if number == numbers[other] else number for number in numbers]
    names = {number: name for name, number in enumerate(dict.fromkeys(numbers))}
    return [names[number] for number in numbers]


def test_case_white_space_and_punctuation_do_not_count():
    assert exact_duplicates(["Is it late?", "Is it early?", 'is  it\n"late"', "IS IT EARLY!", "Is it"]) == [
        [0, 2],
        [1, 3],
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("is 1 + 1 = 2", "is 1 < 1 = 2"),
        ("great 😀", "great 😡"),
        ("की", "का"),
        ("naïve", "nave"),
        ("今天很好", "今天不好"),
        ("costs 5 €", "costs 5 £"),
    ],
)
def test_signs_that_carry_meaning_count(one, other):
    assert exact_duplicates([one, other]) == []


def test_one_way_of_writing_a_letter_is_as_good_as_another():
    assert exact_duplicates(["cafe\u0301 ２", "CAFÉ 2"]) == [[0, 1]]


def test_texts_without_words_are_not_alike():
    assert exact_duplicates(["", "", "...", "..."]) == []
    assert clusters(["", "", "...", "..."]) == [0, 1, 2, 3]


def test_no_text_is_no_cluster():
    assert clusters([]) == []


def test_one_word_changed_in_a_long_text_is_a_near_duplicate():
    text = long_text()
    assert clusters(join([text, long_text(), with_another_word(text)])) == [0, 1, 0]


def test_the_same_question_with_another_answer_is_not_a_near_duplicate():
    question, answer = long_text(15), long_text(15)
    assert clusters(join([question + answer, question + long_text(15)])) == [0, 1]


def test_the_same_long_question_with_another_short_answer_is_a_near_duplicate():
    question = long_text(100)
    assert clusters(join([[*question, "yes"], [*question, "no"]])) == [0, 0]


def test_a_chain_of_near_duplicates_is_one_cluster():
    first = long_text(100)
    chain = [first]
    for _ in range(5):
        chain.append([*chain[-1][8:], *long_text(8)])
    assert clusters(join(chain)) == [0] * 6
    assert clusters(join([chain[0], chain[-1]])) == [0, 1]


def test_one_sign_changed_in_a_long_text_without_spaces_is_a_near_duplicate():
    text = "".join(chr(0x4E00 + DICE.randrange(3000)) for _ in range(80))
    assert clusters([text, text[:40] + "好" + text[41:], text[::-1]]) == [0, 0, 1]


def test_planted_near_duplicates_are_found_among_others():
    originals = [long_text() for _ in range(300)]
    copies = [with_another_word(text) for text in originals for _ in range(2)]
    numbers = clusters(join(originals + copies))
    assert numbers[:300] == list(range(300))
    assert numbers[300:] == [number for number in range(300) for _ in range(2)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=14), max_size=12), st.data())
def test_random_texts_of_few_words_are_clustered_as_by_brute_force(texts, data):
    texts += [data.draw(st.permutations(text)) for text in texts[:3]]
    assert clusters(join(texts)) == by_brute_force(join(texts))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_edited_texts_are_clustered_as_by_brute_force(seed):
    dice = random.Random(seed)
    texts = [dice.choices(WORDS[:50], k=dice.randint(20, 60)) for _ in range(3)]
    for _ in range(25):
        text = list(dice.choice(texts))
        for _ in range(dice.randint(0, 2)):
            start = dice.randrange(len(text))
            text[start : start + dice.randint(0, 3)] = dice.choices(WORDS[:50], k=dice.randint(0, 3))
        texts.append(text or ["x"])
    assert clusters(join(texts)) == by_brute_force(join(texts))


def test_a_filled_in_form_is_parted_by_what_was_filled_in():
    form = long_text(200)
    filled = [form + long_text(8) for _ in range(40)]
    twice = [form + with_another_word(text[200:] + long_text(22)) for text in filled[:1]]
    twice.append([*twice[0][:-1], "end"])
    texts = join([*filled, *twice])
    assert set(clusters(texts)) == {0}
    assert clusters(texts, largest=10) == [*range(41), 40]


def test_near_duplicates_that_differ_by_a_word_are_no_form():
    text = long_text(200)
    assert set(clusters(join([with_another_word(text) for _ in range(40)]), largest=10)) == {0}


def test_clusters_that_are_not_too_large_are_left_whole():
    form = long_text(200)
    texts = join([form + long_text(8) for _ in range(10)])
    assert clusters(texts, largest=10) == [0] * 10


def test_every_process_finds_the_same():
    code = (
        "import random\nfrom lora_sft.data.duplicates import clusters\ndice = random.Random(3)\n"
        "texts = [' '.join(dice.choices('abcd', k=12)) for _ in range(300)]\nprint(clusters(texts))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != ""
