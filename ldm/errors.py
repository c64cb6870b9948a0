"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class LdmError(ValueError):
    """Bad input, said in one line: the value, where it stands, and what to do about it.

    The command line prints the message and exits with 1; a traceback is only for defects of this program.
    """


def listing(names: list[str], most: int = 4) -> str:
    """`a, b, c, d and 12 more`: names for an error message that stays one readable line."""
    shown = ", ".join(names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
