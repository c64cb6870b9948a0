"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

import difflib


class LdmError(ValueError):
    """Bad input, said in one line: the value, where it stands, and what to do about it.

    The command line prints the message and exits with 1; a traceback is only for defects of this program. Whatever a
    file or a user put into the message, it stays one printable line of at most 1,000 characters.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= 1000 else f"{line[:600]} … {line[-390:]}")


def check_whole(what: str, name: str, value: object, low: int, high: int) -> None:
    """Raise unless `value` is a whole number within the bounds.

    Raises:
        LdmError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise LdmError(f"{what}: {name} is {value!r}; it must be a whole number from {low} to {high}")


def listing(names: list[str], most: int = 4) -> str:
    """`a, b, c, d and 12 more`: names for an error message that stays one readable line."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def suggestion(name: str, known: list[str]) -> str:
    """What to say of a name that is not known: the nearest one that is, or all of them."""
    near = difflib.get_close_matches(name, known, 1, 0.4)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


NO_MEMORY = (
    "out of memory", "allocate memory", "_STATUS_ALLOC_FAILED",  # cuBLAS' and cuDNN's handles and workspaces
    "unable to find an engine to execute this computation",  # cuDNN: none with the workspace that there is
)  # fmt: skip


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch's error is about memory: only CUDA's allocator has an exception of its own for that."""
    return any(text in str(error) for text in NO_MEMORY)


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in its first line; its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
