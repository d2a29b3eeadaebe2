"""The Hugging Face hub: uploads a bundle to a repository in one commit, and downloads it.

huggingface_hub does the work. It finds the token (HF_TOKEN, or what `hf auth login` saved) and the
server (HF_ENDPOINT). Whatever fails is a UserError of one line. Imports neither jax nor PyTorch.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from dit_jax.convert import files, receipts
from dit_jax.errors import UserError
from dit_jax.machine import disk, words

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CARD, REPORT = "README.md", "parity.json"  # the report has the sha256 of the other files
WEIGHTS = "model.safetensors"
NEEDED = ("config.json", "dit.py", WEIGHTS)  # besides CARD and REPORT
MADE_BY_THE_HUB = {".gitattributes", CARD}  # in a new repository
NETWORK = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # modules of errors
LOGIN = "run `hf auth login`, or set HF_TOKEN"


class Target(NamedTuple):
    """Where a push goes: a branch of a repository, as it is now.

    commit: the newest one, None if the repository does not exist. has_branch: whether the branch
    exists. digests: of the files there, {name: sha256 or git's sha1}. pushed: names of the files of
    an earlier push.
    """

    api: Any
    name: str
    branch: str
    commit: str | None
    has_branch: bool
    digests: dict
    pushed: tuple


def check_name(text):
    """UserError unless a text is the name of a repository."""
    if not NAME.fullmatch(text) or "--" in text or ".." in text:
        raise UserError(
            f"REPO must be NAMESPACE/NAME of the Hugging Face hub, as alice/digits, got {text!r}"
        )


def check_token():
    """UserError without a token, which an upload needs."""
    if not files.require("huggingface_hub").get_token():
        raise UserError(f"push must have a token of the Hugging Face hub, got none: {LOGIN}")


def check_card(path):
    """UserError unless a file begins with the front matter of a model card."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"card must be text in UTF-8, got {path}") from error
    if not re.match(r"---\n.*?\n---\n", text, re.DOTALL):
        raise UserError(f"card must begin with YAML between two lines of ---, got {path}")
    try:
        files.require("huggingface_hub").ModelCard(text)
    except Exception as error:  # of the package yaml, or a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"card must have YAML that can be read, got {path}: {reason}") from error


def look(name, *, revision=None, private=False, replaces_card=False):
    """Returns the Target of a push to a repository that may not exist yet; changes nothing.

    private: the repository must not be public. replaces_card: a README.md that someone wrote or
    edited there may be replaced. UserError if the repository holds anything else than an earlier
    push.
    """
    api, errors = _api(token=True), files.require("huggingface_hub.errors")
    branch = revision or "main"
    with _told(name, revision):
        try:
            info, has_branch = _info(api, name, revision)
        except errors.GatedRepoError:  # is a RepositoryNotFoundError
            raise
        except errors.RepositoryNotFoundError:
            return Target(api, name, branch, None, branch == "main", {}, ())
    if private and not info.private:
        raise UserError(f"--private must be for a new or a private repository, got {name}")
    found = {file.rfilename: _digest_of(file) for file in info.siblings or ()}
    written = _read_report(api, name, info.sha) if REPORT in found else {}
    if not written and (foreign := sorted(found.keys() - MADE_BY_THE_HUB)):
        raise UserError(
            f"REPO must be new, empty, or a model that dit-convert pushed, got {name} "
            f"with {foreign[0]}"
        )
    if CARD in found and not replaces_card:
        _check_card(api, name, info.sha, written)
    return Target(api, name, branch, info.sha, has_branch, found, tuple(written))


def upload(target, folder, *, private=False):
    """Makes the files of a folder, and no others of an earlier push, the newest commit.

    Makes the repository first, if there is none. Returns the address of the commit. All files
    appear at once or not at all: large ones are stored first, and the commit names them. What is
    stored already is not sent again, so that a second start goes on. Then every file is compared
    with what the hub has.
    """
    hub = files.require("huggingface_hub")
    api, name = target.api, target.name
    local = {str(path.relative_to(folder)): path for path in _files(folder)}
    changed = [key for key, path in local.items() if not _is_same(path, target.digests.get(key))]
    gone = [key for key in target.pushed if key in target.digests and key not in local]
    if not changed and not gone:
        logging.info("%s has these files already", name)
        return _address(target, target.commit)
    count = words.count(len(changed), "file")
    size = sum(local[key].stat().st_size for key in changed)
    logging.info("uploading %s, %.0f MB, to %s", count, size / 1e6, name)
    operations = [hub.CommitOperationAdd(key, str(local[key])) for key in changed]
    operations += [hub.CommitOperationDelete(key) for key in gone]
    with _told(name, target.branch):
        parent = target.commit
        if parent is None:
            api.create_repo(name, private=private or None)
            parent = api.repo_info(name).sha
        if not target.has_branch:
            api.create_branch(name, branch=target.branch, exist_ok=True)
        commit = api.create_commit(
            name,
            operations,
            commit_message="Push a DiT with dit-convert",
            revision=target.branch,
            parent_commit=parent,
        ).oid
        info = api.repo_info(name, revision=commit, files_metadata=True)
    found = {file.rfilename: _digest_of(file) for file in info.siblings}
    for key, path in local.items():
        if not _is_same(path, found.get(key)):
            raise UserError(f"{name} has another {key} than was sent: push again")
    return _address(target, commit)


def download(name, revision=None):
    """Downloads what `upload` wrote; returns (its folder, the commit).

    The folder is the cache of huggingface_hub, so an interrupted download goes on. UserError if the
    repository holds something else, or if a file differs from its sha256 in parity.json.
    """
    api = _api()
    with _told(name, revision):
        info = api.repo_info(name, revision=revision)
    names = {file.rfilename for file in info.siblings or ()}
    if missing := sorted({*NEEDED, REPORT} - names):
        hint = ""
        if "model_index.json" in names:
            hint = f": run `hf download {name} --local-dir DIR`, then `dit-convert from-diffusers`"
        raise UserError(
            f"REPO must be a model that dit-convert pushed, got {name} without {missing[0]}{hint}"
        )
    logging.info("downloading %s at %s", name, info.sha[:12])
    wanted = [*NEEDED, CARD, REPORT, f"{receipts.FOLDER}/*.json"]
    with _told(name, revision):
        folder = Path(api.snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    check_digests(folder, name)
    return folder, info.sha


def check_digests(folder, name):
    """UserError if a file of a downloaded folder is not the one that was pushed.

    A card may have been edited since.
    """
    digests = _written(disk.read_json(folder / REPORT))
    for file in sorted({*NEEDED, *digests} - {CARD}):
        path = folder / file
        if not path.is_file() or file not in digests:
            where = REPORT if file not in digests else "the repository"
            raise UserError(f"REPO must have what was pushed, got {name}: {where} lacks {file}")
        if disk.sha256(path) != digests[file]:
            raise UserError(
                f"{file} of {name} is damaged: its sha256 is not that of {REPORT}; delete "
                f"{path.resolve()} and pull again"
            )


def _api(token=None):
    """token True: a token must be sent."""
    hub = files.require("huggingface_hub")
    if not sys.stderr.isatty():
        files.require("huggingface_hub.utils").disable_progress_bars()
    # The library reads HF_ENDPOINT when it is imported, which may be earlier.
    options = {"library_name": "dit_jax", "library_version": importlib.metadata.version("dit_jax")}
    return hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, **options)


def _info(api, name, revision):
    """(the files of a branch, or of main if there is no such branch; whether there is one)."""
    errors = files.require("huggingface_hub.errors")
    try:
        return api.repo_info(name, revision=revision, files_metadata=True), True
    except errors.RevisionNotFoundError:
        return api.repo_info(name, files_metadata=True), False


def _digest_of(file):
    return file.lfs.sha256 if file.lfs else file.blob_id


def _is_same(path, digest):
    """Whether a file has the sha256, or git's sha1, of a file of the hub; None: there is none."""
    if digest is None or len(digest) == 64:
        return digest == disk.sha256(path)
    content = path.read_bytes()
    return digest == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _read(api, name, file, commit):
    with _told(name):
        return Path(api.hf_hub_download(name, file, revision=commit))


def _read_report(api, name, commit):
    """{name: sha256} of the files of an earlier push, {} if the report is of something else."""
    path = _read(api, name, REPORT, commit)
    try:
        written = _written(disk.read_json(path))
    except UserError:  # no JSON
        return {}
    return written | {REPORT: None} if written.keys() >= set(NEEDED) else {}


def _written(report):
    """{name: sha256} of the files that a report of the parity check was written with."""
    try:
        return dict(report["files"]["to"])
    except (KeyError, TypeError, ValueError):
        return {}


def _check_card(api, name, commit, written):
    """UserError if the README.md of a repository is not the one that an earlier push wrote."""
    if disk.sha256(_read(api, name, CARD, commit)) != written.get(CARD):
        raise UserError(
            f"{CARD} of {name} must be as it was pushed, got an edited one: --card=FILE pushes "
            "another, --overwrite a new one"
        )


def _address(target, commit):
    return f"{target.api.endpoint}/{target.name}/tree/{commit}"


@contextlib.contextmanager
def _told(name, revision=None):
    """A context in which the errors of huggingface_hub become a UserError of one line."""
    try:
        yield
    except Exception as error:  # two dozen types from five packages
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
            raise
        raise UserError(_explain(error, name, revision)) from error


def _explain(error, name, revision):
    hub, errors = (files.require(f"huggingface_hub{part}") for part in ("", ".errors"))
    while isinstance(error, RuntimeError | errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    kind, status = type(error).__module__.partition(".")[0], _status(error)
    reason = " ".join((getattr(error, "server_message", None) or str(error)).split())[:200]
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE must be 0 to reach {name}, got {os.environ.get('HF_HUB_OFFLINE')}"
    if isinstance(error, errors.GatedRepoError):
        return f"REPO must be one whose conditions you have accepted on its page, got {name}"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "your token may not read it" if hub.get_token() else LOGIN
        return f"REPO must exist, got {name}: if it is private, {hint}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"revision must be a branch, a tag or a commit of {name}, got {revision}"
    if status == 401:
        return f"the token of the Hugging Face hub must be valid: {LOGIN}"
    if status == 403:
        return f"REPO must be one that your token may write, got {name}: {reason}"
    if status == 412:
        return f"{name} was changed by someone else meanwhile: push again"
    if kind in NETWORK or isinstance(error, ConnectionError | TimeoutError):
        return f"the Hugging Face hub must be reachable ({_api().endpoint}), got {reason}"
    return f"{name} could not be read or written: {reason}"


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)
