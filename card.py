"""The card (README.md) of a trained model, which the Hub shows."""

from pathlib import Path

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from arguments import RunArguments, RunOptions
from files import replacing_file

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ base_model }} fine-tuned for extractive question answering in Chinese: given a paragraph and a question, it points
at the answer in the paragraph.

{{ scores }}
Exact match is the share of answers that equal a reference answer, ASCII commas deleted, nothing else normalised. F1 is
over characters.

Trained on {{ data }} with peak learning rate {{ learning_rate }} ({{ schedule }}), {{ length }}, batches of {{ batch }}
windows, seed {{ seed }}. Windows ({{ kind }}) have {{ windows.max_seq_length }} tokens, of them at most
{{ windows.max_question_length }} of the question, and start {{ windows.doc_stride }} apart. transformers {{ version }}.
"""


def write_card(
    output_dir: Path,
    options: RunOptions,
    arguments: RunArguments,
    results: dict[str, float],
    windows: dict[str, int],
) -> None:
    """Replace `README.md` in a run's folder by a card with scores, data and recipe; `windows` are lengths in tokens."""
    scored = [(name, results[f"eval_{name}"]) for name in ("exact_match", "f1") if f"eval_{name}" in results]
    evaluation = [
        EvalResult(
            task_type="question-answering",
            dataset_type=Path(options.dataset_name).name,
            dataset_name=Path(options.dataset_name).name,
            dataset_split="validation",
            metric_type=name,
            metric_value=value,
        )
        for name, value in scored
    ]
    local = Path(options.model_name_or_path).exists()
    data = ModelCardData(
        base_model=None if local else options.model_name_or_path,
        language="zh",
        library_name="transformers",
        pipeline_tag="question-answering",
        model_name=output_dir.resolve().name,
        eval_results=evaluation or None,
    )
    lines = [f"| {name} | {value:.5f} |" for name, value in scored]
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=output_dir.resolve().name,
        base_model=Path(options.model_name_or_path).resolve().name if local else options.model_name_or_path,
        scores="\n".join(["| validation | |", "|---|---|", *lines, ""]) if lines else "",
        data=f"`{Path(options.dataset_name).name}`" + (" (train and dev)" if options.train_on_validation else ""),
        learning_rate=arguments.learning_rate,
        schedule=arguments.lr_scheduler_type.value,
        length=f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs",
        batch=arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        seed=arguments.seed,
        kind=options.train_windows,
        windows=windows,
        version=transformers.__version__,
    )
    with replacing_file(output_dir / "README.md") as file:
        file.write(str(card))
