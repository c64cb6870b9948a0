"""`LdmError`, the exception for wrong input, and helpers for its messages. Other exceptions mean defects."""

import difflib


class LdmError(ValueError):
    """Wrong input. The message is one line with the value, its place and the remedy.

    The command line prints the message and exits with 1; a traceback is only for defects of this program. Text from
    files or users in the message is cleaned, so that it is one printable line of at most 1,000 characters.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} … {line[-390:]}")


def check_whole(what: str, name: str, value: object, low: int, high: int) -> None:
    """Check that `value` is a whole number within the bounds.

    Raises:
        LdmError: `value` is not an `int`, or is out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LdmError(f"{what}: {name} is {value!r}; it must be a whole number from {low} to {high}")


def listing(names: list[str], most: int = 4, count: int | None = None) -> str:
    """A short list of names for an error message: `a, b, c, d and 12 more`; of `count`, if only the first are given."""
    more = (len(names) if count is None else count) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def suggestion(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the most similar known name, or all known names."""
    near = difflib.get_close_matches(name, known, 1, 0.4)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


NO_MEMORY = (
    "out of memory", "allocate memory", "_STATUS_ALLOC_FAILED",  # cuBLAS' and cuDNN's handles and workspaces
    "unable to find an engine to execute this computation",  # cuDNN has no algorithm for the free workspace
)  # fmt: skip


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch's error means out of memory; only CUDA's allocator has its own exception class for it."""
    return any(text in str(error) for text in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
