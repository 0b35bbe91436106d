"""Retry policies for network access: datasets at URLs, prompt files, weights.

    retry_store("cannot read s3://bucket/file", work)                        policy of fsspec stores: five attempts
    retry(work, waits_s=(1, 2), is_transient=is_transient, report=report)    any other policy

Programming errors are never retried, and neither are errors that a second attempt cannot fix.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from core.errors import UserError, first_line

if TYPE_CHECKING:
    from tenacity import RetryCallState

log = logging.getLogger(__name__)

T = TypeVar("T")

_STORE_WAITS_S = (0.5, 2, 8, 30)  # before each further attempt

# Errors that a second attempt cannot fix: classes, and words in the class names of packages that may not be installed.
_PERMANENT = (PermissionError, ValueError, NotImplementedError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NAMES = ("Auth", "Credential", "Gated", "NoRegion", "Profile", "RepositoryNotFound", "Token", "Validation")
_PERMANENT_STATUS = (401, 403, 404)


class Unreachable(UserError):  # noqa: N818 – it names the state of a store
    """Error for a store that answered no attempt; a later attempt may succeed."""


def retry(
    work: Callable[[], T],
    *,
    waits_s: Sequence[float],
    is_transient: Callable[[Exception], bool],
    report: Callable[[Exception, float], object],
) -> T:
    """Call `work` until it succeeds; the last error is raised as it is.

    Args:
        waits_s: seconds before each further attempt; there is one attempt more than waits.
        is_transient: whether another attempt may succeed after this error.
        report: is called with the error and the seconds before each wait.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

    def is_retried(error: BaseException) -> bool:
        return isinstance(error, Exception) and is_transient(error)

    def before_sleep(state: "RetryCallState") -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(error, Exception)
        report(error, state.upcoming_sleep)

    attempts = Retrying(
        stop=stop_after_attempt(len(waits_s) + 1),
        wait=wait_chain(*map(wait_fixed, waits_s)),
        retry=retry_if_exception(is_retried),
        before_sleep=before_sleep,
        reraise=True,
    )
    return attempts(work)


def retry_store(what: str, work: Callable[[], T]) -> T:
    """Call `work`, which uses an fsspec store, and retry after network and server errors for about a minute.

    Args:
        what: beginning of all messages, such as "cannot read s3://bucket/file".

    Raises:
        FileNotFoundError: as `work` raised it.
        UserError: the store refused.
        Unreachable: every attempt failed.
    """
    try:
        return retry(
            work,
            waits_s=_STORE_WAITS_S,
            is_transient=_is_transient,
            report=lambda error, wait_s: log.warning("%s: %s; trying again in %g s", what, first_line(error), wait_s),
        )
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # each protocol's package has its own classes
        if _is_permanent(error):
            raise UserError(
                f"{what}: {first_line(error)}\nCheck the URL, and the credentials and rights for it."
            ) from error
        if not _is_external(error):
            raise
        raise Unreachable(
            f"{what}, tried {len(_STORE_WAITS_S) + 1} times: {first_line(error)}\n"
            f"Check the network and the server; then the same command resumes."
        ) from error


def _is_transient(error: Exception) -> bool:
    return not isinstance(error, FileNotFoundError | UserError) and not _is_permanent(error) and _is_external(error)


def _is_permanent(error: Exception) -> bool:
    name = type(error).__name__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    is_refused = isinstance(error, _PERMANENT) or status in _PERMANENT_STATUS
    return is_refused or any(word in name for word in _PERMANENT_NAMES)


def _is_external(error: Exception) -> bool:
    """Whether the error is external; other built-in errors are programming errors."""
    return isinstance(error, OSError | EOFError) or type(error).__module__ != "builtins"
