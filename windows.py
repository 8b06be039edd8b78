"""Dataset → windows: model inputs of question and paragraph tokens, with labels and character offsets.

A paragraph longer than its room in the model input is cut into windows of at most `room` tokens that start
`doc_stride` tokens apart: those that the fast tokenizer's `return_overflowing_tokens` makes of the paragraph alone with
the overlap `room - doc_stride` (tests hold them equal), so the distance does not depend on the question. Each paragraph
is tokenized once and its tokens leave the tokenizer once, without the overlap. A question and a window are then joined
with the model's own special tokens, by array operations, never token by token.

Row of a feature dataset (token lists of one length, positions counted from the first token of the row):

- `input_ids`, and `token_type_ids` where the model has them
- `char_starts`, `char_ends`: characters of the paragraph that a token covers, end exclusive; 0, 0 where an answer can
  neither start nor end: special tokens, question, tokens that cover no character
- `example`: row of the question in its split
- `start_positions`, `end_positions`: first and last token of the answer (end inclusive); `[CLS]` where the window does
  not hold the whole answer
- `context_start`: position of the first paragraph token
- `length`: tokens of the row as the model will see it
"""

import itertools
import pickle
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from files import UserError

NO_LABEL = 2**20  # beyond every sequence; the loss leaves such rows out

_TEXTS_AT_ONCE = 128
_SORTED_TOGETHER = 1024
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # by code point; none lies beyond


@dataclass(frozen=True)
class Layout:
    """How a model joins the two, `before question between paragraph after`, and the room for each in tokens.

    `before`, `between` and `after` are ids of special tokens; `type_ids` are the token types of the five parts.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    type_ids: tuple[int, int, int, int, int]
    uses_type_ids: bool
    cls_position: int
    room: int
    max_question_length: int
    doc_stride: int

    @property
    def max_seq_length(self) -> int:
        """The tokens of the longest row."""
        return len(self.before) + self.max_question_length + len(self.between) + self.room + len(self.after)


@dataclass(frozen=True)
class Tokens:
    """Token sequences one behind the other: sequence i is `[bounds[i], bounds[i + 1])` of the flat arrays.

    `char_starts`, `char_ends` are characters of text i (end exclusive), equal where a token covers none.
    """

    ids: np.ndarray
    char_starts: np.ndarray
    char_ends: np.ndarray
    bounds: np.ndarray


def make_layout(
    tokenizer: PreTrainedTokenizerBase, max_seq_length: int, max_question_length: int, doc_stride: int | None
) -> Layout:
    """The layout of `tokenizer`'s model input with the paragraph's room fixed at `max_seq_length - max_question_length`
    minus the special tokens.

    `doc_stride` is the distance in tokens between the starts of two windows; None is two thirds of the room, so that
    every place lies in the inner part of some window. Raises UserError for lengths that do not fit each other.
    """
    probe = tokenizer("1", "1", return_token_type_ids=True)
    sequence = np.array([-1 if part is None else part for part in probe.sequence_ids(0)])
    question, context = np.flatnonzero(sequence == 0), np.flatnonzero(sequence == 1)
    ids, types = probe["input_ids"], probe["token_type_ids"]
    before, between, after = ids[: question[0]], ids[question[-1] + 1 : context[0]], ids[context[-1] + 1 :]
    specials = len(before) + len(between) + len(after)
    if max_question_length < 1:
        raise UserError(f"--max_question_length is {max_question_length}, must be at least 1")
    room = max_seq_length - max_question_length - specials
    if room < 1:
        raise UserError(
            f"--max_question_length {max_question_length} leaves no room for the paragraph: --max_seq_length is "
            f"{max_seq_length}, of which {specials} are special tokens; lower the one or raise the other"
        )
    if doc_stride is None:
        doc_stride = room - room // 3
    if not 1 <= doc_stride <= room:
        raise UserError(
            f"--doc_stride is {doc_stride}, must lie between 1 and {room}, the tokens of a window's paragraph part "
            f"(--max_seq_length {max_seq_length} - --max_question_length {max_question_length} - {specials} special "
            "tokens); it is the distance between the starts of two windows, not their overlap"
        )
    return Layout(
        before=tuple(before),
        between=tuple(between),
        after=tuple(after),
        type_ids=(types[0], types[question[0]], types[question[-1] + 1], types[context[0]], types[-1]),
        uses_type_ids="token_type_ids" in tokenizer.model_input_names,
        cls_position=before.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in before else 0,
        room=room,
        max_question_length=max_question_length,
        doc_stride=doc_stride,
    )


def split_features(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    windows: str,
    labels: bool,
    num_proc: int | None = None,
    desc: str | None = None,
) -> Dataset:
    """The feature rows of a split (`build_features`), cached by `datasets`.

    Questions are taken paragraph by paragraph, wherever they stand, so that each paragraph is tokenized once; the rows
    lie in that order. Token columns have the smallest type that holds every token id and character of the split.
    """
    contexts = rows.with_format("arrow")["context"][:]
    paragraph = contexts.dictionary_encode().unify_dictionaries()
    order = np.argsort(np.concatenate([chunk.indices.to_numpy() for chunk in paragraph.chunks]), kind="stable")
    longest = pc.max(pc.utf8_length(contexts)).as_py() or 0
    largest = max(tokenizer.backend_tokenizer.get_vocab().values())
    # A tokenizer's own hash takes long and changes with each call; its definition and this file say as much.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    told = (rows._fingerprint, tokenizer.backend_tokenizer.to_str(), layout, windows, labels)
    return rows.select(order).map(
        _build_in_order,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        fn_kwargs={
            "order": order,
            "tokenizer": tokenizer,
            "layout": layout,
            "windows": windows,
            "labels": labels,
            "dtype": np.min_scalar_type(max(longest, largest)),
        },
        new_fingerprint=Hasher.hash((told, Path(__file__).read_bytes())),
        desc=desc,
    )


def _build_in_order(batch: dict[str, list], indices: list[int], order: np.ndarray, **kwargs: Any) -> pa.Table:
    return build_features(batch, order[indices], **kwargs)


def build_features(
    batch: dict[str, list],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    windows: str,
    labels: bool,
    dtype: np.dtype | type = np.uint32,
) -> pa.Table:
    """The feature rows (module docstring) of a batch of SQuAD-style examples, which are the rows `indices` of a split.

    `windows`: "stride" gives a row for every window of the paragraph; "centered" one row, the answer in the middle of
    its window as far as the paragraph's ends allow; "random" one row with the whole paragraph, of which
    `TrainingWindows` draws a window an epoch. The last two need `labels`. `labels` takes the first reference answer of
    every example; an example without one gets `NO_LABEL`. `dtype` is the type of token ids and character offsets.
    """
    contexts, context_of = _distinct(batch["context"])
    questions, paragraphs = tokenize(tokenizer, batch["question"], offsets=False), tokenize(tokenizer, contexts)
    # A question's rows are the windows of its paragraph, which lie one behind the other.
    count = np.ones(len(context_of), dtype=np.int64)
    if windows == "stride":
        beyond = np.maximum(np.diff(paragraphs.bounds)[context_of] - layout.room, 0)
        count += -(-beyond // layout.doc_stride)
    question = np.repeat(np.arange(len(context_of)), count)
    begin, end = paragraphs.bounds[context_of[question]], paragraphs.bounds[context_of[question] + 1]
    if windows == "stride":
        begin = begin + _ranges(np.zeros_like(count), count) * layout.doc_stride
        end = np.minimum(begin + layout.room, end)
    if labels:
        answers = _answer_tokens(batch["answers"], paragraphs, context_of)
        first, last, start, stop, labelled = (values[question] for values in answers)
    if windows == "centered":
        middle = np.where(first >= 0, (first + last + 1) // 2, begin)
        begin = np.clip(middle - layout.room // 2, begin, np.maximum(begin, end - layout.room))
        end = np.minimum(begin + layout.room, end)
    columns = _join(layout, questions, question, paragraphs, begin, end, dtype)
    question_tokens = np.minimum(np.diff(questions.bounds), layout.max_question_length)[question]
    context_start = question_tokens + len(layout.before) + len(layout.between)
    columns["example"] = np.asarray(indices)[question].astype(np.int32)
    columns["context_start"] = context_start.astype(np.int32)
    around = context_start + len(layout.after)
    columns["length"] = (around + np.minimum(end - begin, layout.room)).astype(np.int32)
    if labels:
        # A window may cut a character of several byte-level tokens; a part of them covers it as well as all of them.
        inside_first, inside_last = np.maximum(first, begin), np.minimum(last, end - 1)
        held = (first >= 0) & (inside_first <= inside_last)
        held[held] &= paragraphs.char_starts[inside_first[held]] <= start[held]
        held[held] &= paragraphs.char_ends[inside_last[held]] >= stop[held]
        for name, position in (("start_positions", inside_first), ("end_positions", inside_last)):
            inside = np.where(held, position - begin + context_start, layout.cls_position)
            columns[name] = np.where(labelled, inside, NO_LABEL).astype(np.int32)
    return pa.table(columns)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], offsets: bool = True) -> Tokens:
    """The tokens of `texts`, whole and without special tokens; without `offsets` they cover no character.

    White space at the edges of a token does not count as covered (SentencePiece puts it there); combining marks that
    the tokenizer strips count as covered by the token before them.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    parts = [list(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE)]
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    ids, pairs, lengths = [], [], []
    # Not the tokenizer's call, which makes Python lists of all tokens of all texts at once. The lists of a
    # part pass while the tokenizer, which needs no Python for it, is at the next part, and no further ahead.
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(encode, part, add_special_tokens=False) for part in parts[:1]]
        for following in range(1, len(parts) + 1):
            encodings = ahead.pop().result()
            ahead += [pool.submit(encode, part, add_special_tokens=False) for part in parts[following : following + 1]]
            lengths += map(len, encodings)
            ids.append(_flat(encoding.ids for encoding in encodings))
            if offsets:
                pairs.append(_flat(itertools.chain.from_iterable(encoding.offsets for encoding in encodings)))
    none = np.empty(0, dtype=np.int32)
    char_starts = char_ends = np.zeros(sum(lengths), dtype=np.int32)
    if offsets:
        of_text = np.repeat(np.arange(len(texts)), lengths)
        char_starts, char_ends = _tidy_edges(np.concatenate([*pairs, none]).reshape(-1, 2), of_text, texts)
    return Tokens(np.concatenate([*ids, none]), char_starts, char_ends, _bounds(lengths))


class Windows(torch.utils.data.Dataset):
    """Feature rows as dictionaries of arrays, in the order that `order` gives them."""

    def __init__(self, rows: Dataset, order: np.ndarray):
        self.rows = rows.with_format("numpy")
        self.order = order
        self.lengths = self.rows["length"][:][order]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
        columns = self.rows[self.order[numbers]]
        return [{name: columns[name][i] for name in columns} for i in range(len(numbers))]


class EvaluationWindows(Windows):
    """Every window of a split, rows of like length together: longest first among each `_SORTED_TOGETHER` of them.

    The rows of a cache file are read from memory that it is mapped to, and the pages once read stay with the process.
    So the rows are sorted within parts of the file alone, and with each part the file is mapped anew: memory does not
    grow with the split.
    """

    def __init__(self, rows: Dataset):
        lengths = rows.with_format("numpy")["length"][:].astype(np.int64)
        parts = np.arange(len(rows)) // _SORTED_TOGETHER
        super().__init__(rows, np.lexsort((-lengths, parts)))
        self.part = 0

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
        if (part := numbers[0] // _SORTED_TOGETHER) != self.part:
            self.part, self.rows = part, pickle.loads(pickle.dumps(self.rows))  # by the names of its files
        return super().__getitems__(numbers)


class TrainingWindows(Windows):
    """Training rows in the order of their questions, each cut to one window of its paragraph where the paragraph is
    longer than its room.

    Item `epoch * len(self) + row` is a row as an epoch sees it: the number carries the epoch, so that workers and
    processes need not be told, and the window depends on seed, epoch and row alone. A window's start is uniform over
    all starts whose window holds the whole answer; with probability `negative_window_ratio` over all others, if there
    are any, labelled `[CLS]`.
    """

    def __init__(self, rows: Dataset, layout: Layout, seed: int, negative_window_ratio: float):
        super().__init__(rows, np.argsort(rows.with_format("numpy")["example"][:], kind="stable"))
        self.layout = layout
        self.seed = seed
        self.negative_window_ratio = negative_window_ratio

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, np.ndarray]]:
        epochs, rows = np.divmod(np.asarray(numbers), len(self))
        return [
            self._cut(example, epoch, row) if len(example["input_ids"]) > example["length"] else example
            for example, epoch, row in zip(super().__getitems__(rows), epochs.tolist(), rows.tolist(), strict=True)
        ]

    def _cut(self, example: dict[str, np.ndarray], epoch: int, row: int) -> dict[str, np.ndarray]:
        layout, context_start = self.layout, int(example["context_start"])
        tokens = len(example["input_ids"]) - context_start - len(layout.after)
        first, last = int(example["start_positions"]) - context_start, int(example["end_positions"]) - context_start
        generator = np.random.default_rng((self.seed, epoch, row))
        start = draw_start(generator, tokens, layout.room, first, last, self.negative_window_ratio)
        keep = np.r_[
            :context_start,
            context_start + start : context_start + start + layout.room,
            context_start + tokens : len(example["input_ids"]),
        ]
        cut = {name: value[keep] if np.ndim(value) else value for name, value in example.items()}
        holds = start <= first and last < start + layout.room
        for name, position in (("start_positions", first), ("end_positions", last)):
            cut[name] = np.int32(context_start + position - start if holds else layout.cls_position)
        return cut


def draw_start(
    generator: np.random.Generator, tokens: int, room: int, first: int, last: int, negative_window_ratio: float
) -> int:
    """The first token of a window of `room` of a paragraph's `tokens` (> `room`), uniform over the starts that hold
    the tokens `first` to `last` (inclusive), or with probability `negative_window_ratio` over those that do not.

    A paragraph whose answer fits no window (`first` < 0 or longer than `room`) gets a start uniform over all.
    """
    starts = tokens - room + 1
    low, high = max(0, last - room + 1), min(first, starts - 1) + 1
    holding = max(0, high - low) if first >= 0 else 0
    negative = generator.random() < negative_window_ratio
    if holding and not (negative and holding < starts):
        return low + int(generator.integers(holding))
    if not holding:
        return int(generator.integers(starts))
    draw = int(generator.integers(starts - holding))
    return draw if draw < low else draw + holding


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch, or to the next multiple of `pad_to_multiple_of` tokens, but not beyond
    `max_seq_length`, for which the model may have no position; [rows, tokens]."""

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int = 1
    max_seq_length: int | None = None

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        lengths = np.array([len(row["input_ids"]) for row in rows])
        width = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        width = min(width, self.max_seq_length or width)
        mask = np.arange(width) < lengths[:, None]
        batch = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        for name in rows[0]:
            if name in ("context_start", "length"):
                continue
            values = [row[name] for row in rows]
            if np.ndim(values[0]):
                wide = name in ("input_ids", "token_type_ids")  # which models look up by
                padded = np.full(mask.shape, padding.get(name, 0), dtype=np.int64 if wide else np.int32)
                padded[mask] = np.concatenate(values)
                batch[name] = torch.from_numpy(padded)
            else:
                batch[name] = torch.from_numpy(np.array(values, dtype=np.int64))
        return batch


def _join(
    layout: Layout,
    questions: Tokens,
    question: np.ndarray,
    paragraphs: Tokens,
    begin: np.ndarray,
    end: np.ndarray,
    dtype: np.dtype | type,
) -> dict[str, pa.Array]:
    """The token columns of rows that join `question[i]` with the paragraph tokens `[begin[i], end[i])`."""
    parts = [layout.before, layout.between, layout.after]
    pool = np.concatenate(
        [*(np.array(part, dtype) for part in parts), questions.ids, paragraphs.ids], dtype=dtype, casting="unsafe"
    )
    at = _bounds([*map(len, parts), len(questions.ids), len(paragraphs.ids)])  # where each begins in the pool
    rows = len(question)
    starts, lengths = np.empty((rows, 5), dtype=np.int64), np.empty((rows, 5), dtype=np.int64)
    starts[:] = np.array([at[0], 0, at[1], 0, at[2]])
    lengths[:] = np.array([len(layout.before), 0, len(layout.between), 0, len(layout.after)])
    starts[:, 1] = at[3] + questions.bounds[question]
    lengths[:, 1] = np.minimum(np.diff(questions.bounds), layout.max_question_length)[question]
    starts[:, 3], lengths[:, 3] = at[4] + begin, end - begin
    taken = _ranges(starts.ravel(), lengths.ravel())
    row_bounds = pa.array(_bounds(lengths.sum(axis=1)).astype(np.int32))
    uncovered = np.zeros(at[4], dtype)
    columns = {"input_ids": pool[taken]}
    if layout.uses_type_ids:
        columns["token_type_ids"] = np.repeat(np.tile(np.array(layout.type_ids, np.int8), rows), lengths.ravel())
    # A token that covers nothing must not be a candidate's end: 0, 0 says so for every kind of it.
    covers = paragraphs.char_starts < paragraphs.char_ends
    columns["char_starts"] = np.concatenate([uncovered, (paragraphs.char_starts * covers).astype(dtype)])[taken]
    columns["char_ends"] = np.concatenate([uncovered, (paragraphs.char_ends * covers).astype(dtype)])[taken]
    return {name: pa.ListArray.from_arrays(row_bounds, pa.array(values)) for name, values in columns.items()}


def _answer_tokens(
    answers: list[dict[str, list]], paragraphs: Tokens, paragraph: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where each question's answer stands in its `paragraph`: first and last token (inclusive, in the flat arrays), -1
    where no token covers it; first character and the one after the last that tokens cover; and whether there is one."""
    labelled = np.array([bool(answer["text"]) for answer in answers])
    firsts = [(answer["text"][0], answer["answer_start"][0]) if answer["text"] else ("", -1) for answer in answers]
    # White space at an answer's edge is covered by no token; where there is nothing else, the answer has no place.
    start = np.array([start + len(text) - len(text.lstrip()) for text, start in firsts])
    end = np.array([start + len(text.rstrip()) for text, start in firsts])
    # Offsets grow within a paragraph; a step between paragraphs makes the flat arrays grow as a whole, so that one
    # binary search serves all questions.
    step = int(paragraphs.char_ends.max(initial=0)) + 2
    base = np.repeat(np.arange(len(paragraphs.bounds) - 1) * step, np.diff(paragraphs.bounds))
    place = paragraph * step
    first = np.searchsorted(paragraphs.char_ends + base, np.clip(start, 0, step - 1) + place, side="right")
    last = np.searchsorted(paragraphs.char_starts + base, np.clip(end, 0, step - 1) + place, side="left") - 1
    covered = labelled & (first <= last) & (last < paragraphs.bounds[paragraph + 1])
    start[covered] = np.maximum(start[covered], paragraphs.char_starts[first[covered]])
    end[covered] = np.minimum(end[covered], paragraphs.char_ends[last[covered]])
    return np.where(covered, first, -1), np.where(covered, last, -1), start, end, labelled


def _tidy_edges(offsets: np.ndarray, text: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [tokens, 2] of tokens of `texts[text]`, with white space cut off both ends of what they cover, and with
    the combining marks behind it that no token covers (stripped accents), which belong to the character before them."""
    starts, ends = offsets[:, 0].copy(), offsets[:, 1].copy()
    joined = "".join(f"{text}\0" for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    base = _bounds([len(text) + 1 for text in texts])[text]
    space = _IS_SPACE[np.minimum(codes, len(_IS_SPACE) - 1)]
    while (move := (starts < ends) & space[base + starts]).any():
        starts += move
    while (move := (starts < ends) & space[base + ends - 1]).any():
        ends -= move
    marks = [code for code in np.flatnonzero(np.bincount(codes)) if unicodedata.category(chr(code))[0] == "M"]
    if marks:
        covered = np.cumsum(
            np.bincount(base + starts, minlength=len(codes)) - np.bincount(base + ends, minlength=len(codes))
        )
        loose = np.isin(codes, marks) & (covered == 0)
        while (move := (starts < ends) & loose[base + ends]).any():
            ends += move
    return starts, ends


def _flat(lists: Iterable[Iterable[int]]) -> np.ndarray:
    """The numbers of all lists one behind the other; drawn through iterators, no list outlives its turn."""
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32)


def _distinct(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts in order of appearance, and for every text its place among them."""
    place: dict[str, int] = {}
    index = np.array([place.setdefault(text, len(place)) for text in texts], dtype=np.int64)
    return list(place), index


def _bounds(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """0 and the running sums of `lengths`."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`range(start, start + length)` of every pair, one behind the other."""
    bounds = _bounds(lengths)
    return np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
