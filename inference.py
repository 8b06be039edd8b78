"""Ask a trained model: question and paragraph → answer, by run_qa.py's own code, with the defaults of its options.

It takes the place of the question-answering pipeline that transformers 5 no longer has:

    from inference import Reader

    reader = Reader("outputs/strong")
    answer = reader.answer("誰創辦了這所學校？", paragraph)
    answer.text, answer.start, answer.end, answer.probability

Run alone, it prints the answer and the next best; the paragraph comes from a file, or from standard input:

    python inference.py outputs/strong --question 誰創辦了這所學校？ --context_file paragraph.txt
"""

import argparse
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arguments import RunOptions
from files import UserError, printable, read_text
from model import choose_layout, load_model
from options import Parser, command
from postprocess import choose, merge_windows, nbest_lists
from trainer import SPAN_CHOICES, find_spans, model_inputs
from windows import Collator, build_features


@dataclass(frozen=True)
class Answer:
    """An answer and its rivals: `text` is `context[start:end]`, in characters of the paragraph, end exclusive.

    `nbest` are the candidates of an n-best file, best first (`postprocess.nbest_lists`); the answer is one of them,
    seldom not the first (`postprocess.choose`). `probability` is the answer's share among them. In a paragraph without
    any candidate (of control characters, say) the text is empty, both offsets and the probability are 0, the score is
    -inf, and `nbest` is empty.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float
    nbest: list[dict]


class Reader:
    """A trained model, from a folder or the Hub, that answers questions about paragraphs of any length.

    It runs on the accelerator if there is one (or on `device`), `batch_size` windows at a time, with the window lengths
    that the model was trained with. The other options are those of run_qa.py. Several threads may share a reader: they
    take turns. Raises UserError for what cannot be loaded or has not been trained to answer questions.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        n_best_size: int = RunOptions.n_best_size,
        max_answer_length: int = RunOptions.max_answer_length,
        span_choice: str = RunOptions.span_choice,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        for name, value in (("n_best_size", n_best_size), ("max_answer_length", max_answer_length)):
            if value < 1:
                raise UserError(f"{name} is {value}, must be at least 1")
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, must be at least 1")
        if span_choice not in SPAN_CHOICES:
            raise UserError(f"span_choice is {span_choice!r}, must be one of {', '.join(SPAN_CHOICES)}")
        self.tokenizer, self.model = load_model(model_name_or_path, trust_remote_code)
        kinds = self.model.config.architectures or []  # as the checkpoint has it
        if kinds and not any("QuestionAnswering" in kind for kind in kinds):
            raise UserError(
                f"{model_name_or_path} is a {kinds[0]}, which has not learnt to answer questions: train it with "
                "run_qa.py and name the folder of that run"
            )
        self.layout = choose_layout(self.tokenizer, self.model)
        self.search = {
            "span_choice": span_choice,
            "n_best_size": n_best_size,
            "max_answer_length": max_answer_length,
        }
        self.batch_size = batch_size
        self.device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        self.model.to(self.device).eval()
        self._turn = threading.Lock()  # fast tokenizers cannot be used by two threads at once

    def answer(self, question: str, context: str) -> Answer:
        """The answer to a question in the paragraph `context`. Raises UserError as `answer_batch` does."""
        return self.answer_batch([question], [context])[0]

    def answer_batch(self, questions: Sequence[str], contexts: Sequence[str] | str) -> list[Answer]:
        """The answers to many questions, each in its own paragraph, or all in one.

        Raises UserError if a question or paragraph is blank or no text that UTF-8 can hold, or if their numbers differ.
        """
        contexts = [contexts] * len(questions) if isinstance(contexts, str) else list(contexts)
        _refuse_unusable(questions, contexts)
        nbest = self._nbest(list(questions), contexts) if questions else []
        return [_answer(candidates) for candidates in nbest]

    def _nbest(self, questions: list[str], contexts: list[str]) -> list[list[dict]]:
        """Every question's candidates, as they stand in an n-best file."""
        columns = {"question": questions, "context": contexts}
        found = []
        with self._turn:
            windows = build_features(
                columns, range(len(questions)), self.tokenizer, self.layout, windows="stride", labels=False
            )
            order = np.argsort(-windows["length"].to_numpy(), kind="stable")  # like lengths pad each other least
            for first in range(0, len(order), self.batch_size):
                found.append(self._find(windows.take(order[first : first + self.batch_size]).to_pylist()))
        example, scores, spans = (np.concatenate(parts) for parts in zip(*found, strict=True))
        candidates = merge_windows(example, scores, spans, len(questions), self.search["n_best_size"])
        return list(nbest_lists(candidates, contexts))

    @torch.inference_mode()
    def _find(self, rows: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Question, scores and spans of each window, as `merge_windows` takes them."""
        batch = {name: value.to(self.device) for name, value in Collator(self.tokenizer)(rows).items()}
        scores, spans = find_spans(self.model(**model_inputs(batch)), batch, **self.search)
        return batch["example"].cpu().numpy(), scores.cpu().numpy(), spans.cpu().numpy()


def _answer(nbest: list[dict]) -> Answer:
    if not nbest:
        return Answer("", 0, 0, -float("inf"), 0.0, [])
    text = choose(candidate["text"] for candidate in nbest)
    return Answer(**next(candidate for candidate in nbest if candidate["text"] == text), nbest=nbest)


def _refuse_unusable(questions: Sequence[str], contexts: Sequence[str]) -> None:
    if isinstance(questions, str):
        raise UserError("answer_batch takes a list of questions; for one question there is answer")
    if len(questions) != len(contexts):
        raise UserError(f"there are {len(questions)} questions for {len(contexts)} paragraphs; each needs its own")
    for what, texts in (("question", questions), ("paragraph", contexts)):
        for number, text in enumerate(texts, start=1):
            which = f"the {what}" if len(texts) == 1 else f"{what} {number}"
            if not isinstance(text, str):
                raise UserError(f"{which} must be a text, is {str(text)[:40]!r}")
            if not text.strip():
                raise UserError(f"{which} is empty: write one")
            if printable(text) != text:
                raise UserError(f"{which} holds half a surrogate pair, which is no character: take it out")


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.context_file:
        context = read_text(arguments.context_file)
    else:
        context = sys.stdin.buffer.read().decode("utf-8", "replace")
    reader = Reader(arguments.model_name_or_path)
    answer = reader.answer(arguments.question, context)
    print(answer.text)
    for candidate in answer.nbest[: max(0, arguments.n_best_size)]:
        place = f"{candidate['start']}-{candidate['end']}"
        print(f"    {candidate['probability']:7.4f}  {place:<12}{candidate['text']}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_name_or_path", help="a trained model: a folder or a Hub id")
    parser.add_argument("--question", required=True)
    parser.add_argument("--context_file", help="UTF-8 file with the paragraph (standard input)")
    parser.add_argument("--n_best_size", type=int, default=5, help="candidates printed (5)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
