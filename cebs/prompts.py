"""Records, the one prompt, and the one way titles are read out of text.

Training and decoding both come through here, so a model is never asked with another prompt than it was taught with.
"""

import bisect
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cebs.errors import InputError
from cebs.files import read_list

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUOTED = re.compile(r'"([^"]*)"')
OLDEST_TITLE = re.compile(r'"[^"]*"(?:\s*,\s*)?')
INPUT_MARKER = "### Input:\n"
PROMPT_SHOWN = 200  # letters of a prompt that an error message quotes
NO_PREDICTION = "NAN"  # what SPRec and BIGRec ground when the model wrote nothing


@dataclass(frozen=True)
class Record:
    """One training, validation or test example (section 1 of the data format).

    `user` says whose record it is, where the data tell: records of one user are not independent, and error bars have
    to know. It is empty where they do not.
    """

    instruction: str
    input: str
    output: str
    user: str = ""

    @property
    def history(self) -> list[str]:
        """The titles of the history, oldest first."""
        return quoted_titles(self.input)

    @property
    def target(self) -> str:
        """The title to be predicted, without its quotes."""
        return unquote(self.output)

    @property
    def prompt(self) -> str:
        return build_prompt(self.instruction, self.input)

    def to_dict(self) -> dict[str, str]:
        """Returns the record as it stands in a file: without `user` where there is none."""
        return {name: value for name, value in asdict(self).items() if value or name != "user"}


def read_records(path: str | Path) -> list[Record]:
    """Reads a `{train,valid,test}_sample.json` file.

    Raises:
        `InputError`: naming the file and the first record that has no quoted target or another type than text, whose
            input has a quote too many, or whose `user` (optional) is neither text nor a number.
    """
    records = []
    for index, raw in enumerate(read_list(path, ("instruction", "input", "output"))):
        texts = [raw[key] for key in ("instruction", "input", "output")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: record {index}: instruction, input and output must be text")
        output = raw["output"].strip()
        if len(output) < 3 or not (output.startswith('"') and output.endswith('"')):
            raise InputError(
                f"{path}: record {index}: output must be the target title in double quotes, not {output!r}"
            )
        if raw["input"].count('"') % 2:
            raise InputError(
                f"{path}: record {index}: input has an odd number of double quotes, so that its titles cannot be told "
                "apart; write ' inside a title"
            )
        records.append(Record(*texts, user=read_user(raw, f"{path}: record {index}")))
    return records


def read_user(raw: dict[str, Any], place: str) -> str:
    """Returns whose record it is, as text; empty where it does not say.

    Raises:
        `InputError`: starting with `place`, if `user` is neither text nor a number.
    """
    user = raw.get("user", "")
    if isinstance(user, bool) or not isinstance(user, str | int | float):
        raise InputError(f"{place}: 'user' must be text or a number, not {type(user).__name__}")
    return str(user)


def build_prompt(instruction: str, input: str) -> str:
    """Returns the prompt of every stage; the Input block is left out where the input is blank."""
    input_block = f"{INPUT_MARKER}{input}\n" if input.strip() else ""
    return f"### Instruction:\n{instruction}\n{input_block}### Response:\n"


def quote(title: str) -> str:
    """Returns the title as it stands in an output or a preference record."""
    return f'"{title}"'


def unquote(text: str) -> str:
    """Returns the title of an output or a preference record, without its quotes."""
    return text.strip()[1:-1]


def quoted_titles(text: str) -> list[str]:
    """Returns what stands in double quotes, in order: the history of an input or a prompt."""
    return QUOTED.findall(text)


def movable_titles(record: Record) -> list[str]:
    """Returns the titles that `reordered` moves: the history and the target, unless it holds quotes of its own."""
    return [*record.history, *([] if '"' in record.target else [record.target])]


def reordered(record: Record, order: Sequence[int]) -> Record:
    """Returns the record with its titles in another order; one of the history may become the target.

    ```python
    >>> reordered(Record("Recommend.", 'Read: "Emma", "Ulysses".', '"Dracula"'), [2, 0, 1])
    Record(instruction='Recommend.', input='Read: "Dracula", "Emma".', output='"Ulysses"', user='')
    ```

    Args:
        record: the record.
        order: for each place, which of the `movable_titles` comes there.
    """
    titles = movable_titles(record)
    placed = iter([quote(titles[place]) for place in order])
    input = QUOTED.sub(lambda title: next(placed), record.input)
    return replace(record, input=input, output=next(placed, record.output))


def without_titles(record: Record, left_out: Sequence[bool]) -> Record:
    """Returns the record without some titles of its history; the others stay in their order.

    ```python
    >>> without_titles(Record("Recommend.", 'Read: "Emma", "Ulysses", "Carmilla".', '"Dracula"'), [True, False, True])
    Record(instruction='Recommend.', input='Read: "Ulysses".', output='"Dracula"', user='')
    ```

    Args:
        record: the record.
        left_out: for each title of the history whether it is left out; one at least stays.
    """
    ends = [title.end() for title in QUOTED.finditer(record.input)]
    kept = [quote(title) for title, out in zip(record.history, left_out, strict=True) if not out]
    if len(kept) == len(ends):
        return record
    # the titles that stay move up, and the places behind them go with what separates them
    placed = iter(kept)
    input = QUOTED.sub(lambda title: next(placed), record.input[: ends[len(kept) - 1]])
    return replace(record, input=input + record.input[ends[-1] :])


def respelt(record: Record, spell: Callable[[str], str]) -> Record:
    """Returns the record with another spelling of its titles, in the history and as the target."""
    input = QUOTED.sub(lambda title: quote(spell(title[1])), record.input)
    return replace(record, input=input, output=f"{quote(spell(record.target))}\n")


def predicted_title(text: str) -> str:
    """Returns the title in a model's answer (BIGRec's rule).

    The text between the first double quote and the next one; with no quote, the first line; with nothing, `NAN`.

    ```python
    >>> predicted_title('"Emma"\\n'), predicted_title("Emma\\nand more"), predicted_title("  ")
    ('Emma', 'Emma', 'NAN')
    ```
    """
    if '"' in text:
        title = text.split('"')[1]
    else:
        title = next(iter(text.strip().splitlines()), "")
    return title.strip() or NO_PREDICTION


def shorten_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_tokens: int) -> tuple[str, int]:
    """Shortens a prompt that is too long: it loses its oldest titles, never its instruction or response marker.

    Returns:
        `tuple[str, int]`: the prompt, at most `max_tokens` tokens long, and how many titles were left out.

    Raises:
        `InputError`: if the prompt does not fit even without any title.
    """
    titles = list(OLDEST_TITLE.finditer(prompt, max(prompt.find(INPUT_MARKER), 0)))  # quotes before it are no titles

    def without_oldest(count: int) -> str:
        ends = [0, *(title.end() for title in titles[:count])]
        starts = [*(title.start() for title in titles[:count]), len(prompt)]
        return "".join(prompt[end:start] for end, start in zip(ends, starts, strict=True))

    def length(count: int) -> int:
        return len(tokenizer(without_oldest(count)).input_ids)

    if length(0) <= max_tokens:
        return prompt, 0
    # the more titles go, the shorter it is: a history of hundreds is tokenised a few times only
    dropped = bisect.bisect_left(range(len(titles) + 1), -max_tokens, key=lambda count: -length(count))
    if dropped > len(titles):
        shown = textwrap.shorten(prompt[max(prompt.find(INPUT_MARKER), 0) :], PROMPT_SHOWN)
        raise InputError(
            f"a prompt has {length(len(titles))} tokens without any title, {max(max_tokens, 0)} fit beside its answer; "
            f"give a greater --max_length: {shown!r}"
        )
    return without_oldest(dropped), dropped


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_tokens: int) -> tuple[list[int], int]:
    """Tokenises a prompt; one that is too long loses its oldest titles (see `shorten_prompt`).

    Returns:
        `tuple[list[int], int]`: the token ids, at most `max_tokens` of them, and how many titles were left out.

    Raises:
        `InputError`: if the prompt does not fit even without any title.
    """
    prompt, dropped = shorten_prompt(tokenizer, prompt, max_tokens)
    return tokenizer(prompt).input_ids, dropped


def say_shortened(shortened: int, limit: int) -> None:
    """Says how many prompts lost titles, where any did."""
    if shortened:
        print(f"note: {shortened} prompts lost their oldest titles to fit in {limit} tokens with their answers")


def title_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[tuple[str, range]]:
    """Returns the titles of the history and where each stands among the tokens of a prompt, oldest first.

    A title's tokens are those that hold any part of it or of its quotes; the first and the last of them may hold the
    space or the comma beside it as well.
    """
    marker = prompt.find(INPUT_MARKER)
    if marker < 0:
        return []  # no Input block: quotes in the instruction are no titles
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    spans = []
    for title in QUOTED.finditer(prompt, marker):
        inside = [
            index
            for index, (start, end) in enumerate(encoded.offset_mapping)
            if start < title.end() and end > title.start()
        ]
        spans.append((title[1], range(inside[0], inside[-1] + 1)))
    return spans


def encode_completion(tokenizer: "PreTrainedTokenizerBase", completion: str) -> list[int]:
    """Tokenises an answer: stripped, then a newline, then the end-of-sequence token."""
    ids = tokenizer(completion.strip() + "\n", add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]


def encode_titles(tokenizer: "PreTrainedTokenizerBase", titles: Sequence[str]) -> list[list[int]]:
    """Tokenises each title as the answer that names it."""
    return [encode_completion(tokenizer, quote(title)) for title in titles]


def line_end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the ids of all tokens that end an answer: the end-of-sequence token and every token with a newline."""
    return sorted({tokenizer.eos_token_id, *tokens_with("\n", tokenizer)})


def tokens_with(character: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the ids of all tokens with a character."""
    return [token_id for token_id, text in enumerate(_token_texts(tokenizer)) if character in text]


@lru_cache(maxsize=1)  # asked for newlines and for quotes
def _token_texts(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    return tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
