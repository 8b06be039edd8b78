"""What goes wrong between here and the Hub, told in one line, without any token, with what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager

from files import UserError, masked


@contextmanager
def explained(what: str, kept: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into a UserError of one line, without any token."""
    try:
        yield
    except Exception as error:  # its own errors, its HTTP libraries', OSError, ValueError
        raise UserError(f"{what}: {reason(error)}; {kept}") from None


def reason(error: BaseException) -> str:
    """What went wrong between here and the Hub, and what to do about it, in one line without any token."""
    told = " ".join(str(error).split())
    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    statuses = [getattr(getattr(link, "response", None), "status_code", None) for link in chain]
    status = next(filter(None, statuses), 0)
    if status == 401:
        return "the Hub does not know the token (401): it is missing, wrong or expired, log in by `hf auth login`"
    if status == 403:
        return "the token may not do this (403): log in by `hf auth login` with one that may write to this repository"
    if status >= 500:
        return f"the Hub is out of order ({status}): try again later"
    modules = {type(link).__module__.partition(".")[0] for link in chain}
    if modules & {"httpx", "httpx2"} or isinstance(chain[-1], ConnectionError):
        return f"the connection to the Hub broke ({masked(told) or type(error).__name__}): try again"
    return masked(f"{type(error).__name__}: {told}")
