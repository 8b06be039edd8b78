"""What a run can be told: the project's own options, and the TrainingArguments with defaults for this task."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from trainer import SPAN_CHOICES

logger = logging.get_logger(__name__)


MOST = 2**31 - 1  # of any number that an option may be; no run needs more, and some libraries take no more
RANGES = {
    **dict.fromkeys(("n_best_size", "preprocessing_num_workers"), (1, 10_000)),
    **dict.fromkeys(("max_answer_length", "max_train_samples", "max_eval_samples", "max_predict_samples"), (1, MOST)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, MOST)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, MOST)),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_timeout"), (1, MOST)),
    **dict.fromkeys(("negative_window_ratio", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "adam_epsilon"), (0, MOST)),
    **dict.fromkeys(("max_grad_norm", "logging_steps", "eval_steps", "eval_delay"), (0, MOST)),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "dataloader_num_workers": (0, 10_000),
    "max_steps": (-1, MOST),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, math.nextafter(1, 0))),
}


def refuse_numbers(options: Any) -> None:
    """Raise ValueError for a number among a dataclass's values that is NaN, infinite, or outside its `RANGES`."""
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if isinstance(value, int | float):
            least, most = RANGES.get(option.name, (-MOST, MOST))
            if not value >= least:  # NaN is not either
                raise ValueError(f"--{option.name} is {value}, must be at least {least}")
            if value > most:
                raise ValueError(f"--{option.name} is {value}, must be at most {most}")


def _make_optimizer(weight: list[torch.nn.Parameter], kind: type, kwargs: dict[str, Any]) -> None:
    kwargs = {name: value for name, value in kwargs.items() if name not in ("params", "model", "optimizer_dict")}
    kind(weight, **kwargs)


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
        refuse_numbers(self)


@dataclass
class RunArguments(TrainingArguments):
    """TrainingArguments with this task's defaults.

    `save_strategy` may differ from `eval_strategy` although the best model is kept: the Trainer then saves at every
    evaluation, and `save_between` (with `save_between_steps`) says when else.
    """

    output_dir: str | None = _option(None, "folder of the run (outputs/ and the name of the config or model)")
    mixed_precision: str | None = _option(
        None,
        "half precision: fp16, bf16, auto (bf16 where the GPU has it, fp16 on older ones, none on a CPU; --fp16 and "
        "--bf16 win over it), or no",
        choices=["no", "auto", "bf16", "fp16"],
    )
    per_device_eval_batch_size: int | None = _option(None, "windows a device evaluates at once (a GPU 32, a CPU 8)")
    eval_accumulation_steps: int | None = _option(
        50, "evaluation batches whose candidates stay on the device before they go to the host together"
    )
    learning_rate: float = _option(3e-5, "peak learning rate")
    num_train_epochs: float = _option(2.0, "passes over the training questions")
    warmup_steps: float = _option(0.1, "steps of rising learning rate; below 1: their share of all steps")
    eval_strategy: str = _option(
        "epoch", "when to score the validation split in training", choices=["no", "steps", "epoch"]
    )
    save_strategy: str = _option(
        "epoch", "when to save a checkpoint, beside at every evaluation", choices=["no", "steps", "epoch", "best"]
    )
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
        if self.per_device_eval_batch_size is None:  # on a CPU, larger batches leave the cache and are slower
            self.per_device_eval_batch_size = 32 if torch.accelerator.is_available() and not self.use_cpu else 8
        self.steps = [step for step in ("train", "eval", "predict") if getattr(self, f"do_{step}")]
        self._refuse()
        # The search needs every column, the score all rows at once.
        self.remove_unused_columns = self.batch_eval_metrics = False
        self.eval_do_concat_batches = True
        self.output_dir = self.output_dir or ""  # None would become the Trainer's own "trainer_output"
        if self.mixed_precision in ("no", "fp16", "bf16"):
            self.fp16, self.bf16 = self.mixed_precision == "fp16", self.mixed_precision == "bf16"
        elif self.mixed_precision and not (self.fp16 or self.bf16 or self.use_cpu) and torch.accelerator.is_available():
            self.fp16, self.bf16 = not has_bf16(), has_bf16()
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
        self._try_out()

    def _refuse(self) -> None:
        """Raise ValueError for options of the Trainer that cannot be meant, or that leave no answers to search for."""
        refuse_numbers(self)
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"--{name} is not JSON: {error}") from None
        if not self.save_steps > 0:
            raise ValueError(f"--save_steps is {self.save_steps}, must be above 0")
        scores = ("exact_match", "f1", "loss")
        if (self.metric_for_best_model or "loss").removeprefix("eval_") not in scores:
            raise ValueError(f"--metric_for_best_model is {self.metric_for_best_model!r}, must be one of {scores}")
        if self.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor is not for answer spans, whose loss has none: drop it")
        if self.prediction_loss_only:
            raise ValueError("--prediction_loss_only leaves no answers to score: drop it")

    @property
    def pad_to_multiple_of(self) -> int:
        """What a batch's length in tokens is rounded up to: few lengths, for each of which kernels are made and kept;
        8 is also what tensor cores want."""
        return 64 if self.torch_compile else 8

    def _try_out(self) -> None:
        """Make, of nothing much, what the Trainer would make of its options only when training begins.

        Raises ValueError naming the options that it cannot be made of, e.g. a report to a library that is not there.
        """
        weight = [torch.nn.Parameter(torch.zeros(1))]
        optimizer = torch.optim.SGD(weight, lr=0.1)
        model = PreTrainedModel(PreTrainedConfig())  # some optimizers ask it for layers
        trials = {
            "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(self.report_to)],
            "lr_scheduler_type with --lr_scheduler_kwargs": lambda: get_scheduler(
                self.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=self.lr_scheduler_kwargs
            ),
        }
        if self.torch_compile:
            trials["torch_compile_backend with --torch_compile_mode"] = lambda: torch.compile(
                torch.nn.Identity(), backend=self.torch_compile_backend, mode=self.torch_compile_mode
            )
        if not self.optim_target_modules:
            trials["optim with --optim_args"] = lambda: _make_optimizer(
                weight, *Trainer.get_optimizer_cls_and_kwargs(self, model)
            )
        for names, trial in trials.items():
            try:
                trial()
            except (ValueError, TypeError, RuntimeError, ImportError, LookupError, AttributeError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"--{names}: cannot be used: {reason}") from None

    def without_evaluation(self) -> None:
        """Settle for a run that cannot evaluate in training: no best model, the last one is kept."""
        if self.save_between != SaveStrategy.NO:
            self.save_strategy, self.save_steps = self.save_between, self.save_between_steps
            self.save_between = SaveStrategy.NO
        self.eval_strategy = type(self.eval_strategy)("no")
        self.load_best_model_at_end = False


def has_bf16() -> bool:
    """Whether the GPU computes in bfloat16 itself; older ones, the T4 among them, only emulate it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
