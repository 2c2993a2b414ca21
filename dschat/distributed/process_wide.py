"""The one place for what there is once in a process. Everything else that a run needs is passed.

An object belongs here where the operating system or torch keep one of its kind for the whole process (locks
on files, the default process group), or where code needs it that nobody can pass it to: the handlers of
errors that end a program. Its class stands beside the code that uses it.
"""

from typing import Any, TypeVar

Kind = TypeVar("Kind")

_objects: dict[type, Any] = {}


def process_wide(kind: type[Kind]) -> Kind:
    """The object of that class in this process, made without arguments when it is first asked for."""
    if kind not in _objects:
        _objects[kind] = kind()
    return _objects[kind]
