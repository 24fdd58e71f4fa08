"""The hub: listing, access and ranges over HTTP, through huggingface_hub, and the only importer of it.

Its endpoint, token, timeouts, proxies, certificates and offline mode are the library's. Xet repositories are read by
plain ranges too: a range can be taken up again by another process, and its bytes can be checked as they come.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import responses
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar, cast

from converters import __version__
from converters.checkpoint.index import PICKLE_SUFFIXES, has_weights
from converters.errors import InputError, NetworkError, UsageError
from converters.hub.answer import read_answer
from converters.hub.fetch import Answer, RetryPolicy, Transient
from converters.hub.listing import ListedFile, Listing, check_listing
from converters.remote import HubId

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoSibling

LIBRARY = "glm4moe"
# of the first contact: a wrong address should not take a minute to be told
LISTING_POLICY = RetryPolicy(tries=3)
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
Result = TypeVar("Result")


class Hub:
    """A `HubClient` for the hub that the environment names: HF_ENDPOINT, HF_TOKEN and their kin."""

    def __init__(self, policy: RetryPolicy = LISTING_POLICY) -> None:
        # the library would look up who calls it, and report that
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import constants

        self.endpoint = constants.ENDPOINT
        self._policy = policy
        if not self.endpoint.startswith(("http://", "https://")):
            raise UsageError("HF_ENDPOINT", expected="an address with http:// or https://", found=self.endpoint)

    @property
    def is_offline(self) -> bool:
        """Whether HF_HUB_OFFLINE is set."""
        from huggingface_hub import is_offline_mode

        return is_offline_mode()

    @property
    def max_file_bytes(self) -> int:
        """The largest file that the hub serves over plain HTTP."""
        from huggingface_hub import constants

        return constants.MAX_HTTP_DOWNLOAD_SIZE

    def list_files(self, repo: str, revision: str) -> Listing:
        """Return the listing of the commit that a revision is at, from one answer of the hub.

        Raises:
            UsageError: no repository can be called so.
            NetworkError: no such repository or revision, no access, no hub.
            InputError, SecurityError: see `check_listing`.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UsageError(f"REPO {repo!r}", expected="owner/name, as the hub spells it", found=repr(repo)) from error
        api = HfApi(endpoint=self.endpoint, library_name=LIBRARY, library_version=__version__)
        timeout = constants.HF_HUB_ETAG_TIMEOUT

        def ask() -> Listing:
            with _api_answer(self.endpoint), self._errors(f"{repo} at {revision}", repo):
                info = api.model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
                files = tuple(_listed_file(repo, sibling) for sibling in info.siblings or ())
                return Listing(repo, revision, str(info.sha), files)

        return check_listing(self._retry(ask))

    @contextmanager
    def open(self, listing: Listing, file: ListedFile, offset: int, end: int | None = None) -> Iterator[Answer]:
        """Ask for a file of the pinned commit from `offset` on, up to but without the byte at `end`.

        Raises:
            NetworkError: access or file refused.
            Transient: anything that may be over soon, also while the body is read.
        """
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=self.endpoint)
        # a compressed body has no ranges, and its digest is not the file's
        headers = build_hf_headers(library_name=LIBRARY, library_version=__version__) | {"Accept-Encoding": "identity"}
        if offset or end is not None:
            headers["Range"] = f"bytes={offset}-" if end is None else f"bytes={offset}-{end - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            self._errors(f"{listing.repo}: {file.path}", listing.repo),
            get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
        ):
            # a storage behind a redirect refuses links that have run out; the next try gets a new one
            if response.status_code == 403 and response.history:
                raise Transient("HTTP 403 from the storage behind the hub")
            if response.status_code == 416:
                raise Transient(f"no bytes from {offset} on", start_over=True)
            hf_raise_for_status(response)
            chain = [*response.history, response]
            yield read_answer(response.status_code, [part.headers for part in chain], response.iter_raw())

    def read_range(self, listing: Listing, file: ListedFile, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of a file of the pinned commit; a whole file is held against its digest.

        Raises:
            InputError: the bytes are not the listed ones.
            NetworkError: access or file refused, or too many failures in a row.
        """

        def ask() -> bytes:
            with self.open(listing, file, begin, end) as answer:
                if answer.encoding != "identity" or answer.begin not in (0, begin):
                    raise Transient(f"{answer.encoding} bytes from {answer.begin} instead of {begin}")
                data, skip = bytearray(), begin - answer.begin
                for chunk in answer.chunks:
                    data += chunk
                    if len(data) >= skip + end - begin:
                        return bytes(data[skip : skip + end - begin])
            raise Transient("the end of the body too early")

        data = self._retry(ask)
        if (begin, end) == (0, file.size):
            digest = file.new_hash()
            digest.update(data)
            if digest.hexdigest() != file.digest:
                subject, expected = f"{listing.repo}: {file.path}", f"{file.algorithm} {file.digest}"
                raise InputError(subject, expected=expected, found=digest.hexdigest())
        return data

    def _retry(self, ask: Callable[[], Result]) -> Result:
        """Ask again while a failure may pass."""
        failures, pause = 0, Event()
        while True:
            try:
                return ask()
            except Transient as error:
                failures += 1
                if failures >= self._policy.tries:
                    raise NetworkError(
                        self.endpoint,
                        expected="the hub",
                        found=f"{error.reason}, {failures} times in a row",
                        next_step="Check the network and HF_ENDPOINT, then run the same command again.",
                    ) from error
                pause.wait(self._policy.delay(failures, error.retry_after))

    @contextmanager
    def _errors(self, subject: str, repo: str) -> Iterator[None]:
        """Turn what the library raises into NetworkError or Transient, and let no token into a message."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        # base of all errors of its HTTP library, whose name changes from version to version
        transport_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
        try:
            yield
        except OfflineModeIsEnabled as error:
            next_step = "Unset it to reach the hub."
            raise NetworkError(subject, expected="a hub", found="HF_HUB_OFFLINE", next_step=next_step) from error
        except HfHubHTTPError as error:
            if error.response.status_code in _RETRIED:
                reason = f"HTTP {error.response.status_code}"
                raise Transient(reason, retry_after=_retry_after(error.response.headers)) from None
            raise self._refusal(error, subject, repo) from None
        except transport_error as error:
            raise Transient(_reason(error)) from None

    def _refusal(self, error: "HfHubHTTPError", subject: str, repo: str) -> NetworkError:
        """Return one sentence for an answer that will not change by asking again."""
        from huggingface_hub import errors

        page, status = f"{self.endpoint}/{repo}", error.response.status_code
        with_token = "authorization" in error.response.request.headers
        credentials = "the token sent" if with_token else "no token"
        login = "set HF_TOKEN or run 'hf auth login'"
        if isinstance(error, errors.GatedRepoError):
            expected, found = "access to a gated repository", f"none for {credentials}"
            next_step = f"Accept its terms at {page}, then {login}."
        elif isinstance(error, errors.RevisionNotFoundError):
            expected, found = "a branch, tag or commit", "none of this name"
            next_step = f"{page}/commits lists them."
        elif isinstance(error, errors.EntryNotFoundError):
            expected, found = "the file that the listing names", "none"
            next_step = "The commit is gone from the hub, or its upload incomplete; choose another revision."
        elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            expected = f"a repository at {self.endpoint}"
            found = f"none, or a private one, with {credentials}"
            next_step = f"Check the name; for a private repository {login}."
        else:
            expected, found = "access", f"HTTP {status} {responses.get(status, '')}".rstrip() + f", with {credentials}"
            next_step = f"See {page}."
        return NetworkError(subject, expected=expected, found=found, next_step=next_step)


@contextmanager
def _api_answer(endpoint: str) -> Iterator[None]:
    """Refuse an answer that is not the hub's API: a login page of a network, a mirror of something else."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(
            endpoint,
            expected="the hub's API",
            found="an answer of another kind",
            next_step="Check HF_ENDPOINT, and whether this network wants a login first.",
        ) from error


def _listed_file(repo: str, sibling: "RepoSibling") -> ListedFile:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if type(size) is not int or type(digest) is not str:
        raise InputError(f"the listing of {repo}: {sibling.rfilename}", expected="a size and a digest", found="none")
    return ListedFile(sibling.rfilename, size, digest)


def _retry_after(headers: Mapping[str, Any]) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    limit = parse_ratelimit_headers(headers)
    value = str(headers.get("Retry-After", ""))
    if value.isdecimal():
        return float(value)
    return float(limit.reset_in_seconds) if limit and not limit.remaining else 0.0


def cached_folder(hub_id: HubId) -> Path | None:
    """Return where the hub's cache has all weights of a revision, None if it lacks some; nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    ignored = [f"*{suffix}" for suffix in (*PICKLE_SUFFIXES, ".py")]
    try:
        found = snapshot_download(hub_id.repo, revision=hub_id.revision, local_files_only=True, ignore_patterns=ignored)
    except LocalEntryNotFoundError:
        return None
    folder = Path(found)
    return folder if has_weights(folder) else None


def _reason(error: Exception) -> str:
    """Return what went wrong on the wire; an error about a header repeats the header, so its text is left out."""
    text = str(error)
    return type(error).__name__ if not text or "header" in text.lower() or "hf_" in text else text[:200]


def card_metadata(text: str) -> dict[str, Any]:
    """Return the metadata at the head of a model card, {} if there is none that can be read."""
    from huggingface_hub import ModelCard

    found: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def render_card(metadata: Mapping[str, Any], body: str) -> str:
    """Return a model card: the metadata as the hub reads it, then the body. Asks nobody."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml().strip()}\n---\n\n{body}"
