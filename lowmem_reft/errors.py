"""The exception that means "the user can fix this": the CLI prints its message and exits with 2."""


class InputError(ValueError):
    """Bad input from the user: a wrong option, file or line.

    The message names the argument (or file and line), the rule and what to do:
    ``{name} must be {rule}, got {value!r}; {what to do}``.
    """


def check_counts(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        InputError: one is below 1; the message names it.
    """
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count!r}; raise it")
