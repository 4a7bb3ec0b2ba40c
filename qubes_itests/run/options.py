"""The declaration of options: what each does, and which commands take it.

An option is a field of a dataclass that `option` makes, and has the name, the type and
the default of the field: of `qubes_itests.run.settings.Settings` if files and the
environment may have it too, else of the `Command` of the command line.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

__all__ = ["PYTEST", "Option", "option", "options"]

_T = TypeVar("_T")
#: Among the commands that take an option: ``pytest -p qubes_itests``.
PYTEST = "pytest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """An option.

    :param name: of the field.
    :param default: its value where it is not given; with a bool the option is a flag,
        with a tuple it may be given several times.
    :param metavar: placeholder for the value in the help; empty for a flag.
    :param commands: the sub-commands that take it, and `PYTEST`.
    :param meaning: what it does: a phrase that begins with a verb.
    :param read: of a setting: returns a value in the option's type, from what a file, a
        variable or the command line has for it; raises ValueError with the reason.
    :param short: a second spelling, of one letter.
    """

    name: str
    default: object
    metavar: str
    commands: tuple[str, ...]
    meaning: str
    read: Callable[[object], object] | None = None
    short: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that a setting has."""
        return f"QUBES_ITESTS_{self.name.upper()}" if self.read else ""

    @property
    def help(self) -> str:
        """The meaning, how often the option may be given, and its default."""
        default = self.default
        if isinstance(default, tuple):
            return f"{self.meaning}; may be given several times"
        named = "(default:" in self.meaning
        if named or default is None or default is False or default == "":
            return self.meaning  # which names the default, or it is obvious
        if isinstance(default, enum.Enum):
            default = default.value
        return f"{self.meaning} (default: {'yes' if default is True else default})"

    def spellings(self, prefix: str = "--") -> list[str]:
        """Return the words that give it, and for a flag of settings the one against it.

        :param prefix: of those with more than one letter.
        """
        word = self.name.replace("_", "-")
        if self.read and not self.metavar:
            return [f"{prefix}{word}", f"{prefix}no-{word}"]
        return [f"{prefix}{word}", *filter(None, [self.short])]

    def offer(
        self, add: Callable[..., object], prefix: str = "--", hidden: str = ""
    ) -> None:
        """Have a parser take it; what is not given is None there.

        :param add: `add_argument` of argparse, or what pytest has for that.
        :param prefix: of its spellings.
        :param hidden: in place of the help.
        """
        text = hidden or self.help.replace("%", "%%")
        first, *others = self.spellings(prefix)
        if self.metavar:
            action = "append" if isinstance(self.default, tuple) else "store"
            add(first, *others, metavar=self.metavar, action=action, help=text)
            return
        add(first, action="store_true", default=None, help=text)
        dest = first.strip("-").replace("-", "_")
        for word in others:
            text = hidden or f"the opposite of {first}"
            add(word, action="store_false", default=None, dest=dest, help=text)


def option(
    default: _T,
    read: Callable[[object], _T] | None,
    metavar: str,
    commands: str,
    meaning: str,
    *,
    short: str = "",
) -> _T:
    """Return a field that is an option; the arguments are those of `Option`.

    :param commands: separated by spaces.
    """
    words = {"metavar": metavar, "commands": tuple(commands.split()), "short": short}
    return field(default=default, metadata={**words, "meaning": meaning, "read": read})


def options(declared: type[DataclassInstance]) -> list[Option]:
    """Return the options among the fields of a dataclass."""
    return [
        Option(name=field.name, default=field.default, **field.metadata)
        for field in fields(declared)
        if field.metadata
    ]
