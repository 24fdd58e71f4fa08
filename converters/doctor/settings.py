"""Environment variables that change where checkpoints come from, and whether the hub answers."""

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ENDPOINT = "https://huggingface.co"
HUB_SECONDS = 3.0
_PREFIXES = ("HF_", "HUGGING_FACE_HUB_")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = frozenset({"1", "on", "yes", "true"})
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "KEY")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """Whether the hub answers: `reachable` is None where nobody asked."""

    endpoint: str
    reachable: bool | None
    detail: str


def hub_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the HF_ variables; of a token only that it is set, of an address no credentials."""
    return {
        name: _shown(name, value)
        for name, value in sorted(environment.items())
        if name.startswith(_PREFIXES) or name in _OFFLINE
    }


def _shown(name: str, value: str) -> str:
    # a path to a token is no token
    if any(word in name for word in _SECRETS) and not name.endswith("_PATH"):
        return "set, not shown" if value else "empty"
    return _CREDENTIALS.sub("***@", value)


def is_offline(environment: Mapping[str, str]) -> bool:
    """Return whether the user asked not to reach the hub."""
    return any(environment.get(name, "").lower() in _TRUE for name in _OFFLINE)


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Return the folder that huggingface_hub keeps its cache in."""
    default = Path(environment.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(environment.get("HF_HOME", str(default))).expanduser()


def ask_hub(environment: Mapping[str, str], seconds: float = HUB_SECONDS) -> HubAnswer:
    """Return whether the hub answers within `seconds`; an answer of any status is one. Offline, it is not asked."""
    endpoint = environment.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    shown = _CREDENTIALS.sub("***@", endpoint)
    if is_offline(environment):
        return HubAnswer(shown, None, "not asked: offline mode is set")
    if not endpoint.startswith(("http://", "https://")):
        return HubAnswer(shown, False, "not an address with http:// or https://")
    answers: list[tuple[bool, str]] = []

    def ask() -> None:
        answers.append(_head(endpoint, seconds))

    # looking up a name can take longer than any timeout of the connection
    thread = threading.Thread(target=ask, daemon=True)
    begin = time.monotonic()
    thread.start()
    thread.join(seconds)
    if not answers:
        return HubAnswer(shown, False, f"no answer in {seconds:g} s")
    reachable, detail = answers[0]
    return HubAnswer(shown, reachable, detail or f"answered in {time.monotonic() - begin:.1f} s")


def _head(endpoint: str, seconds: float) -> tuple[bool, str]:
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=seconds):
            return True, ""
    except urllib.error.HTTPError as error:
        return True, f"answered with HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        return False, str(reason)
