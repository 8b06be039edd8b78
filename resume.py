"""Which run an output folder holds, and which checkpoint it goes on from."""

import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from datasets.fingerprint import Hasher
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from arguments import RunArguments, RunOptions
from files import UserError, naming_writes, read_json, write_json

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
# What a run writes beside its model and checkpoints
_WRITTEN = ["all_results.json", "README.md", "submission.csv", "*_predictions.json", "report.html", "report_*.png"]

# What training cannot feel: a run may go on with another value. Everything else shapes the weights, or which of them
# are the best.
_WITHOUT_EFFECT = {
    *("config", "dataset_name", "preprocessing_num_workers", "fresh_start", "trust_remote_code", "member"),
    *("n_best_size", "max_predict_samples"),
    *("output_dir", "do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "eval_accumulation_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product counts, see `shape`
    "mixed_precision",  # `fp16` and `bf16` say what came of it
    *("log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step"),
    *("logging_steps", "logging_nan_inf_filter", "report_to", "run_name", "disable_tqdm", "project"),
    *("save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "resume_from_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order", "skip_memory_metrics", "eval_on_start"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
    *("hub_revision", "ddp_timeout", "ddp_backend", "local_rank", "use_cpu", "debug", "trackio_space_id"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "include_for_metrics", "include_num_input_tokens_seen"),
}


def shape(options: RunOptions, arguments: RunArguments, train: Dataset) -> dict[str, Any]:
    """The options and data that decide which weights training ends with, as they stand in a JSON file.

    The batch counts as a whole, over devices and accumulation, so that a run out of memory may go on in smaller steps.
    """
    options_of = {**dataclasses.asdict(options), **arguments.to_dict()}
    shaping = {name: value for name, value in options_of.items() if name not in _WITHOUT_EFFECT}
    shaping["train_batch_size"] = (
        arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    )
    shaping["train_split"] = Hasher.hash([train[column][:] for column in ("id", "question", "context", "answers")])
    return json.loads(json.dumps(shaping, default=str))


def by_first_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns to the first process, which alone calls it.

    Its UserError or OSError is raised in every process: the others would wait for the first one until they time out.
    """
    told: list[Any] = [None, None]
    if PartialState().process_index == 0:
        try:
            told[0] = function(*args)
        except (UserError, OSError) as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def require_one_folder(output_dir: Path, arguments: RunArguments) -> None:
    """Raise UserError in every process unless all of them see the same `output_dir`, as machines do on a shared disk.

    Each process decides by what lies there whether to train and what to go on from; all have to decide the same.
    """
    if arguments.world_size == 1:
        return
    probe = by_first_process(_leave_probe, output_dir)
    # Listed, not looked up: a network disk answers that from the server.
    seen = gather_object([output_dir.is_dir() and probe.name in os.listdir(output_dir)])
    if arguments.process_index == 0:
        probe.unlink()
    if not all(seen):
        strangers = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(
            f"{output_dir} is not one folder for all processes: number {strangers} of {len(seen)} (from 0) does not "
            "see the first one's files; name a folder on a disk that all machines share"
        )


def _leave_probe(output_dir: Path) -> Path:
    with naming_writes(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=output_dir, prefix=".shared.")
        os.close(handle)
    return Path(name)


def is_finished(output_dir: Path, shaping: dict[str, Any]) -> bool:
    """Whether `output_dir` holds this run's trained model.

    Raises UserError if it holds another run, naming the options that differ.
    """
    stored = stored_run(output_dir)
    if stored is None:
        if checkpoints(output_dir):
            raise UserError(
                f"{output_dir} holds checkpoints of a run that is not known ({RUN_FILE} is missing); choose another "
                "--output_dir, or delete them with --fresh_start"
            )
        return False
    # Options that only one of two library versions knows are left out.
    options = stored["options"]
    differing = sorted(name for name in options.keys() & shaping.keys() if options[name] != shaping[name])
    if differing:
        told = "; ".join(f"{name}: {options[name]!r} there, {shaping[name]!r} now" for name in differing)
        raise UserError(
            f"{output_dir} was begun with other options ({told}); use those, choose another --output_dir, or start "
            "anew with --fresh_start"
        )
    return stored["finished"]


def begin(output_dir: Path, shaping: dict[str, Any], fresh_start: bool, processes: int) -> None:
    """Make `output_dir` this run's, and note by how many processes its next checkpoints are written.

    With `fresh_start` what an earlier run left to go on from is deleted; so are answers and figures of another model.
    Raises UserError if files of such names lie there that are no run's.
    """
    previous = stored_run(output_dir)
    stored = None if fresh_start else previous
    written = [path for name in _WRITTEN for path in output_dir.glob(name)]
    if written and previous is None and not (output_dir / "all_results.json").exists():
        raise UserError(f"{output_dir} holds {written[0].name}, which is no run's: choose another --output_dir")
    if fresh_start:
        for checkpoint in checkpoints(output_dir):
            shutil.rmtree(checkpoint)
    if stored is None:
        for path in written:
            path.unlink()
        stored = {"finished": False, "options": shaping, "processes": []}
    write_json(output_dir / RUN_FILE, stored | {"processes": sorted({*stored["processes"], processes})})


def finish(output_dir: Path) -> None:
    """Note that the run in `output_dir` has been trained to its end and its model saved."""
    write_json(output_dir / RUN_FILE, {**stored_run(output_dir), "finished": True})


def stored_run(output_dir: Path) -> dict[str, Any] | None:
    """What `begin` and `finish` noted of the run in `output_dir`; None where no run began."""
    path = output_dir / RUN_FILE
    if not path.exists():
        return None
    stored = read_json(path)
    kinds = {"options": dict, "finished": bool, "processes": list}
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path}: not a run's own file; delete it, or choose another --output_dir")
    return stored


def last_complete_checkpoint(output_dir: Path, processes: Sequence[int]) -> Path | None:
    """The newest checkpoint that was written to its end by a run of one of the numbers of `processes`.

    Broken ones are passed over with a warning.
    """
    for checkpoint in checkpoints(output_dir):
        if any(is_complete(checkpoint, number) for number in processes):
            return checkpoint
        logger.warning(f"{checkpoint} is incomplete and is passed over")
    return None


def relocate_best(checkpoint: Path) -> None:
    """Let a checkpoint of a run whose folder has moved find the run's best checkpoint beside itself."""
    path = checkpoint / "trainer_state.json"
    state = read_json(path)
    best = state.get("best_model_checkpoint")
    beside = checkpoint.parent / Path(best or "").name
    if best and not Path(best).exists() and beside.is_dir():
        write_json(path, state | {"best_model_checkpoint": str(beside)})


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in a run's folder, complete or not, newest first."""
    found = [
        path
        for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)


def is_complete(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint was written to its end by a run of so many processes.

    `trainer_state.json` is written last, so it must be whole JSON; weights, optimizer, schedule and the random state
    of every process must be whole archives, because the files of other processes may be later still, and because a
    checkpoint may have been cut off while it was deleted.
    """
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    archives = ["optimizer.pt", "scheduler.pt", *random_states]
    return bool(weights) and all(zipfile.is_zipfile(checkpoint / name) for name in archives)
