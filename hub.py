"""A run and the Hub: its model and card go there when it ends, its checkpoints while it trains, and they come back.

`run_qa.py --push_to_hub` uses this, not the Trainer's own pushes: those replace the card, hold local files that mean
nothing to a reader, leave out the best checkpoint that a resumed run needs, and fail without a word.
"""

import re
import shutil
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import logging

import resume
from arguments import RunArguments
from files import UserError, link_folder, read_json, replacing_folder, write_json
from hub_errors import explained, reason

logger = logging.get_logger(__name__)

LAST, BEST = "last-checkpoint", "best-checkpoint"  # folders of a repository
_STAGED = ".push-"
# Of a checkpoint, what only its own run can use.
_OF_THE_RUN = ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin"]
# Of a run's folder, what is of no use to a reader, holds passages of the dataset, or names paths of this machine.
# `make push` names the same.
NOT_PUSHED = [
    f"{PREFIX_CHECKPOINT_DIR}-*",
    ".*",
    "report*",
    "runs/*",
    resume.RUN_FILE,
    "trainer_state.json",
    "training_args.bin",
]


def open_repository(arguments: RunArguments, output_dir: Path) -> str | None:
    """The repository (user/name) to push to, made if there is none; None without `--push_to_hub`.

    Only the first process asks the Hub. Raises UserError if the repository cannot be had, which is better known before
    the training than after it.
    """
    if not arguments.push_to_hub:
        return None
    arguments.push_to_hub = False  # the Trainer's own
    if "train" not in arguments.steps and not (output_dir / "config.json").exists():
        raise UserError(f"--push_to_hub: {output_dir} holds no trained model to push; name a run by --output_dir")
    name = arguments.hub_model_id or output_dir.resolve().name
    return resume.by_first_process(_make_repository, name, arguments.hub_private_repo, output_dir)


def _make_repository(name: str, private: bool | None, output_dir: Path) -> str:
    with explained(f"--push_to_hub: no access to the repository {name}", f"nothing in {output_dir} was changed"):
        HfApi().whoami()  # of a repository that exists the next line says nothing about the token
        return HfApi().create_repo(name, private=private, exist_ok=True).repo_id


def push_run(output_dir: Path, repository: str, revision: str | None) -> str:
    """Upload the model, card, figures and answers in a run's folder; the commit's address.

    Raises UserError if that fails. What the repository holds already is not uploaded again.
    """
    kept = f"everything is kept in {output_dir}; the same command again pushes it without training again"
    with explained(f"not pushed to {repository}", kept):
        return (
            HfApi()
            .upload_folder(
                repo_id=repository,
                folder_path=output_dir,
                commit_message="The trained model",
                ignore_patterns=list(NOT_PUSHED),
                revision=revision,
            )
            .commit_url
        )


class CheckpointPush(TrainerCallback):
    """Uploads what `hub_strategy` asks for after each save, beside the training, which goes on if an upload fails.

    every_save: the model, to be loaded from the repository. checkpoint: folders `last-checkpoint` and
    `best-checkpoint`, in one commit, from which `fetch_run` lets another machine go on. all_checkpoints: every
    checkpoint in a folder of its own. A save during an upload is left out, unless `hub_always_push`.
    """

    def __init__(self, repository: str, strategy: HubStrategy):
        self.repository, self.strategy = repository, strategy
        self.api = HfApi()
        self.uploads: list[Future] = []
        self.failures: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            for left in Path(args.output_dir).glob(f"{_STAGED}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    def on_save(self, args, state, control, **kwargs):
        args.distributed_state.wait_for_everyone()  # each process writes its own random state
        busy = self.uploads and not self.uploads[-1].done() and not args.hub_always_push
        if state.is_world_process_zero and not busy and self.strategy != HubStrategy.END:
            try:
                staged = stage(Path(args.output_dir), state.global_step, state.best_model_checkpoint, self.strategy)
                self.uploads.append(self.api.run_as_future(self._upload, staged, args.hub_revision))
            except (OSError, UserError) as error:
                self._failed(state.global_step, error)

    def on_train_end(self, args, state, control, **kwargs):
        if self.uploads:
            self.uploads[-1].result()  # they run one after the other
        if self.failures:
            logger.warning(
                f"{len(self.failures)} uploads of checkpoints to {self.repository} failed, the last one: "
                f"{self.failures[-1]}"
            )

    def _upload(self, staged: Path, revision: str | None) -> None:
        step = staged.name.removeprefix(_STAGED)
        try:
            self.api.upload_folder(
                repo_id=self.repository,
                folder_path=staged,
                commit_message=f"Training, step {step}",
                delete_patterns=[f"{LAST}/*", f"{BEST}/*"] if self.strategy == HubStrategy.CHECKPOINT else None,
                revision=revision,
            )
        except Exception as error:  # as in `explained`
            self._failed(step, error)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _failed(self, step: int | str, error: Exception) -> None:
        self.failures.append(reason(error))
        logger.warning(
            f"the checkpoint of step {step} was not pushed to {self.repository}: {reason(error)}. It is kept here, "
            "training goes on, and the next save is pushed again"
        )


def stage(output_dir: Path, step: int, best: str | None, strategy: HubStrategy) -> Path:
    """A folder of what a save uploads, in links that stay when the checkpoint is deleted during the upload.

    `best` is the path of the best checkpoint so far, if there is any.
    """
    staged, checkpoint = output_dir / f"{_STAGED}{step}", output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    shutil.rmtree(staged, ignore_errors=True)
    if strategy == HubStrategy.EVERY_SAVE:
        link_folder(checkpoint, staged, _OF_THE_RUN)
    elif strategy == HubStrategy.ALL_CHECKPOINTS:
        link_folder(checkpoint, staged / checkpoint.name, ["training_args.bin"])
    else:
        link_folder(checkpoint, staged / LAST, ["training_args.bin"])
        write_json(staged / LAST / resume.RUN_FILE, resume.stored_run(output_dir))
        if best and Path(best).name != checkpoint.name:
            link_folder(Path(best), staged / BEST, _OF_THE_RUN)
    return staged


def fetch_run(repository: str | None, output_dir: Path, revision: str | None) -> None:
    """Put the run whose `last-checkpoint` a repository holds into an empty `output_dir`, as if it had begun there.

    Where a run stands already nothing is done: its checkpoints are the newer ones. Raises UserError if the repository
    cannot be read or its checkpoint is not whole; `output_dir` holds no run then.
    """
    if resume.stored_run(output_dir):
        return
    if repository is None:
        raise UserError(f"--resume_from_checkpoint {LAST} comes from the Hub: name its repository by --hub_model_id")
    with explained(f"--resume_from_checkpoint {LAST} cannot be had from {repository}", f"{output_dir} holds no run"):
        found = Path(snapshot_download(repository, allow_patterns=[f"{LAST}/*", f"{BEST}/*"], revision=revision))
    if not (found / LAST).is_dir():
        raise UserError(f"{repository} has no {LAST}: begin anew, without --resume_from_checkpoint")
    run = resume.stored_run(found / LAST)
    if run is None or not any(resume.is_complete(found / LAST, number) for number in run["processes"]):
        raise UserError(f"{repository}: its {LAST} is not a complete checkpoint of a run; begin anew without it")
    state = read_json(found / LAST / "trainer_state.json")
    last, best = (
        f"{PREFIX_CHECKPOINT_DIR}-{state.get('global_step')}",
        Path(state.get("best_model_checkpoint") or "").name,
    )
    folders = {LAST: last} | ({BEST: best} if best and best != last else {})
    for name, local in folders.items():
        if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", local) or not list((found / name).glob("*.safetensors")):
            raise UserError(f"{repository}: the {name} of its run is missing or has no number; begin anew without it")
    logger.warning(f"going on from {last}, from the Hub: {repository}")
    for name, local in folders.items():
        with replacing_folder(output_dir / local) as folder:
            shutil.copytree(found / name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(resume.RUN_FILE))
    write_json(output_dir / resume.RUN_FILE, run)  # last: with it the folder holds a run
