"""The error tree. Every message ends with what to do about it.

    EdgeRsvlmError
    |-- UsageError       exit 2   the command or a config file is wrong
    |-- InputError       exit 3   one input cannot be used; the others go on
    |-- DeliveryError    exit 3   a receiver did not take an alert; ``retry`` says whether it may later
    |-- BudgetError      exit 4   does not fit the memory budget
    `-- BundleError      exit 5   the bundle is missing, corrupt or untrusted

Errors of libraries are re-raised as one of these with ``from exc``.
"""

from __future__ import annotations


class EdgeRsvlmError(Exception):
    """Base of every error this package raises on purpose.

    ``fix`` says what the reader can do; it is printed after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(f"{message}; {fix}")
        self.fix = fix


class UsageError(EdgeRsvlmError):
    exit_code = 2


class InputError(EdgeRsvlmError):
    exit_code = 3


class DeliveryError(EdgeRsvlmError):
    exit_code = 3

    def __init__(self, message: str, *, fix: str, retry: bool) -> None:
        super().__init__(message, fix=fix)
        self.retry = retry


class BudgetError(EdgeRsvlmError):
    exit_code = 4


class BundleError(EdgeRsvlmError):
    exit_code = 5
