"""A job and its output folder → where the run begins: at the first step, at a checkpoint, or not at all.

Everything that can be refused is refused here, before the weights are read and before anything in the folder changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from lora_sft.console import is_main_process, say
from lora_sft.errors import LoraSftError, OutputError
from lora_sft.training.checkpoints import checkpoints_in, newest_whole, refuse_damaged, step_of
from lora_sft.training.job import Job
from lora_sft.training.output import OutputFolder
from lora_sft.training.record import Record, read_record, refuse_changes
from lora_sft.training.state import read_state

Value = TypeVar("Value")


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: whose step comes before the first that is trained; None: the run starts anew.
        before: what the run was made of when it was begun; None for a new one.
        finished: it ended already.
    """

    checkpoint: Path | None = None
    before: Record | None = None
    finished: bool = False


def where_to_begin(job: Job, folder: OutputFolder, now: Record) -> Beginning:
    """Every file of a checkpoint is verified before it is chosen; all processes choose the same.

    Raises:
        OutputError: there is nothing to resume from, or nothing that is whole.
        SettingError: the run was begun with other settings or data.
    """
    return agreed(lambda: _choose(job, folder, now))


def _choose(job: Job, folder: OutputFolder, now: Record) -> Beginning:
    wanted = job.config.resume_from_checkpoint
    named = Path(wanted).expanduser().absolute() if isinstance(wanted, str) and wanted != "auto" else None
    if wanted is False:
        return Beginning()
    if named is not None:
        refuse_damaged(named)
    if named is None and not folder.begun:
        if wanted is True:
            raise OutputError(f"resume_from_checkpoint: {folder.path} holds no checkpoint; leave it out to start anew")
        return Beginning()
    elsewhere = named is not None and named.parent != folder.path
    begun_in = named.parent if named is not None and not folder.begun else folder.path
    before = read_record(begun_in)
    if before is None:
        raise OutputError(f"resume_from_checkpoint: {begun_in} has no readable start.json, so it is no run of ours")
    if folder.finished and (named is None or elsewhere):
        refuse_changes(before, now, [], folder.path)
        return Beginning(before=before, finished=True)
    if folder.finished:
        raise OutputError(f"output_dir {folder.path}: holds a finished run; name another folder to go on from {named}")
    refuse_changes(before, now, job.config.resume_with_changed, begun_in)
    # A run that began at a checkpoint of another run, and was broken off, has checkpoints of its own.
    is_chosen = named is not None and not (elsewhere and folder.begun)
    checkpoint = named if is_chosen else _newest(folder, wanted is True) or named
    if checkpoint is not None:
        say("resume", f"from {checkpoint}")
    return Beginning(checkpoint, before)


def _newest(folder: OutputFolder, has_to_be: bool) -> Path | None:
    """The newest checkpoint that is whole; None if the run died before its first."""
    found, problems = newest_whole(folder.path)
    for problem in problems:
        say("checkpoint", f"not used: {problem}")
    if found is None and problems:
        raise OutputError(
            f"output_dir {folder.path}: no checkpoint is whole ({'; '.join(problems)}); bring the files back, or name "
            "another folder to start anew"
        )
    if found is None and has_to_be:
        raise OutputError(
            f"resume_from_checkpoint: {folder.path} holds no checkpoint; leave the setting out to start anew"
        )
    if found is None:
        say("resume", f"the run in {folder.path} was broken off before its first checkpoint; it starts anew")
    return found


def later_ones(folder: OutputFolder, checkpoint: Path | None) -> list[Path]:
    """What is called a checkpoint of a later step: damaged, or of a way that the run does not go."""
    if checkpoint is None:
        return checkpoints_in(folder.path)
    return [one for one in checkpoints_in(folder.path) if step_of(one) > step_of(checkpoint)]


def refuse_past_end(job: Job, checkpoint: Path | None) -> bool:
    """Whether nothing is left to train: the process died between the last checkpoint and the end.

    Raises:
        OutputError: more steps were trained than the run has.
    """
    if checkpoint is None:
        return False
    if step_of(checkpoint) > job.total_steps:
        raise OutputError(f"resume_from_checkpoint: {checkpoint} is past the {job.total_steps} steps of this run")
    stops_early = job.config.early_stopping_patience is not None
    return step_of(checkpoint) == job.total_steps or (stops_early and bool(read_state(checkpoint)["stopped_early"]))


def agreed(choose: Callable[[], Value]) -> Value:
    """What the main process chooses, in every process; what it refuses, all refuse."""
    answer: list[Any] = [None]
    if is_main_process():
        try:
            answer = [choose()]
        except LoraSftError as error:
            answer = [error]
    broadcast_object_list(answer)
    if isinstance(answer[0], LoraSftError):
        raise answer[0]
    value: Value = answer[0]
    return value
