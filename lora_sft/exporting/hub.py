"""An adapter, or a merged model, → one commit in a repository of the hub, read back and compared.

What is sent is first laid out in a folder of its own, with a card, and looked through for paths and secrets. The
access token is that of `hf auth login` or HF_TOKEN; it is neither asked for nor shown.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_sft.console import say
from lora_sft.errors import RunError, SettingError, UsageError, VerificationError
from lora_sft.exporting.target import Facts, Order, Target
from lora_sft.model.fingerprint import hash_of_file
from lora_sft.model.loading import MANIFEST
from lora_sft.publishing.card import card_of, licence_beside, licence_in, merged_card
from lora_sft.publishing.public import (
    ADAPTER_FILES,
    BASE_FILES,
    MERGE_RECORD,
    MODEL_FILES,
    copy_public,
    has_hub_form,
    is_hub_name,
    read_json,
    read_metrics,
    read_run,
    refuse_leaks,
)
from lora_sft.settings import read_yaml

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Made = TypeVar("Made")

DOWNLOADED_BYTES = 2**30
"""Larger files are not downloaded again: of those the hash that the hub computed itself is compared."""

LICENCE_SECONDS = 5.0

OPTIONS = {
    "repo_id": "where to: name or owner/name (required)",
    "private": "whether it is hidden from others (default true)",
    "merged": "send this folder, made from the adapter by `lora-sft merge`, instead of the adapter",
    "base_model": "hub name of the base, if the adapter was trained on a folder",
    "license": "of what is sent, as the hub calls it (apache-2.0, …); unset: that of the base, if it can be found",
    "card": "a file to send as README.md instead of the card that is made",
    "message": "of the commit",
    "revision": "branch to commit to (default main); is made if it is not there",
}


@dataclass(frozen=True)
class Push:
    """The options of one push; their meaning is in `OPTIONS`."""

    repo_id: str
    private: bool = True
    merged: Path | None = None
    base_model: str | None = None
    license: str | None = None
    card: Path | None = None
    message: str | None = None
    revision: str = "main"


def read_push(options: Mapping[str, Any]) -> Push:
    """Options as they were given → Push.

    Raises:
        SettingError: names everything that is wrong.
    """
    given = {name: value for name, value in options.items() if value not in (None, "")}
    problems = [f'no option "{name}"; there are {", ".join(OPTIONS)}' for name in given if name not in OPTIONS]
    words = {name: str(value) for name, value in given.items() if name in OPTIONS}
    private = read_yaml(words.get("private", "true"))
    if not isinstance(private, bool):
        problems.append(f"private: {private!r} is neither true nor false")
    if not words.get("repo_id"):
        problems.append("repo_id is missing: say where to, as repo_id=owner/name")
    elif not has_hub_form(words["repo_id"]):
        problems.append(f"repo_id: {words['repo_id']!r} is no name of the hub; it is written name or owner/name")
    if "base_model" in words and not is_hub_name(words["base_model"]):
        problems.append(f"base_model: {words['base_model']!r} is no name of the hub, but may be a folder here")
    problems += (
        [f"card: {words['card']}: no such file"] if "card" in words and not Path(words["card"]).is_file() else []
    )
    problems += _merged_problems(Path(words["merged"])) if "merged" in words else []
    if problems:
        raise SettingError.of(problems)
    files: dict[str, Any] = {name: Path(words.pop(name)) for name in ("merged", "card") if name in words}
    return Push(**{**words, **files, "private": private})


def _merged_problems(folder: Path) -> list[str]:
    whole = (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))
    return [] if whole else [f"merged: {folder} holds no merged model; `lora-sft merge` makes one"]


def refusals(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """What can be known without asking the hub."""
    try:
        push = read_push(options)
    except SettingError as error:
        return [str(error)]
    problems = []
    base = facts.adapter.get("base_model_name_or_path")
    if push.merged is None and base and not push.base_model and not is_hub_name(base):
        problems.append(
            f"the adapter was trained on a folder ({base}), which nobody else has; say the base's hub name with "
            "base_model, or merge it and send that with merged"
        )
    return problems + [words for words in readiness().values() if words]


def readiness() -> dict[str, str]:
    """{what sending needs: what is wrong with it, or ""}; the hub is not asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return {"hub": "HF_HUB_OFFLINE is set, so nothing can be sent; unset it"}
    no_token = "no access token for the hub: `hf auth login` stores one, or set HF_TOKEN"
    return {"hub": "" if get_token() else no_token}


def write(order: Order) -> dict[str, Any]:
    """Lays out what is sent in `order.folder`, sends it as one commit, and compares what the hub gives back.

    Raises:
        UsageError: the hub cannot be reached, does not let us write, or would show what is to be private; or a file
            holds a path or a secret. Nothing was sent.
        RunError: sending failed; the repository has no new commit.
        VerificationError: what the hub gives back differs from what was sent.
    """
    from huggingface_hub import HfApi, get_token

    push = read_push(order.options)
    if push.merged:
        _check_origin(order.adapter, push.merged)
    api = HfApi(library_name="lora_sft")
    repo_id = _before(lambda: _reach(api, push))
    _lay_out(order, push, repo_id, api)
    here = [order.adapter.absolute(), order.output.absolute(), order.folder.absolute(), Path.cwd(), Path.home()]
    base = [order.spec.name] if Path(order.spec.name).is_absolute() else []
    refuse_leaks(order.folder, [*here, *base], get_token())
    _before(lambda: _open(api, repo_id, push))
    commit, url = _send(api, repo_id, push, order.folder)
    verified = _compare(api, repo_id, commit, order.folder)
    say("hub", f"{url} ({'private' if push.private else 'public'}), {verified['files']} files as sent")
    return {
        "repo_id": repo_id,
        "url": url,
        "commit": commit,
        "private": push.private,
        "verified": verified,
        "serve": _serve(repo_id, push),
    }


def _serve(repo_id: str, push: Push) -> str:
    name = repo_id.rpartition("/")[2]
    return (
        f"vllm serve {repo_id}" if push.merged else f"hf download {repo_id} --local-dir {name} && lora-sft chat {name}"
    )


# --- the hub -----------------------------------------------------------------------------------------------


def _before(ask: Callable[[], Made]) -> Made:
    """Asks the hub something before anything is sent: what goes wrong then is an error of usage."""
    from huggingface_hub import constants

    try:
        return ask()
    except _hub_errors() as error:
        raise UsageError(f"the hub ({constants.ENDPOINT}): {_words(error)}; nothing was sent") from None


def _hub_errors() -> tuple[type[Exception], ...]:
    """What its client raises: errors of HTTP, of the disk, and plain ones for a request or file it does not like."""
    from huggingface_hub import errors

    return (errors.HfHubHTTPError, *errors.HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def _words(error: Exception) -> str:
    """The error's sentence that tells most, on one line, without the token."""
    from huggingface_hub import get_token

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    response = getattr(cause, "response", None)
    code = f"{response.status_code} " if response is not None and str(response.status_code) not in str(cause) else ""
    words = code + (" ".join(lines[:2]) or type(cause).__name__)
    token = get_token()
    return (words.replace(token, "…") if token else words).rstrip(".")


def _reach(api: "HfApi", push: Push) -> str:
    """Whether the hub is there and knows us, and the repository may be written to → its full name."""
    who = api.whoami()
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UsageError(f"the access token of {who['name']} may only read; make one that may write, and log in again")
    repo_id = push.repo_id if "/" in push.repo_id else f"{who['name']}/{push.repo_id}"
    is_private = _is_private(api, repo_id)
    if is_private is False and push.private:
        raise UsageError(
            f"{repo_id} exists and is public, and what is sent there is seen by everybody; say private=false if that "
            "is meant, or name another repository"
        )
    if is_private and not push.private:
        raise UsageError(
            f"{repo_id} exists and is private; make it public on its page first, or leave private=false out"
        )
    return repo_id


def _is_private(api: "HfApi", repo_id: str) -> bool | None:
    """None if there is no such repository (or none that we may see)."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.model_info(repo_id).private)
    except RepositoryNotFoundError:
        return None


def _open(api: "HfApi", repo_id: str, push: Push) -> None:
    """Makes the repository and the branch, if they are not there, and looks whether it is as private as was asked."""
    api.create_repo(repo_id, private=push.private, exist_ok=True)
    if _is_private(api, repo_id) is not push.private:
        raise UsageError(f"{repo_id}: the hub did not make it {'private' if push.private else 'public'}")
    if push.revision != "main":
        api.create_branch(repo_id, branch=push.revision, exist_ok=True)


def _send(api: "HfApi", repo_id: str, push: Push, folder: Path) -> tuple[str, str]:
    """One commit with all files of the folder; those of an earlier push that are not among them go.

    `HfApi.upload_folder` would make several commits of it where hf_xet is installed (huggingface_hub 2).

    Returns:
        The commit, and the address of the repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    message = push.message or f"Upload {'a merged model' if push.merged else 'an adapter'} with lora_sft"
    try:
        there = api.list_repo_files(repo_id, revision=push.revision)
        stale = [name for name in there if name not in names and _is_ours(name)]
        if stale:
            say("hub", f"{', '.join(stale)} of an earlier model go in the same commit")
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, folder / name) for name in names),
            ],
            commit_message=message,
            revision=push.revision,
        )
    except _hub_errors() as error:
        raise RunError(
            f"{repo_id}: sending failed: {_words(error)}; the files go in one commit, so that all of them are there "
            "or none; export again"
        ) from None
    return str(commit.oid), f"{api.endpoint}/{repo_id}"


def _is_ours(name: str) -> bool:
    """Whether a push of ours may have put a file there: a loader would take old shards or an old adapter for new."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in (*ADAPTER_FILES, *MODEL_FILES))


def _compare(api: "HfApi", repo_id: str, commit: str, folder: Path) -> dict[str, Any]:
    """Every file as the hub gives it back at that commit against the one that was sent.

    Raises:
        VerificationError: names those that differ.
        RunError: the hub does not give them back.
    """
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    large = [name for name, file in files.items() if file.stat().st_size > DOWNLOADED_BYTES]
    try:
        theirs: dict[str, str | None]
        theirs = {name: _downloaded_hash(api, repo_id, commit, name) for name in files if name not in large}
        theirs |= _hashes_there(api, repo_id, commit, large)
    except _hub_errors() as error:
        raise RunError(f"{repo_id}: was sent (commit {commit}), but cannot be read back: {_words(error)}") from None
    wrong = [name for name, file in files.items() if theirs.get(name) != hash_of_file(file)]
    if wrong:
        raise VerificationError(f"{repo_id}: commit {commit} is not what was sent: {', '.join(wrong)} differ")
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files.values()),
        "downloaded": len(files) - len(large),
        "equal": True,
    }


def _downloaded_hash(api: "HfApi", repo_id: str, commit: str, name: str) -> str | None:
    """None if the hub left the file out, as a .gitignore in the repository can make it do."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as place, suppress(EntryNotFoundError):
        return hash_of_file(
            Path(api.hf_hub_download(repo_id, name, revision=commit, local_dir=place, force_download=True))
        )
    return None


def _hashes_there(api: "HfApi", repo_id: str, commit: str, names: list[str]) -> dict[str, str | None]:
    """The sha256 that the hub itself holds of large files."""
    found = api.get_paths_info(repo_id, names, revision=commit) if names else []
    return {one.path: lfs.sha256 if (lfs := getattr(one, "lfs", None)) else None for one in found}


# --- what is sent ------------------------------------------------------------------------------------------


def _lay_out(order: Order, push: Push, repo_id: str, api: "HfApi") -> None:
    """Fills `order.folder` with the files as they will be seen, and the card."""
    named = push.base_model or read_json(order.adapter / "adapter_config.json").get("base_model_name_or_path")
    base = str(named or order.spec.name)
    licence = {"license": push.license} if push.license else _licence(api, order.spec.name, base)
    source, patterns = (push.merged, (*MODEL_FILES, *BASE_FILES)) if push.merged else (order.adapter, ADAPTER_FILES)
    stayed = copy_public(source, order.folder, base if is_hub_name(base) else None, patterns)
    if push.card is None and push.merged:
        card = _card_of_merged(order.adapter, push.merged, repo_id, base, licence)
    elif push.card is None:
        card = card_of(order.adapter, repo_id, base=base, licence=licence)
    else:
        card = push.card.read_text(encoding="utf-8")
    (order.folder / "README.md").write_text(card, encoding="utf-8")
    stayed = [name for name in stayed if name != "README.md"]
    say("hub", f"README.md is {'yours' if push.card else 'written anew'}; not sent: {', '.join(stayed) or 'nothing'}")


def _check_origin(adapter: Path, merged: Path) -> None:
    """A merged model of another adapter would be sent with this one's card; one that was refused is not sent at all."""
    made = read_json(merged / MERGE_RECORD)
    if made.get("verified", {}).get("holds") is False:
        raise UsageError(f"merged: {merged} is not the adapter, as its own verification found; nothing was sent")
    weights = adapter / "adapter_model.safetensors"
    made_from = [one.get("sha256") for one in made.get("adapters", [])]
    if any(made_from) and weights.is_file() and hash_of_file(weights) not in made_from:
        raise UsageError(f"merged: {merged} was made from another adapter than {adapter}; nothing was sent")


def _card_of_merged(adapter: Path, merged: Path, repo_id: str, base: str, licence: Mapping[str, str]) -> str:
    """The card of a merged model; how it was made and compared is in its `merge.json`."""
    made = read_json(merged / MERGE_RECORD)
    config = read_json(merged / "config.json")
    parts = made.get("adapters") or [{"name": adapter.name}]
    alone = len(parts) == 1  # else the record of one training would stand for all
    return merged_card(
        (read_json(adapter / MANIFEST) or None) if alone else None,
        made.get("verified"),
        repo_id,
        base=base,
        dtype=made.get("dtype") or config.get("dtype") or config.get("torch_dtype") or "unknown",
        onto=made.get("onto") or "trained",
        quantize=made.get("quantize"),
        adapters=[one["name"] if alone else f"{one['weight']:g} · {one['name']}" for one in parts],
        config=read_run(adapter) if alone else None,
        curve=read_metrics(adapter) if alone else (),
        licence=licence,
    )


def _licence(api: "HfApi", trained_on: str, base: str) -> dict[str, str]:
    """That of the base, from its card: beside its folder, or on the hub if that answers soon; empty if not found."""
    if (found := licence_beside(trained_on)) or not is_hub_name(base):
        return found
    with suppress(*_hub_errors()):
        data = api.model_info(base, timeout=LICENCE_SECONDS).card_data
        return licence_in(f"---\n{data.to_yaml()}\n---\n") if data else {}
    return {}


HUB = Target(
    name="hub",
    help="One commit in a repository of the hub, private unless said otherwise, with a card.",
    refusals=refusals,
    write=write,
    options=OPTIONS,
    makes_whole_model=False,
    keeps_folder=False,
    needs=readiness,
)
