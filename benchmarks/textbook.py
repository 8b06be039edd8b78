"""What a user would run instead, written for comparison: the algorithm of the Transformers question-answering example
(windows of 384 tokens, overlap 128, padded to the maximum, every window trained, logits of every window kept on the
host, Python loops), and the course notebook's way of evaluating one question at a time.

Nothing of the project is used here. Pairs of question and paragraph are tokenized together, as the example does it.
"""

import collections
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator

MAX_LENGTH, OVERLAP, N_BEST, MAX_ANSWER = 384, 128, 20, 30


def tokenize_pairs(tokenizer: Any, examples: dict[str, list], max_length: int, overlap: int) -> Any:
    """Every window of every question's paragraph, padded to `max_length`."""
    return tokenizer(
        [question.lstrip() for question in examples["question"]],
        examples["context"],
        truncation="only_second",
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def training_features(
    examples: dict[str, list], tokenizer: Any, max_length: int = MAX_LENGTH, overlap: int = OVERLAP
) -> dict[str, list]:
    """Rows with `start_positions` and `end_positions`, found by walking over each window's tokens."""
    rows = tokenize_pairs(tokenizer, examples, max_length, overlap)
    sample_of, offset_mapping = rows.pop("overflow_to_sample_mapping"), rows.pop("offset_mapping")
    rows["start_positions"], rows["end_positions"] = [], []
    for i, offsets in enumerate(offset_mapping):
        cls = rows["input_ids"][i].index(tokenizer.cls_token_id)
        sequence = rows.sequence_ids(i)
        answers = examples["answers"][sample_of[i]]
        start, end = cls, cls
        if answers["answer_start"]:
            first_char = answers["answer_start"][0]
            last_char = first_char + len(answers["text"][0])
            first = 0
            while sequence[first] != 1:
                first += 1
            last = len(rows["input_ids"][i]) - 1
            while sequence[last] != 1:
                last -= 1
            if offsets[first][0] <= first_char and offsets[last][1] >= last_char:
                while first < len(offsets) and offsets[first][0] <= first_char:
                    first += 1
                while offsets[last][1] >= last_char:
                    last -= 1
                start, end = first - 1, last + 1
        rows["start_positions"].append(start)
        rows["end_positions"].append(end)
    return rows


def evaluation_features(
    examples: dict[str, list], tokenizer: Any, max_length: int = MAX_LENGTH, overlap: int = OVERLAP
) -> dict[str, list]:
    """Rows with `example_id` and `offset_mapping`, None where a token is not the paragraph's."""
    rows = tokenize_pairs(tokenizer, examples, max_length, overlap)
    sample_of = rows.pop("overflow_to_sample_mapping")
    rows["example_id"] = []
    for i in range(len(rows["input_ids"])):
        sequence = rows.sequence_ids(i)
        rows["example_id"].append(examples["id"][sample_of[i]])
        rows["offset_mapping"][i] = [
            offset if sequence[k] == 1 else None for k, offset in enumerate(rows["offset_mapping"][i])
        ]
    return rows


def search_spans(
    examples: Any,
    features: Any,
    logits: tuple[np.ndarray, np.ndarray],
    n_best_size: int = N_BEST,
    max_answer_length: int = MAX_ANSWER,
) -> dict[str, list[dict]]:
    """The n best of every question out of the 20 best starts times the 20 best ends of each window, in Python."""
    starts, ends = logits
    windows_of = collections.defaultdict(list)
    for i, id_ in enumerate(features["example_id"]):
        windows_of[id_].append(i)
    predictions = {}
    for example in examples:
        found = []
        for i in windows_of[example["id"]]:
            offsets = features[i]["offset_mapping"]
            best_starts = np.argsort(starts[i])[-1 : -n_best_size - 1 : -1].tolist()
            best_ends = np.argsort(ends[i])[-1 : -n_best_size - 1 : -1].tolist()
            for start in best_starts:
                for end in best_ends:
                    if start >= len(offsets) or end >= len(offsets) or not offsets[start] or not offsets[end]:
                        continue
                    if end < start or end - start + 1 > max_answer_length:
                        continue
                    found.append(
                        {
                            "offsets": (offsets[start][0], offsets[end][1]),
                            "score": starts[i][start] + ends[i][end],
                            "start_logit": starts[i][start],
                            "end_logit": ends[i][end],
                        }
                    )
        best = sorted(found, key=lambda candidate: candidate["score"], reverse=True)[:n_best_size]
        for candidate in best:
            begin, stop = candidate.pop("offsets")
            candidate["text"] = example["context"][begin:stop]
        if not best:
            best = [{"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0}]
        scores = np.array([candidate["score"] for candidate in best])
        exponential = np.exp(scores - scores.max())
        for candidate, probability in zip(best, exponential / exponential.sum(), strict=True):
            candidate["probability"] = probability
        predictions[example["id"]] = best
    return predictions


def write_predictions(folder: Path, predictions: dict[str, list[dict]]) -> None:
    """The example's two files: best texts and n-best lists, indented JSON."""
    plain = {
        id_: [{name: value if isinstance(value, str) else float(value) for name, value in one.items()} for one in best]
        for id_, best in predictions.items()
    }
    texts = {id_: best[0]["text"] for id_, best in plain.items()}
    (folder / "predictions.json").write_text(json.dumps(texts, indent=4, ensure_ascii=False), encoding="utf-8")
    (folder / "nbest_predictions.json").write_text(json.dumps(plain, indent=4, ensure_ascii=False), encoding="utf-8")


def evaluate(trainer: Trainer, examples: Any, features: Any, folder: Path) -> dict[str, str]:
    """Forward over all windows, logits to the host, span search, files; the answers by id."""
    output = trainer.predict(features.remove_columns(["example_id", "offset_mapping"]))
    predictions = search_spans(examples, features, output.predictions[:2])
    write_predictions(folder, predictions)
    return {id_: best[0]["text"] for id_, best in predictions.items()}


def make_trainer(model: torch.nn.Module, arguments: Any, features: Any = None) -> Trainer:
    """The plain Trainer over padded rows."""
    return Trainer(model=model, args=arguments, train_dataset=features, data_collator=default_data_collator)


class NotebookQuestions(torch.utils.data.Dataset):
    """The course notebook's test set: an item is one question, all its windows padded to one length.

    `room` and `doc_stride` are tokens of the paragraph: a window's length and the distance between two starts. Nothing
    of a window is kept but its tokens, so answers are decoded from tokens.
    """

    def __init__(self, examples: Any, tokenizer: Any, room: int, doc_stride: int, max_question: int = 40):
        self.questions = tokenizer(examples["question"][:], add_special_tokens=False)["input_ids"]
        contexts = list(dict.fromkeys(examples["context"][:]))
        place = {context: i for i, context in enumerate(contexts)}
        self.paragraph_of = [place[context] for context in examples["context"][:]]
        self.paragraphs = tokenizer(contexts, add_special_tokens=False)["input_ids"]
        self.cls, self.sep = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.room, self.doc_stride, self.max_question = room, doc_stride, max_question

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        question = [self.cls, *self.questions[number][: self.max_question], self.sep]
        paragraph = self.paragraphs[self.paragraph_of[number]]
        ids, types, masks = [], [], []
        length = self.max_question + self.room + 3
        for start in range(0, len(paragraph), self.doc_stride):
            window = [*paragraph[start : start + self.room], self.sep]
            padding = length - len(question) - len(window)
            ids.append(question + window + [0] * padding)
            types.append([0] * len(question) + [1] * len(window) + [0] * padding)
            masks.append([1] * (len(question) + len(window)) + [0] * padding)
        return torch.tensor(ids), torch.tensor(types), torch.tensor(masks)


def notebook_answers(model: torch.nn.Module, tokenizer: Any, data: NotebookQuestions) -> list[str]:
    """Every question's answer: a forward pass a question, in each window the best start and the best end."""
    answers = []
    model.eval()
    with torch.no_grad():
        for ids, types, masks in DataLoader(data, batch_size=1, shuffle=False, pin_memory=torch.cuda.is_available()):
            output = model(
                input_ids=ids.squeeze(0).to(model.device),
                token_type_ids=types.squeeze(0).to(model.device),
                attention_mask=masks.squeeze(0).to(model.device),
            )
            answer, most = "", float("-inf")
            for k in range(ids.shape[1]):
                start_score, start = torch.max(output.start_logits[k], dim=0)
                end_score, end = torch.max(output.end_logits[k], dim=0)
                if start_score + end_score > most:
                    most = start_score + end_score
                    answer = tokenizer.decode(ids[0][k][start : end + 1])
            answers.append(answer.replace(" ", ""))
    return answers
