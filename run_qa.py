"""Fine-tune a model for Chinese extractive question answering, score it, and answer the test questions.

Reads a dataset in the SQuAD schema (`prepare_drcd.py` makes one of the course files) and a model with a fast tokenizer;
writes the trained model, predictions, n-best lists, `submission.csv`, `all_results.json` and `report.html` to the
output folder.

    accelerate launch run_qa.py --model_name_or_path hfl/chinese-macbert-large
"""

import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

import hub
import resume
from arguments import RunArguments, RunOptions
from card import write_card
from files import UserError, naming_writes, read_json, write_json
from model import choose_layout, load_model
from options import command, parse_options
from postprocess import Candidates, best_texts, merge_windows, nbest_lists, write_answers
from report import read_run, write_report
from scoring import breakdown, breakdown_table, note_dataset, read_results, score_texts
from splits import SPLIT_OF, load_splits
from trainer import QuestionAnsweringTrainer
from windows import Collator, EvaluationWindows, Layout, TrainingWindows, split_features

logger = logging.get_logger("run_qa")


@command
def main(argv: Sequence[str] | None = None) -> None:
    options, arguments = parse_options((RunOptions, RunArguments), argv, __doc__)
    output_dir = choose_output_dir(options, arguments)
    resume.require_one_folder(output_dir, arguments)
    dataset = load_splits(options, arguments)
    shaping = resume.shape(options, arguments, dataset["train"]) if "train" in arguments.steps else None
    repository = hub.open_repository(arguments, output_dir)
    if arguments.resume_from_checkpoint == hub.LAST and not Path(hub.LAST).is_dir():
        arguments.resume_from_checkpoint = None
        name = repository or arguments.hub_model_id
        resume.by_first_process(hub.fetch_run, name, output_dir, arguments.hub_revision)
    trained = is_trained(options, shaping, output_dir)
    results = read_results(output_dir)

    set_seed(arguments.seed)
    tokenizer, model = load_model(output_dir if trained else options.model_name_or_path, options.trust_remote_code)
    layout = choose_layout(tokenizer, model, options.max_seq_length, options.max_question_length, options.doc_stride)
    features = {step: make_features(step, dataset, options, arguments, tokenizer, layout) for step in arguments.steps}
    trainer = make_trainer(options, arguments, dataset, features, tokenizer, model, layout)
    if repository:
        trainer.add_callback(hub.CheckpointPush(repository, arguments.hub_strategy))

    if "train" in features and not trained:
        with naming_writes(output_dir):
            results = train(trainer, output_dir, shaping, options.fresh_start)
    for step in ("eval", "predict"):
        if step in arguments.steps:
            results |= answer(trainer, step, dataset[SPLIT_OF[step]], features[step], output_dir)
    if trainer.is_world_process_zero():
        finish(options, arguments, results, dataset, output_dir, trainer, repository)
        if repository:
            print(f"pushed to {hub.push_run(output_dir, repository, arguments.hub_revision)}")
    trainer.end()


def choose_output_dir(options: RunOptions, arguments: RunArguments) -> Path:
    """`--output_dir`, else `outputs/` and the name of the config (and its member), else of the model."""
    if options.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: name a model folder or Hub id, e.g. bert-base-chinese")
    if Path(options.model_name_or_path).is_dir():  # `model/` is `model`
        options.model_name_or_path = str(Path(options.model_name_or_path))
    if not arguments.output_dir:
        named = Path(options.config).stem if options.config else Path(options.model_name_or_path).resolve().name
        names = [named, options.member] if options.member else [named]
        for name in names:  # `..`, or a member `a/../../b`, would lead out of outputs/
            if name in ("", ".", "..") or Path(name).name != name:
                raise UserError(f"{name!r} is no name for a folder in outputs/; choose one with --output_dir")
        arguments.output_dir = str(Path("outputs", *names))
    return Path(arguments.output_dir)


def is_trained(options: RunOptions, shaping: dict[str, Any] | None, output_dir: Path) -> bool:
    """Whether the model to answer with lies in the output folder: this run's, trained to its end.

    `shaping` is the `resume.shape` of a run that trains, None for one that does not. Raises UserError if the folder is
    another run's.
    """
    if shaping is None:
        stored = resume.stored_run(output_dir)
        asked = Path(options.model_name_or_path).resolve()
        if stored is None or asked.is_relative_to(output_dir.resolve()):
            return False
        begun_with = stored["options"].get("model_name_or_path")
        if begun_with != options.model_name_or_path:
            raise UserError(f"{output_dir} holds a run of {begun_with}; name another --output_dir for these answers")
        if not stored["finished"]:
            raise UserError(
                f"{output_dir} is not trained to its end: train it first, by the same command without --do_"
            )
        return True
    if options.fresh_start:
        return False
    finished = resume.is_finished(output_dir, shaping)
    if finished:
        logger.warning(f"{output_dir} is trained already and is not trained again (--fresh_start would)")
    return finished


def make_features(
    step: str,
    dataset: DatasetDict,
    options: RunOptions,
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
) -> TrainingWindows | EvaluationWindows:
    """The windows of a step's split (`windows.build_features`), cached by `datasets`."""
    split = SPLIT_OF[step]
    with arguments.main_process_first(desc=f"windows of {split}"):
        features = split_features(
            dataset[split],
            tokenizer,
            layout,
            windows=options.train_windows if step == "train" else "stride",
            labels=step != "predict",
            num_proc=options.preprocessing_num_workers,
            desc=f"windows of {split}",
        )
        if step != "train":
            return EvaluationWindows(features)
    return TrainingWindows(features, layout, arguments.seed, options.negative_window_ratio)


def make_trainer(
    options: RunOptions,
    arguments: RunArguments,
    dataset: DatasetDict,
    features: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    layout: Layout,
) -> QuestionAnsweringTrainer:
    """The Trainer over the features, which scores the validation split by `exact_match` and `f1`.

    Raises UserError for options that it cannot be made with.
    """
    if "validation" in dataset and "eval" not in features:
        features = features | {"eval": make_features("eval", dataset, options, arguments, tokenizer, layout)}
    train_rows = features.get("train")
    make = functools.partial(
        QuestionAnsweringTrainer,
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer, arguments.pad_to_multiple_of, layout.max_seq_length),
        train_dataset=train_rows,
        eval_dataset=features.get("eval"),
        processing_class=tokenizer,
        compute_metrics=functools.partial(score, dataset["validation"], options.n_best_size)
        if "validation" in dataset
        else None,
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
        span_choice=options.span_choice,
        questions_a_row=len(dataset["train"]) / len(train_rows) if train_rows is not None else 1.0,
    )
    try:
        return make()
    except (ImportError, RuntimeError, ValueError) as error:  # e.g. a library that is not installed
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the Trainer cannot be made with these options: {reason}") from None


def train(
    trainer: QuestionAnsweringTrainer, output_dir: Path, shaping: dict[str, Any], fresh_start: bool
) -> dict[str, float]:
    """Train from the start or from the last complete checkpoint, and save the model that the run ends with."""
    resume.by_first_process(resume.begin, output_dir, shaping, fresh_start, trainer.args.world_size)
    processes = resume.stored_run(output_dir)["processes"]
    checkpoint = resume.last_complete_checkpoint(output_dir, processes)
    if trainer.args.resume_from_checkpoint is not None:
        checkpoint = Path(trainer.args.resume_from_checkpoint)
        if not any(resume.is_complete(checkpoint, number) for number in processes):
            raise UserError(f"--resume_from_checkpoint {checkpoint}: not a complete checkpoint of such a run")
    if checkpoint is not None:
        logger.warning(f"resuming from {checkpoint}")
        resume.by_first_process(resume.relocate_best, checkpoint)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    except pickle.UnpicklingError:  # torch.load(weights_only=True) refuses objects, which could run code
        raise UserError(f"{checkpoint} holds other objects than tensors and is not loaded; delete it") from None
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        resume.finish(output_dir)
    return metrics


def answer(
    trainer: QuestionAnsweringTrainer, step: str, examples: Dataset, features: EvaluationWindows, output_dir: Path
) -> dict[str, float]:
    """Find the answers of a split, write their files, and return the metrics (`eval_...` or `test_...`)."""
    prefix = "eval" if step == "eval" else "test"
    trainer.compute_metrics = None
    output = trainer.predict(features, metric_key_prefix=prefix)
    candidates = merge(examples, trainer.n_best_size, output.predictions)
    metrics = dict(output.metrics)
    references = [answers["text"] for answers in examples["answers"]] if "answers" in examples.column_names else []
    if any(references):
        texts = best_texts(candidates, examples["context"])
        metrics |= {f"{prefix}_{name}": value for name, value in score_texts(texts, references).items()}
    metrics[f"{prefix}_samples"] = len(examples)
    trainer.log(dict(metrics))
    if step == "eval":
        metrics["eval_breakdown"] = breakdown(examples, texts, *window_facts(features))
    if trainer.is_world_process_zero():
        write_answers(output_dir, prefix, examples["id"], nbest_lists(candidates, examples["context"]))
    return metrics


def window_facts(features: EvaluationWindows) -> tuple[np.ndarray, np.ndarray]:
    """For every question of labelled features: its number of windows, and whether one holds the whole answer."""
    columns = features.rows
    example = columns["example"][:]
    holds = columns["start_positions"][:] >= columns["context_start"][:]  # else the label is on [CLS]
    return np.bincount(example), np.bincount(example, weights=holds) > 0


def merge(examples: Dataset, n_best_size: int, predictions: tuple[Any, Any, Any]) -> Candidates:
    """The candidates of every question of a split, from the Trainer's predictions over its windows."""
    example, scores, spans = predictions
    return merge_windows(example, scores, spans, len(examples), n_best_size)


def score(examples: Dataset, n_best_size: int, prediction: EvalPrediction) -> dict[str, float]:
    """`exact_match` and `f1` of the best answers in a Trainer's predictions; on every process, as all need the best."""
    candidates = merge(examples, n_best_size, prediction.predictions)
    texts = best_texts(candidates, examples["context"])
    return score_texts(texts, [answers["text"] for answers in examples["answers"]])


def finish(
    options: RunOptions,
    arguments: RunArguments,
    results: dict[str, float],
    dataset: DatasetDict,
    output_dir: Path,
    trainer: QuestionAnsweringTrainer,
    repository: str | None,
) -> None:
    """Write `all_results.json`, the model card and the report, and print what was written where, and the scores."""
    write_json(output_dir / "all_results.json", results)
    if "eval" in arguments.steps:
        note_dataset(output_dir, options.dataset_name)
    if "train" in arguments.steps:
        write_card(output_dir, options, arguments, results, trainer.model.config.qa_windows, repository)
    if "eval" in arguments.steps:
        try:
            write_report(read_run(output_dir), dataset["validation"])
        except UserError as error:  # the run itself is whole without it
            logger.warning(f"no report: {error}")
    print_summary(output_dir, arguments.steps, results, dataset)


def print_summary(output_dir: Path, steps: Sequence[str], results: dict[str, float], dataset: DatasetDict) -> None:
    """The closing lines of a run: five questions with answers, the scores, and the files."""
    print()
    if "eval" in steps:
        examples, predictions = dataset["validation"], read_json(output_dir / "eval_predictions.json")
        for row in examples.select(range(min(5, len(examples)))):
            gold = " / ".join(dict.fromkeys(row["answers"]["text"]))
            print(f"{row['question']}\n    answer: {predictions[row['id']]}    gold: {gold}")
        print(f"\n{breakdown_table(results['eval_breakdown'])}")
        print(f"\nvalidation: exact match {results['eval_exact_match']:.5f}, F1 {results['eval_f1']:.5f}")
    if "test_exact_match" in results and "predict" in steps:
        print(f"test: exact match {results['test_exact_match']:.5f}, F1 {results['test_f1']:.5f}")
    print(f"everything is in {output_dir}:")
    told = {
        "model.safetensors": "the trained model, with its tokenizer and card",
        "all_results.json": "all figures of the run",
        "eval_predictions.json": "answers of the validation split (eval_nbest_predictions.json: the n best)",
        "test_predictions.json": "answers of the test split (test_nbest_predictions.json: the n best)",
        "submission.csv": "the submission",
        "report.html": "scores, curves and wrong answers, to open in a browser",
    }
    for name, what in told.items():
        if (output_dir / name).exists():
            print(f"    {name:<24}{what}")


if __name__ == "__main__":
    main()
