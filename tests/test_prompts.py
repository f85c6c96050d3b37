"""The one prompt, the one title parser, and how both become tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cebs.generation import Decoder
from cebs.prompts import (
    NO_PREDICTION,
    QUOTED,
    Record,
    build_prompt,
    encode_completion,
    encode_prompt,
    line_end_tokens,
    predicted_title,
    quote,
    quoted_titles,
    reordered,
    tokens_with,
    without_titles,
)
from cebs.training import tokenize_records
from utils import InputError

text = st.text(st.characters(codec="utf-8"), max_size=40)
titles = st.lists(st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1, max_size=20), max_size=12)
quick = settings(deadline=None, max_examples=60)


def history_input(history):
    return f"The user has read: {', '.join(map(quote, history))}. Please recommend a book."


# --- text ---


def test_the_prompt_is_the_contracts():
    assert build_prompt("Do.", 'Read: "A".') == '### Instruction:\nDo.\n### Input:\nRead: "A".\n### Response:\n'
    assert build_prompt("Do.", " \n") == "### Instruction:\nDo.\n### Response:\n"
    assert Record("Do.", "x", '"A"\n').prompt == build_prompt("Do.", "x")


@given(text, text)
def test_the_prompt_holds_its_parts_as_they_are(instruction, input):
    prompt = build_prompt(instruction, input)
    assert prompt.startswith(f"### Instruction:\n{instruction}\n")
    assert prompt.endswith("\n### Response:\n")
    assert (f"\n### Input:\n{input}\n### Response:\n" in prompt) == bool(input.strip()) or "###" in instruction + input


@given(titles)
def test_quoted_titles_come_back_in_order(history):
    record = Record("Do.", history_input(history), '"X"')
    assert record.history == history == quoted_titles(record.prompt)


@given(titles, st.sampled_from(["X", 'the "X" of Y']), st.randoms())
def test_another_order_has_the_same_titles_in_the_same_text(history, target, random):
    record = Record("Do.", history_input(history), quote(target), user="7")
    moved = [*history, target] if target == "X" else history
    order = random.sample(range(len(moved)), len(moved))
    other = reordered(record, order)
    assert [*other.history, other.target][: len(moved)] == [moved[place] for place in order]
    assert (other.instruction, other.user) == ("Do.", "7") and (target == "X" or other.output == record.output)
    assert QUOTED.sub("", other.input) == QUOTED.sub("", record.input)
    assert reordered(record, range(len(moved))) == record


@given(titles, st.data())
def test_titles_are_left_out_with_what_separates_them(history, data):
    record = Record("Do.", history_input(history), '"X"', user="7")
    left_out = data.draw(st.lists(st.booleans(), min_size=len(history), max_size=len(history)))
    if history and all(left_out):
        left_out[-1] = False
    kept = [title for title, out in zip(history, left_out, strict=True) if not out]
    assert without_titles(record, left_out) == Record("Do.", history_input(kept), '"X"', user="7")


@given(text.filter(lambda title: title.strip() == title and title))
def test_the_target_stands_between_the_first_quote_and_the_last(title):
    assert Record("", "", f"{quote(title)}\n").target == title


def first_bullet(answer):
    """Section 5 of the contract, letter by letter."""
    start = answer.find('"')
    if start >= 0:
        end = answer.find('"', start + 1)
        title = answer[start + 1 : end if end >= 0 else len(answer)]
    else:
        lines = answer.strip().splitlines()
        title = lines[0] if lines else ""
    title = title.strip()
    return title if title else "NAN"


@given(st.text(st.sampled_from('"\n aE\t'), max_size=12) | text)
def test_predicted_title_is_the_contracts(answer):
    assert predicted_title(answer) == first_bullet(answer)
    assert predicted_title(answer).strip() and '"' not in predicted_title(answer)


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ('"Emma (1815)"\n', "Emma (1815)"),
        ('I say "Emma" or "Dune"', "Emma"),
        ('"Emma', "Emma"),
        ("Emma\nDune", "Emma"),
        ("\n\nEmma\n", "Emma"),
        ('""', NO_PREDICTION),
        ("", NO_PREDICTION),
        (" \n ", NO_PREDICTION),
    ],
)
def test_predicted_title_examples(answer, title):
    assert predicted_title(answer) == title


@given(st.text(st.characters(codec="utf-8", exclude_characters='"'), min_size=1).filter(lambda t: t.strip() == t))
def test_a_right_answer_is_read_as_its_target(title):
    assert predicted_title(Record("", "", f"{quote(title)}\n").output) == title


# --- tokens ---


def test_a_prompt_that_fits_is_left_as_it_is(tokenizer):
    prompt = build_prompt("Do.", history_input(["Emma", "Dune"]))
    ids = tokenizer(prompt).input_ids
    assert encode_prompt(tokenizer, prompt, len(ids)) == (ids, 0)
    assert tokenizer.decode(ids) == prompt


@quick
@given(data=st.data())
def test_too_long_a_prompt_loses_its_oldest_titles_only(tokenizer, data):
    title = st.text(st.sampled_from("Emma Dune, éü()!?'"), min_size=1, max_size=12)
    history = data.draw(st.lists(title, min_size=1, max_size=8))
    instruction = data.draw(st.sampled_from(["Recommend.", 'Answer as in "Emma".', "Recommend a book, please."]))
    prompt = build_prompt(instruction, history_input(history))
    room = data.draw(st.integers(1, len(tokenizer(prompt).input_ids) + 2))
    shorter = [build_prompt(instruction, history_input(history[left:])) for left in range(len(history) + 1)]
    lengths = [len(tokenizer(candidate).input_ids) for candidate in shorter]
    expected = next((left for left, length in enumerate(lengths) if length <= room), None)
    if expected is None:
        # without the last title its comma goes too: nothing else may
        with pytest.raises(ValueError, match="without any title"):
            encode_prompt(tokenizer, prompt, room)
        return
    ids, dropped = encode_prompt(tokenizer, prompt, room)
    assert len(ids) <= room and dropped == expected
    assert tokenizer.decode(ids) == shorter[expected]


def test_a_quoted_word_of_the_instruction_is_no_title(tokenizer):
    """The oldest title used to be the first quoted text of the whole prompt."""
    prompt = build_prompt('Answer as "title".', history_input(["Emma", "Dune"]))
    ids, dropped = encode_prompt(tokenizer, prompt, len(tokenizer(prompt).input_ids) - 1)
    assert tokenizer.decode(ids) == build_prompt('Answer as "title".', history_input(["Dune"])) and dropped == 1


def test_a_prompt_that_cannot_fit_names_the_remedy(tokenizer):
    prompt = build_prompt('Answer as "title".', history_input(["Emma"]))
    with pytest.raises(InputError, match="without any title, 10 fit beside its answer; give a greater --max_length"):
        encode_prompt(tokenizer, prompt, 10)
    with pytest.raises(InputError, match="0 fit"):
        encode_prompt(tokenizer, build_prompt("Do.", ""), -5)


@given(text=text)
@quick
def test_a_completion_is_stripped_text_newline_and_end(tokenizer, text):
    ids = encode_completion(tokenizer, f" {text}\n\n")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[:-1] == tokenizer(text.strip() + "\n", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids[:-1]) == text.strip() + "\n"


def test_every_token_with_a_newline_ends_a_line(tokenizer):
    ends = line_end_tokens(tokenizer)
    assert ends == sorted(set(ends)) and tokenizer.eos_token_id in ends
    newline = {token for token, index in tokenizer.get_vocab().items() if index in ends} - {tokenizer.eos_token}
    # in a byte-level vocabulary a newline is written with this letter
    assert newline == {token for token in tokenizer.get_vocab() if "Ċ" in token} and newline


@given(parts=st.lists(st.sampled_from(['"', '""', '",', ' "', "Emma", " ", "Ж", "\n"])))
@quick
def test_the_title_is_closed_by_the_second_token_with_a_quote(tokenizer, parts):
    """Decoding may end after it: the predicted title is there, unless an earlier token has closed an empty one."""
    quotes = tokens_with('"', tokenizer)
    ids = tokenizer("".join(parts), add_special_tokens=False).input_ids
    places = [place for place, token in enumerate(ids) if token in quotes]
    if len(places) > 1:
        closed, whole = tokenizer.decode(ids[: places[1] + 1]), tokenizer.decode(ids)
        assert predicted_title(closed) == predicted_title(whole) and closed.count('"') >= 2
    else:
        assert tokenizer.decode(ids).count('"') == sum(tokenizer.decode([ids[place]]).count('"') for place in places)


def test_training_rows_are_prompt_and_completion_apart(tokenizer):
    prompt, completion = build_prompt("Do.", history_input(["Emma", "Dune"])), '"It"\n'
    dataset, shortened = tokenize_records(tokenizer, [(prompt, completion)] * 2, None)
    prompt_ids, completion_ids = tokenizer(prompt).input_ids, encode_completion(tokenizer, completion)
    for row in dataset:
        assert row["input_ids"] == prompt_ids + completion_ids
        assert row["labels"] == [-100] * len(prompt_ids) + completion_ids
    dataset, shortened = tokenize_records(tokenizer, [(prompt, completion)], len(row["input_ids"]) - 1)
    assert shortened == 1 and len(dataset[0]["input_ids"]) < len(row["input_ids"])
    assert [label for label in dataset[0]["labels"] if label != -100] == completion_ids  # never the completion


def test_the_decoder_counts_shortened_prompts(tokenizer):
    prompts = [build_prompt("Do.", history_input(["Emma"] * count)) for count in (1, 30)]
    decoder = Decoder(None, tokenizer, max_length=100, max_new_tokens=20, rows=1)
    encoded = decoder.encode(prompts)
    assert decoder.shortened_prompts == 1 and max(map(len, encoded)) <= 80
    assert encoded[0] == tokenizer(prompts[0]).input_ids
