"""Errors that are the user's to mend: one line each, no traceback, exit status 2."""


class BadInput(ValueError):
    """Input that cannot be used.

    The message is one line that names the field (or file, or column), the value found and what would do.
    The command line prints it and exits with status 2; in Python it is an ordinary `ValueError`.
    """

    def __init__(self, field: str, value: object, remedy: str):
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field} = {shown}: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy


class FeatureMissing(ImportError):
    """An optional dependency is not installed; the message says which extra brings it."""

    def __init__(self, what: str, package: str, extra: str):
        super().__init__(f"{what} needs {package}: pip install 'scalelab[{extra}]'")
