"""The card (README.md) of a trained model, which the Hub shows: scores, data, recipe, limits, and how to ask it."""

from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from arguments import RunArguments, RunOptions
from files import replacing_file

_TEMPLATE = '''---
{{ card_data }}
---

# {{ name }}

{{ base_model }} fine-tuned for extractive question answering in Chinese: given a paragraph and a question, it points at
the answer in the paragraph.

## Scores

{{ scores }}
Exact match is counted as the Kaggle competition of the course counts it: the share of answers that equal a reference
answer, ASCII commas deleted on both sides, nothing else normalised. F1 is over characters.

## How to ask it

transformers 5 has no pipeline for question answering. This is all that is needed, with `torch` and `transformers`
installed; `NAME` is the model's repository on the Hub, or a folder that holds it:

```python
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

NAME = "{{ address }}"
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForQuestionAnswering.from_pretrained(NAME, dtype=torch.float32).eval()


def answer(question, paragraph, longest={{ max_answer_length }}):
    """The paragraph's best span of at most `longest` tokens, over all windows that the model was trained with."""
    windows, special = model.config.qa_windows, tokenizer.num_special_tokens_to_add(pair=True)
    room = windows["max_seq_length"] - windows["max_question_length"] - special
    asked = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    asked = asked[: windows["max_question_length"]]
    inputs = tokenizer(
        question[: asked[-1][1]],
        paragraph,
        truncation="only_second",
        max_length=len(asked) + room + special,
        stride=room - windows["doc_stride"],  # the tokenizer's `stride` is the overlap of two windows
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    offsets, _ = inputs.pop("offset_mapping"), inputs.pop("overflow_to_sample_mapping")
    with torch.no_grad():
        logits = model(**inputs)
    context = torch.tensor([[part == 1 for part in inputs.sequence_ids(row)] for row in range(len(offsets))])
    usable = context & (offsets[:, :, 0] < offsets[:, :, 1])
    spans = (usable[:, :, None] & usable[:, None, :]).triu().tril(longest - 1)  # [windows, first token, last token]
    scores = logits.start_logits[:, :, None] + logits.end_logits[:, None, :]
    window, first, last = torch.unravel_index(scores.masked_fill(~spans, -torch.inf).argmax(), scores.shape)
    return paragraph[offsets[window, first, 0] : offsets[window, last, 1]]


print(answer("誰寫了紅樓夢？", "《紅樓夢》是清代作家曹雪芹創作的章回體長篇小說。"))
```

The answers scored above are found in the same way, but a span with a bracket or quotation mark that lacks its other
half gives way to the next best one without.

## Data and recipe

Trained on {{ data }} with peak learning rate {{ learning_rate }} ({{ schedule }}), {{ length }}, batches of {{ batch }}
windows, seed {{ seed }}. Windows ({{ kind }}) have {{ windows.max_seq_length }} tokens, of them at most
{{ windows.max_question_length }} of the question, and start {{ windows.doc_stride }} apart. Versions: {{ versions }}.

## Limits

It always answers with a piece of the paragraph, also where the paragraph does not hold the answer, and never with more
than {{ max_answer_length }} tokens. What the paragraph has wrong, the answer has wrong. The scores are those of one
dataset; on texts of another kind they are likely to be lower.

## Licence

No licence is stated for this model. What was learnt from {{ base_model }} and from {{ data }} stands under their terms;
DRCD, if it is in the data, is CC BY-SA 3.0 and derived from Wikipedia.
'''


def write_card(
    output_dir: Path,
    options: RunOptions,
    arguments: RunArguments,
    results: dict[str, float],
    windows: dict[str, int],
    repository: str | None = None,
) -> None:
    """Replace `README.md` in a run's folder by a card with scores, data, recipe, limits and code to ask the model.

    `windows` are lengths in tokens, `repository` is where the model is pushed to (user/name), if it is known. Of
    models and datasets in folders only the folder's name is told.
    """
    scored = [(name, results[f"eval_{name}"]) for name in ("exact_match", "f1") if f"eval_{name}" in results]
    dataset = Path(options.dataset_name).resolve().name if is_folder(options.dataset_name) else options.dataset_name
    base_model = options.model_name_or_path
    evaluation = [
        EvalResult(
            task_type="question-answering",
            task_name="Extractive question answering",
            dataset_type=dataset,
            dataset_name=Path(dataset).name,
            dataset_split="validation",
            metric_type=name,
            metric_name={"exact_match": "Exact match", "f1": "F1 over characters"}[name],
            metric_value=value,
        )
        for name, value in scored
    ]
    local = is_folder(base_model)
    name = repository.split("/")[-1] if repository else output_dir.resolve().name
    data = ModelCardData(
        base_model=None if local else base_model,
        datasets=None if is_folder(options.dataset_name) else [dataset],
        language="zh",
        library_name="transformers",
        pipeline_tag="question-answering",
        model_name=name,
        eval_results=evaluation or None,
    )
    lines = [f"| {name} | {value:.5f} |" for name, value in scored]
    count = f" ({results['eval_samples']} questions)" if "eval_samples" in results else ""
    steps = arguments.max_steps
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name,
        base_model=Path(base_model).resolve().name if local else base_model,
        address=repository or name,
        scores="\n".join([f"| validation{count} | |", "|---|---|", *lines, ""]) if lines else "Not scored.\n",
        data=f"`{dataset}`" + (" (train and dev)" if options.train_on_validation else ""),
        max_answer_length=options.max_answer_length,
        learning_rate=arguments.learning_rate,
        schedule=arguments.lr_scheduler_type.value,
        length=f"{steps} steps" if steps > 0 else f"{arguments.num_train_epochs:g} epochs",
        batch=arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        seed=arguments.seed,
        kind=options.train_windows,
        windows=windows,
        versions=", ".join(
            f"{used.__name__} {used.__version__}" for used in (transformers, torch, datasets, tokenizers)
        ),
    )
    with replacing_file(output_dir / "README.md") as file:
        file.write(str(card))


def is_folder(name: str) -> bool:
    """Whether a model's or dataset's name is a folder here, not one of the Hub."""
    return Path(name).exists()
