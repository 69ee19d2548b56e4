"""Every error that a person may meet, as one tree; the class says the exit code of the command line.

LoraSftError
├── UsageError            exit 2: a setting, a file or the data is wrong; nothing was started
│   ├── SettingError      a setting is unknown, of the wrong type, or contradicts another
│   ├── DataError         a dataset cannot be read, or a row is not a conversation
│   ├── TemplateError     a chat template is missing or does not fit
│   ├── ModelError        a model, tokenizer or adapter cannot be had as asked for
│   └── OutputError       an output folder cannot be used
├── RunError              exit 1: a run was started and failed
└── VerificationError     exit 3: a result was made and does not hold; it is kept apart and named
"""

from collections.abc import Sequence


class LoraSftError(Exception):
    """Base of all errors of this package. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(LoraSftError):
    """Something that the user gave is wrong. Raised before anything slow starts."""

    exit_code = 2

    @classmethod
    def of(cls, problems: Sequence[str]) -> "UsageError":
        """One error for several things that are mended in one sitting."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls("\n".join([f"{len(problems)} problems:", *(f"- {problem}" for problem in problems)]))


class SettingError(UsageError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(UsageError):
    """A dataset cannot be read, or a row of it is not a conversation."""


class TemplateError(UsageError):
    """A chat template is missing, broken, or does not fit the tokenizer."""


class ModelError(UsageError):
    """A base model, tokenizer or adapter cannot be had as asked for."""


class OutputError(UsageError):
    """An output folder is in use or cannot be written."""


class RunError(LoraSftError):
    """A run was started and failed."""


class VerificationError(LoraSftError):
    """A result was made but differs from what it must equal."""

    exit_code = 3
