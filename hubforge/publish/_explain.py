"""What a failed call to the Hub means, in words: what happened, to which repository, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from hubforge.errors import HubforgeError, PublishError, shown
from hubforge.publisher import Hub

E = TypeVar("E", bound=BaseException)
TRANSIENT = frozenset({408, 500, 502, 503, 504})  # statuses that may be gone a moment later
Trouble = Literal["answer", "unreachable", "dropped", "nonsense"]
_SHOWN_SCOPE = "'Write access to contents/settings of all repos' for {namespace}"


class HubError(PublishError):
    """A PublishError that remembers what the Hub did, for those who decide whether to try again.

    status: of the answer, or None when none came. trouble: "answer" (a status says what), "unreachable" (nothing was
    sent), "dropped" (something may have been done), "nonsense" (the answer is not what the protocol says).
    wait: seconds after which the Hub says to come back, where it says so.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        mend: str = "",
        status: int | None = None,
        trouble: Trouble = "answer",
        wait: float | None = None,
    ) -> None:
        super().__init__(what, where=where, mend=mend)
        self.status, self.trouble, self.wait = status, trouble, wait
        self.doubted = False  # whether an earlier try of the same call ended in doubt

    @property
    def in_doubt(self) -> bool:
        """Whether what was asked may have been done all the same: no answer came, or only a gateway's."""
        return self.trouble == "dropped" or self.status in TRANSIENT


@contextmanager
def explained(hub: Hub, repo: str, doing: str) -> Iterator[None]:
    """Within it, whatever a call of huggingface_hub raises leaves as a HubError; our own errors pass through.

    Every exception is caught, not only those that the client documents: an answer that is not what the protocol says
    surfaces in it as KeyError, TypeError or AttributeError.
    """
    try:
        yield
    except HubforgeError:
        raise
    except Exception as error:
        _scrub_chain(error, hub)
        ours = _first(error, HubforgeError)
        if ours is not None:  # raised by our file reader inside the client, which wraps it in its own error
            raise ours from error
        raise explain(error, hub, repo, doing) from error


def scrubbed(text: str, hub: Hub) -> str:
    """That text without the token, should a server or proxy have echoed it."""
    for secret in hub.secrets():
        text = text.replace(secret, "***")
    return text


def _scrub_chain(error: BaseException | None, hub: Hub) -> None:
    """Take the token out of the messages of an exception and its causes, which a traceback would print."""
    while error is not None:
        error.args = tuple(scrubbed(one, hub) if isinstance(one, str) else one for one in error.args)
        error = error.__cause__ or error.__context__


def explain(error: BaseException, hub: Hub, repo: str, doing: str) -> HubError:
    """The HubError for that exception of huggingface_hub (or of what it stands on) while `doing` something."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{repo} on {hub.endpoint}" if repo else hub.endpoint
    if _first(error, OfflineModeIsEnabled):
        return HubError(
            f"cannot {doing}: HF_HUB_OFFLINE is set, so nothing is sent",
            where=where,
            mend="Unset HF_HUB_OFFLINE, or publish to a folder with --to local.",
        )
    answer = _first(error, HfHubHTTPError)
    if answer is not None:
        return _from_answer(answer, hub, repo, doing, where)
    if _first(error, httpx2.ConnectError) or _first(error, httpx2.ConnectTimeout):
        return HubError(
            f"cannot {doing}: nothing answers at {hub.endpoint}",
            where=where,
            mend="Is the address right, the network up, and (for a local Hub) `hubforge hub serve` running?",
            trouble="unreachable",
        )
    dropped = _first(error, httpx2.HTTPError) or _first(error, OSError)
    if dropped is not None:
        kind = "took too long to answer" if isinstance(dropped, httpx2.TimeoutException) else "dropped the connection"
        return HubError(
            f"cannot {doing}: the Hub {kind} ({_told(dropped, hub)})",
            where=where,
            mend="Run the same command again: what is already there is not sent twice.",
            trouble="dropped",
        )
    return HubError(
        f"cannot {doing}: {_told(error, hub)}",
        where=where,
        mend="Either the Hub refused the content, or its answer is not what huggingface_hub expects.",
        trouble="nonsense",
    )


def _from_answer(error: BaseException, hub: Hub, repo: str, doing: str, where: str) -> HubError:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils._http import parse_ratelimit_headers

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    namespace = repo.partition("/")[0] or "the namespace"
    tokens = f"{hub.endpoint}/settings/tokens"
    said = " ".join(scrubbed(error.server_message or "", hub).split())
    tail = f" ({shown(said, 300)})" if said else ""
    wait: float | None = None
    if status == 401 and not hub.secrets():
        what, mend = "there is no token", hub.sign_in()
    elif status == 401:
        what = "the Hub does not accept the token: it is unknown, expired or revoked"
        mend = f"Make a token with the role 'write'. {hub.sign_in()}"
    elif status == 403:
        what = f"the token may not {doing}"
        scope = _SHOWN_SCOPE.format(namespace=namespace)
        mend = f"At {tokens}, take a token with the role 'write', or give a fine-grained one {scope}."
    elif status == 402:
        what, mend = "the account's plan does not allow it", f"See {hub.endpoint}/settings/billing."
    elif status == 404:
        what = "the Hub does not have it, or the token may not see it"
        mend = "Check the spelling, and which account the token belongs to with `hf auth whoami`."
    elif status == 412:
        what = "somebody else committed in the meantime"
        mend = "Run the same command again: it starts from what is there now."
    elif status == 413:
        what, mend = "the Hub finds it too large", "Split the file, or publish to a Hub that takes it."
    elif status == 429:
        limit = parse_ratelimit_headers(error.response.headers)
        after = error.response.headers.get("retry-after", "").strip()
        if limit is not None and limit.remaining == 0:
            wait = limit.reset_in_seconds + 1.0  # the header counts whole seconds
        elif after.isdigit():
            wait = float(after)
        when = f" for {wait:.0f} s" if wait is not None else ""
        what = f"the Hub takes no more requests from this account{when}"
        mend = "Wait and run the same command again: what is already there is not sent twice."
    elif status >= 500:
        what = f"the Hub is in trouble (HTTP {status})"
        mend = "Wait and run the same command again: what is already there is not sent twice."
    else:
        what, mend = f"the Hub refused (HTTP {status})", ""
    request = f" [request {shown(error.request_id, 80)}]" if error.request_id else ""
    what = f"cannot {doing}: {what}{tail}{request}"
    return HubError(what, where=where, mend=mend, status=status, wait=wait)


def _told(error: BaseException, hub: Hub) -> str:
    text = " ".join(scrubbed(str(error), hub).split())
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__, 300)


def _first(error: BaseException | None, kind: type[E]) -> E | None:
    """The first of that kind among an exception and its causes."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None
