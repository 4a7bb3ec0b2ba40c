"""Properties: the settings of the app and of VMs, with defaults, checks and events."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, overload
from weakref import WeakKeyDictionary

from qubes_itests.core.events import Emitter
from qubes_itests.core.exc import (
    QubesException,
    QubesNoSuchPropertyError,
    QubesPropertyValueError,
)
from qubes_itests.core.store.document import check_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Property", "PropertyHolder", "to_bool"]

T = TypeVar("T")

_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}


class _NoDefault(enum.Enum):
    NO_DEFAULT = enum.auto()


NO_DEFAULT: Final = _NoDefault.NO_DEFAULT


def to_bool(value: object) -> bool:
    """Read a truth value the way Qubes does: ``True``, ``"yes"``, ``"0"``, 1.

    :raise ValueError: for what is neither.
    """
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("it takes a truth value: True, False, yes, no, on, off, 1, 0")


class Property(Generic[T]):
    """One setting of an object: a descriptor that checks, stores and announces it.

    :param name: as the attribute.
    :param type: called on a new value; its ValueError becomes the refusal's reason.
    :param default: a value, or a function of the object that gives one; without it,
        reading an unset property is an AttributeError.
    :param setter: called as ``setter(object, property, value)`` before `type`; returns
        the value to store, or raises ValueError.
    :param clone: whether `PropertyHolder.clone_properties` copies it.
    :param write_once: whether it may be set only as long as it is unset.
    :param load_stage: at which step of loading an app it is read (4 knows all VMs).
    :param doc: what it means, with units.
    """

    def __init__(
        self,
        name: str,
        *,
        type: Callable[[Any], T] | None = None,  # noqa: A002 - its name in Qubes OS
        default: T | Callable[[Any], T] | _NoDefault = NO_DEFAULT,
        setter: Callable[[Any, Property[T], Any], Any] | None = None,
        clone: bool = True,
        write_once: bool = False,
        load_stage: int = 2,
        doc: str = "",
    ) -> None:
        self.name = name
        self.type = type
        self.default = default
        self.setter = setter
        self.clone = clone
        self.write_once = write_once
        self.load_stage = load_stage
        self.__doc__ = doc

    def __set_name__(self, owner: type[Any], name: str) -> None:
        if name != self.name:
            raise TypeError(f"property {self.name!r} is bound to attribute {name!r}")

    @overload
    def __get__(self, instance: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, instance: PropertyHolder, owner: Any) -> T: ...
    def __get__(self, instance: PropertyHolder | None, owner: Any) -> Self | T:
        if instance is None:
            return self
        try:
            return instance._values[self.name]  # type: ignore[no-any-return]  # noqa: SLF001
        except KeyError:
            return self.get_default(instance)

    def get_default(self, instance: PropertyHolder) -> T:
        """Return what it is as long as nobody sets it; AttributeError if nothing."""
        if isinstance(self.default, _NoDefault):
            raise AttributeError(  # noqa: TRY004 - what reading an unset name raises
                f"property {self.name!r} of {instance} is not set"
            )
        if callable(self.default):
            return self.default(instance)
        return self.default

    def __set__(self, instance: PropertyHolder, value: Any) -> None:
        if self.write_once and self.name in instance._values:  # noqa: SLF001
            raise QubesPropertyValueError(
                instance, self.name, value, "it is set once and for all"
            )
        value = self._checked(instance, value)
        kwargs: dict[str, Any] = {"name": self.name, "newvalue": value}
        old = instance._values.get(self.name, NO_DEFAULT)  # noqa: SLF001
        if old is not NO_DEFAULT:
            kwargs["oldvalue"] = old
        instance.fire_event(f"property-pre-set:{self.name}", pre_event=True, **kwargs)
        instance._values[self.name] = value  # noqa: SLF001
        instance.fire_event(f"property-set:{self.name}", **kwargs)

    def _checked(self, instance: PropertyHolder, value: Any) -> Any:
        try:
            if self.setter is not None:
                value = self.setter(instance, self, value)
            if self.type is not None and value is not None:
                value = self.type(value)
            if isinstance(value, str):
                check_text(value)
        except QubesException:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise QubesPropertyValueError(
                instance, self.name, value, str(error)
            ) from error
        return value

    def __delete__(self, instance: PropertyHolder) -> None:
        old = instance._values.get(self.name, NO_DEFAULT)  # noqa: SLF001
        kwargs = {"name": self.name} | ({} if old is NO_DEFAULT else {"oldvalue": old})
        for event in ("property-pre-reset", "property-pre-del"):
            instance.fire_event(f"{event}:{self.name}", pre_event=True, **kwargs)
        instance._values.pop(self.name, None)  # noqa: SLF001
        for event in ("property-reset", "property-del"):
            instance.fire_event(f"{event}:{self.name}", **kwargs)


_listed: WeakKeyDictionary[type, tuple[Property[Any], ...]] = WeakKeyDictionary()


def _properties(cls: type[PropertyHolder]) -> tuple[Property[Any], ...]:
    listed = _listed.get(cls)
    if listed is None:
        found = {
            name: attribute
            for base in reversed(cls.__mro__)
            for name, attribute in vars(base).items()
            if isinstance(attribute, Property)
        }
        listed = _listed[cls] = tuple(
            sorted(found.values(), key=lambda p: (p.load_stage, p.name))
        )
    return listed


class PropertyHolder(Emitter):
    """An object with properties.

    :param properties: their first values, by name.
    """

    def __init__(self, **properties: Any) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}
        for name, value in properties.items():
            self.property_get_def(name)
            setattr(self, name, value)

    @classmethod
    def property_list(cls, load_stage: int | None = None) -> list[Property[Any]]:
        """Return the properties of this class, in order of load stage and name."""
        return [p for p in _properties(cls) if load_stage in (None, p.load_stage)]

    def property_get_def(self, prop: str | Property[Any]) -> Property[Any]:
        """Return the definition of a property; QubesNoSuchPropertyError if none."""
        name = prop.name if isinstance(prop, Property) else prop
        definition = getattr(type(self), name, None)
        if not isinstance(definition, Property):
            raise QubesNoSuchPropertyError(self, name)
        return definition

    def property_is_default(self, prop: str | Property[Any]) -> bool:
        """Tell whether the property was never set, or was reset."""
        return self.property_get_def(prop).name not in self._values

    def property_values(self) -> list[tuple[Property[Any], Any]]:
        """Return the properties that are set, with their values, as listed."""
        values = self._values
        return [
            (p, values[p.name]) for p in _properties(type(self)) if p.name in values
        ]

    def property_uses(self, value: object) -> list[str]:
        """Return the names of the properties that are set to this very object."""
        return [name for name, known in self._values.items() if known is value]

    def property_get_default(self, prop: str | Property[Any]) -> Any:
        """Return what the property would be if it was reset."""
        return self.property_get_def(prop).get_default(self)

    def clone_properties(
        self, src: PropertyHolder, proplist: Iterable[str | Property[Any]] | None = None
    ) -> None:
        """Set the properties as another object has them, where it has them set.

        :param src: the object to copy from.
        :param proplist: which ones; by default all that may be cloned.
        """
        chosen = (
            [p for p in self.property_list() if p.clone]
            if proplist is None
            else [self.property_get_def(p) for p in proplist]
        )
        for prop in chosen:
            if prop.name in src._values:
                setattr(self, prop.name, src._values[prop.name])
        self.fire_event("clone-properties", src=src, proplist=proplist)
