"""The one exception a user is meant to read: a sentence that says what is wrong and what to do."""


class Refusal(ValueError):
    """Bad input or an unsupported combination; printed without a traceback, exit code 2, nothing written."""
