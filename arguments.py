"""What a run can be told: the project's own options, and the TrainingArguments with defaults for this task."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from trainer import SPAN_CHOICES

logger = logging.get_logger(__name__)


def _option(default, help: str, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class RunOptions:
    """Model, data, windows and span search of a run."""

    config: str | None = _option(None, "YAML file of options; flags on the command line win over it")
    member: str | None = _option(None, "which run of a config that holds several, by its name under `members`")
    model_name_or_path: str | None = _option(None, "model to fine-tune or to ask: a folder or a Hub id")
    trust_remote_code: bool = _option(False, "run Python code that comes with the model; off unless you trust it")
    dataset_name: str = _option("data/drcd", "dataset in the SQuAD schema: a folder of prepare_drcd.py or a Hub id")
    train_on_validation: bool = _option(
        False, "train on the train and validation splits together, for a last submission: there is no score then"
    )
    train_windows: str = _option(
        "random",
        "training windows: one random window that holds the answer a question and epoch (random), one with the answer "
        "in its middle (centered, as in the sample code), or all windows of the paragraph (stride)",
        choices=["random", "centered", "stride"],
    )
    negative_window_ratio: float = _option(
        0.1, "share of random training windows that do not hold the answer, from paragraphs longer than one window"
    )
    max_seq_length: int | None = _option(
        None, "tokens of question, paragraph window and special tokens together (the model's own, else 512)"
    )
    max_question_length: int | None = _option(
        None, "tokens kept for the question, a longer one is cut (the model's own, else 64)"
    )
    doc_stride: int | None = _option(
        None, "tokens between the starts of two windows, not their overlap (the model's own, else 2/3 of a window)"
    )
    n_best_size: int = _option(20, "candidates kept for every question")
    max_answer_length: int = _option(50, "longest answer in tokens")
    span_choice: str = _option(
        "joint",
        "best span of a window: highest sum of start and end (joint), or best start and best end each for itself "
        "(independent, as in the sample code)",
        choices=list(SPAN_CHOICES),
    )
    preprocessing_num_workers: int | None = _option(None, "processes that tokenize (1)")
    max_train_samples: int | None = _option(None, "train on the first so many questions only, for a trial")
    max_eval_samples: int | None = _option(None, "evaluate on the first so many questions only, for a trial")
    max_predict_samples: int | None = _option(None, "predict the first so many questions only, for a trial")
    fresh_start: bool = _option(False, "delete the checkpoints of an earlier run in the output folder first")

    def __post_init__(self):
        at_least_one = ("n_best_size", "max_answer_length", "preprocessing_num_workers")
        for name in (*at_least_one, "max_train_samples", "max_eval_samples", "max_predict_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if not 0 <= self.negative_window_ratio <= 1:
            raise ValueError(f"--negative_window_ratio is {self.negative_window_ratio}, must lie between 0 and 1")


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments with this task's defaults.

    `save_strategy` may differ from `eval_strategy` although the best model is kept: the Trainer then saves at every
    evaluation, and `save_between` (with `save_between_steps`) says when else.
    """

    output_dir: str | None = _option(None, "folder of the run (outputs/ and the name of the config or model)")
    per_device_eval_batch_size: int = _option(32, "windows a device evaluates at once")
    learning_rate: float = _option(3e-5, "peak learning rate")
    num_train_epochs: float = _option(2.0, "passes over the training questions")
    warmup_steps: float = _option(0.1, "steps of rising learning rate; below 1: their share of all steps")
    eval_strategy: str = _option("epoch", "when to score the validation split in training: no, steps or epoch")
    save_strategy: str = _option("epoch", "when to save a checkpoint, beside at every evaluation: no, steps or epoch")
    save_total_limit: int | None = _option(2, "checkpoints kept, the best one always among them")
    load_best_model_at_end: bool = _option(True, "end with the model of the best evaluation, not of the last step")
    metric_for_best_model: str | None = _option("exact_match", "score that decides which model is best")
    logging_steps: float = _option(50, "steps between two lines of the training log")
    hub_strategy: str = _option(
        "end",
        "what --push_to_hub uploads while training, beside the finished model: nothing (end), the model (every_save), "
        "or what another machine goes on from by --resume_from_checkpoint last-checkpoint (checkpoint)",
    )
    remove_unused_columns: bool = _option(False, "not used: the span search needs columns that the model does not")

    def __post_init__(self):
        self.steps = [step for step in ("train", "eval", "predict") if getattr(self, f"do_{step}")]
        self._refuse()
        # The search needs every column, the score all rows at once.
        self.remove_unused_columns = self.batch_eval_metrics = False
        self.eval_do_concat_batches = True
        self.output_dir = self.output_dir or ""  # None would become the Trainer's own "trainer_output"
        if self.use_cpu or not torch.accelerator.is_available():
            self.use_cpu = True  # without it, the processes of a `torchrun` on CPUs do not know of each other
            if self.fp16 or self.fp16_full_eval:
                logger.warning("fp16 needs a GPU and there is none: running in float32")
                self.fp16 = self.fp16_full_eval = False
        if self.hub_token:  # for every use of the Hub, and never written to a file of the run
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        self.save_between, self.save_between_steps = SaveStrategy.NO, self.save_steps
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.load_best_model_at_end and self.save_strategy != "best":
            self.save_between = SaveStrategy(self.save_strategy)
            self.save_strategy = self.eval_strategy
            if self.eval_strategy == "steps":
                self.save_steps = self.eval_steps = self.eval_steps or self.logging_steps
        super().__post_init__()

    def _refuse(self) -> None:
        """Raise ValueError for options of the Trainer that cannot be meant, or that leave no answers to search for."""
        at_least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        at_least |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "learning_rate": 0, "seed": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:  # NaN is not either
                raise ValueError(f"--{name} is {getattr(self, name)}, must be at least {least}")
        if not self.save_steps > 0:
            raise ValueError(f"--save_steps is {self.save_steps}, must be above 0")
        scores = ("exact_match", "f1", "loss")
        if (self.metric_for_best_model or "loss").removeprefix("eval_") not in scores:
            raise ValueError(f"--metric_for_best_model is {self.metric_for_best_model!r}, must be one of {scores}")
        if self.prediction_loss_only:
            raise ValueError("--prediction_loss_only leaves no answers to score: drop it")

    def without_evaluation(self) -> None:
        """Settle for a run that cannot evaluate in training: no best model, the last one is kept."""
        if self.save_between != SaveStrategy.NO:
            self.save_strategy, self.save_steps = self.save_between, self.save_between_steps
            self.save_between = SaveStrategy.NO
        self.eval_strategy = type(self.eval_strategy)("no")
        self.load_best_model_at_end = False
