"""Properties: the settings of the app and of VMs, with defaults, checks and events."""

from __future__ import annotations

import enum
import logging
import re
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, overload

from qubes_itests.core.events import Emitter
from qubes_itests.core.exc import (
    PropertyWrittenError,
    QubesException,
    QubesNoSuchPropertyError,
    QubesPropertyValueError,
)
from qubes_itests.core.labels import find_label
from qubes_itests.core.store.document import check_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.core.app import Qubes

__all__ = [
    "Property",
    "PropertyHolder",
    "VMProperty",
    "stateless_property",
    "to_bool",
    "to_int",
    "to_text",
]

log = logging.getLogger("qubes.property")

T = TypeVar("T")


class _Mark(enum.Enum):
    NO_DEFAULT = enum.auto()
    DEFAULT = enum.auto()


NO_DEFAULT: Final = _Mark.NO_DEFAULT

_TRUE: Final = {"1", "true", "yes", "on"}
_FALSE: Final = {"0", "false", "no", "off"}
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}", re.ASCII)

_TYPE_NAMES: Final[dict[Any, str]] = {int: "int", bool: "bool", find_label: "label"}


def to_bool(value: object) -> bool:
    """Read a truth value the way Qubes does: ``True``, ``"yes"``, ``"0"``, 1.

    :raise ValueError: for what is neither.
    """
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("expected a truth value: True, False, yes, no, on, off, 1, 0")


def to_int(value: object) -> int:
    """Read a whole number: an int, or its decimal digits; nothing is rounded.

    :raise ValueError: for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    raise ValueError("expected a whole number")


def _to_str(value: object) -> str:
    if value is None:
        raise ValueError("expected text, not None")
    return str(value)


def to_text(value: object) -> str:
    """Return a value as text that sets the property to it again; None is empty."""
    return "" if value is None else str(value)


_CONVERSIONS: Final[dict[Any, Callable[[Any], Any]]] = {
    bool: to_bool,
    int: to_int,
    str: _to_str,
}


class Property(Generic[T]):
    """One setting of an object: a descriptor that checks, stores and announces it.

    :param name: as the attribute.
    :param type: what its values are, as `type_name` tells; by default text, or what
        `setter` returns.  `bool` and `int` are read from text as Qubes does; any other
        is called on a new value, and its ValueError becomes the refusal's reason.
    :param default: a value, or a function of the object that gives one; without it,
        reading an unset property is an AttributeError.
    :param of_template: whether a VM that has a template has, by default, its value.
    :param allow_none: whether it takes None, which may be written as empty text.
    :param setter: called as ``setter(object, property, value)`` before `type`; returns
        the value to store, or raises ValueError.  `forbidden` refuses all.
    :param save_via: called as ``save_via(object, property, value)``; returns the text
        that the store keeps, or raises `DontSave`.
    :param clone: whether `PropertyHolder.clone_properties` copies it.
    :param write_once: whether it may be set only as long as it is unset.
    :param load_stage: at which step of loading an app it is read (4 knows all VMs).
    :param order: within a stage, after those of lower order: for checks that need them.
    :param doc: what it means, with units.
    """

    #: What a property is set to for being reset.
    DEFAULT: Final = _Mark.DEFAULT

    class DontSave(Exception):  # noqa: N818 - its name in Qubes OS
        """Raised by a `save_via`: the store is not to keep the value."""

    def __init__(
        self,
        name: str,
        *,
        type: Callable[[Any], T] | None = None,
        default: T | Callable[[Any], T] | _Mark = NO_DEFAULT,
        of_template: bool = False,
        allow_none: bool = False,
        setter: Callable[[Any, Property[T], Any], Any] | None = None,
        save_via: Callable[[Any, Property[T], T], str] | None = None,
        clone: bool = True,
        write_once: bool = False,
        load_stage: int = 2,
        order: int = 0,
        doc: str = "",
    ) -> None:
        self.name = self.__name__ = name
        self.type = type
        self.default = default
        self.of_template = of_template
        self.allow_none = allow_none
        self.setter = setter
        self.save_via = save_via
        self.clone = clone
        self.write_once = write_once
        self.load_stage = load_stage
        self.order = order
        self.__doc__ = doc

    @property
    def type_name(self) -> str:
        """What the Admin API calls its type: str, int, bool, vm or label."""
        return _TYPE_NAMES.get(self.type, "str")

    @staticmethod
    def bool(_holder: object, _prop: object, value: object) -> bool:
        """Setter of truth values, as `to_bool` reads them."""
        return to_bool(value)

    @staticmethod
    def forbidden(_holder: object, _prop: object, _value: object) -> Any:
        """Setter of properties that cannot be set."""
        raise ValueError("it cannot be set")

    @staticmethod
    def dontsave(_holder: object, _prop: object, _value: object) -> str:
        """`save_via` of what the store is not to keep."""
        raise Property.DontSave

    def __set_name__(self, owner: type[Any], name: str) -> None:
        if name != self.name:
            raise TypeError(f"property {self.name!r} is bound to attribute {name!r}")

    def __str__(self) -> str:
        return self.name

    @overload
    def __get__(self, instance: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, instance: PropertyHolder, owner: Any) -> T: ...
    def __get__(self, instance: PropertyHolder | None, owner: Any) -> Self | T:
        if instance is None:
            return self
        try:
            value: T = instance._values[self.name]  # noqa: SLF001 - ours
        except KeyError:
            return self.get_default(instance)
        return value

    def get_default(self, instance: PropertyHolder) -> T:
        """Return its default; AttributeError without one."""
        template = instance.template_or_none if self.of_template else None
        if template is not None:
            return self.__get__(template, type(template))
        if isinstance(self.default, _Mark):
            raise AttributeError(  # noqa: TRY004 - what reading an unset name raises
                f"property {self.name!r} of {instance} is not set"
            )
        if callable(self.default):
            return self.default(instance)
        return self.default

    def get_set(self, instance: PropertyHolder) -> T | None:
        """Return what it is set to; None if it is not set, whatever its default."""
        return instance._values.get(self.name)  # noqa: SLF001

    def __set__(self, instance: PropertyHolder, value: Any) -> None:
        if value is self.DEFAULT:
            self.__delete__(instance)
            return
        self._check_unwritten(instance, value)
        value = self._checked(instance, value)
        if not instance.events_enabled:
            instance._values[self.name] = value  # noqa: SLF001
            return
        kwargs = {"name": self.name, "newvalue": value, **self._old(instance)}
        instance.fire_event(f"property-pre-set:{self.name}", pre_event=True, **kwargs)
        instance._values[self.name] = value  # noqa: SLF001
        instance.fire_event(f"property-set:{self.name}", **kwargs)

    def _check_unwritten(self, instance: PropertyHolder, value: Any) -> None:
        if self.write_once and self.name in instance._values:  # noqa: SLF001
            told = self.refusal(instance, value, "it is set once and for all")
            raise PropertyWrittenError(instance, self, value, str(told))

    def _checked(self, instance: PropertyHolder, value: Any) -> Any:
        """Return the value to store; only a setter may have it be None."""
        new = value
        try:
            if self.setter is not None:
                new = self.setter(instance, self, value)
            if new is None and (self.setter is not None or self.allow_none):
                return None
            if self.allow_none and new == "":
                return None  # as the store and the Admin API write it
            if self.type is not None and new.__class__ is not self.type:
                convert: Callable[[Any], T] = _CONVERSIONS.get(self.type, self.type)
                new = convert(new)
            if isinstance(new, str):
                check_text(new)
        except QubesException:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise self.refusal(instance, value, str(error)) from error
        return new

    def refusal(
        self, instance: object, value: object, reason: str
    ) -> QubesPropertyValueError:
        """Return what is to be raised for a value that the property does not take.

        :param reason: what it takes, or why not this one.
        """
        return QubesPropertyValueError(
            instance,
            self,
            value,
            f"property {self.name!r} of {instance} cannot be {value!r}: {reason}",
        )

    def _old(self, instance: PropertyHolder) -> dict[str, Any]:
        try:
            return {"oldvalue": self.__get__(instance, type(instance))}
        except AttributeError:
            return {}

    def __delete__(self, instance: PropertyHolder) -> None:
        self._check_unwritten(instance, self.DEFAULT)
        if self.setter is Property.forbidden:
            self._checked(instance, self.DEFAULT)
        kwargs = {"name": self.name, **self._old(instance)}
        instance.fire_event(f"property-pre-reset:{self.name}", pre_event=True, **kwargs)
        instance.fire_event(f"property-pre-del:{self.name}", pre_event=True, **kwargs)
        instance._values.pop(self.name, None)  # noqa: SLF001
        instance.fire_event(f"property-reset:{self.name}", **kwargs)
        instance.fire_event(f"property-del:{self.name}", **kwargs)

    def saved(self, instance: PropertyHolder) -> str:
        """Return the text that the store keeps of the present value.

        :raise Property.DontSave: when it is not to keep it.
        """
        value = self.__get__(instance, type(instance))
        return (self.save_via or _as_text)(instance, self, value)


def _as_text(_holder: object, _prop: object, value: object) -> str:
    return to_text(value)


class VMProperty(Property[T]):
    """A property whose value is a VM of the app, or None: set to it or to its name.

    :param name: as the attribute.
    :param klass: the only class of VMs that it takes; None for all.
    :param allow_none: whether it takes None, which may be written as empty text.
    :param check: called as ``check(object, vm)``; raises ValueError for a VM that it
        does not take.
    :param options: what `Property` takes besides.
    """

    def __init__(
        self,
        name: str,
        *,
        klass: type[Any] | None = None,
        allow_none: bool = True,
        check: Callable[[Any, Any], None] | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("load_stage", 4)
        super().__init__(name, setter=self._vm, allow_none=allow_none, **options)
        self.klass = klass
        self.check = check

    @property
    def type_name(self) -> str:
        """What the Admin API calls its type: vm."""
        return "vm"

    def _vm(self, holder: PropertyHolder, _prop: object, value: object) -> Any:
        if value is None or value == "":
            if not self.allow_none:
                raise ValueError("expected a VM")
            return None
        try:
            found = holder.app.domains[value]
        except KeyError as error:
            # as a refusal, as of any other value that the property does not take
            raise ValueError(str(error)) from None
        if self.klass is not None and not isinstance(found, self.klass):
            raise ValueError(f"{found} is no {self.klass.__name__}")
        found.check_whole()
        if self.check is not None:
            self.check(holder, found)
        return found


@overload
def stateless_property(function: Callable[[Any], T]) -> Property[T]: ...
@overload
def stateless_property(
    function: None = None,
    *,
    type: type[Any],
) -> Callable[[Callable[[Any], T]], Property[T]]: ...
def stateless_property(
    function: Callable[[Any], T] | None = None,
    *,
    type: Callable[[Any], Any] | None = None,
) -> Property[T] | Callable[[Callable[[Any], T]], Property[T]]:
    """Make a property that is computed anew each time: read, and neither set nor saved.

    :param function: gives the value; its name and docstring are the property's.
    :param type: `int` or `bool`, for values of these; by default they count as text.
    """
    if function is None:
        return lambda function: _computed(function, type)
    return _computed(function, type)


def _computed(
    function: Callable[[Any], T], kind: Callable[[Any], Any] | None
) -> Property[T]:
    return Property(
        function.__name__,
        type=kind,
        default=function,
        setter=Property.forbidden,
        save_via=Property.dontsave,
        clone=False,
        doc=function.__doc__ or "",
    )


class PropertyHolder(Emitter):
    """An object with properties.

    :param properties: their first values, by name.
    """

    #: The app that it is, or belongs to.
    app: Qubes

    @property
    def template_or_none(self) -> PropertyHolder | None:
        """The VM that it is made from; None of what is made from no other."""
        return None

    def __init__(self, **properties: Any) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}
        for name in properties:
            self.property_get_def(name)
        for prop in self.property_list():
            if prop.name in properties:
                setattr(self, prop.name, properties[prop.name])

    @classmethod
    def property_list(cls, load_stage: int | None = None) -> list[Property[Any]]:
        """Return the properties of this class, in the order that they are loaded in.

        :param load_stage: only those of that stage.
        """
        known: tuple[Property[Any], ...] | None = vars(cls).get("_properties")
        if known is None:
            found: dict[str, Property[Any]] = {}
            for base in reversed(cls.__mro__):
                for name, attribute in vars(base).items():
                    if isinstance(attribute, Property):
                        found[name] = attribute
                    else:
                        # a subclass hides a property by any attribute of its name
                        found.pop(name, None)
            order = sorted(
                found.values(), key=lambda p: (p.load_stage, p.order, p.name)
            )
            known = cls._properties = tuple(order)
        return [p for p in known if load_stage in (None, p.load_stage)]

    _properties: tuple[Property[Any], ...]

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

    def property_list_set(self) -> list[Property[Any]]:
        """Return those of `property_list` that are not at their defaults."""
        return [prop for prop in self.property_list() if prop.name in self._values]

    def property_uses(self, value: object) -> list[str]:
        """Return the names of the properties that are set to this very object."""
        return [name for name, known in self._values.items() if known is value]

    def property_get_default(self, prop: str | Property[Any]) -> Any:
        """Return what the property would be if it was reset.

        :raise AttributeError: when it has no default.
        """
        return self.property_get_def(prop).get_default(self)

    def property_require(
        self,
        prop: str | Property[Any],
        *,
        allow_none: bool = False,
        hard: bool = False,
    ) -> None:
        """Complain if a property has no value.

        :param allow_none: whether None counts as a value.
        :param hard: whether to raise ValueError; else it is logged.
        """
        name = prop.name if isinstance(prop, Property) else prop
        if getattr(self, name, None) is not None:
            return
        if allow_none and hasattr(self, name):
            return
        message = f"{self} needs its property {name!r} set"
        if hard:
            raise ValueError(message)
        log.critical("%s", message)

    def clone_properties(
        self, src: PropertyHolder, proplist: Iterable[str | Property[Any]] | None = None
    ) -> None:
        """Set the properties as another object has them, where it has them set.

        :param src: the object to copy from.
        :param proplist: which ones; by default all that may be cloned.
        """
        chosen = (
            {p.name for p in self.property_list() if p.clone}
            if proplist is None
            else {self.property_get_def(p).name for p in proplist}
        )
        for prop in self.property_list():
            if prop.name in chosen and prop.name in src._values:
                setattr(self, prop.name, src._values[prop.name])
        self.fire_event("clone-properties", src=src, proplist=proplist)
