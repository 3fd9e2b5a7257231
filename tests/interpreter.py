"""Triton's interpreter with less to do: a helper that a kernel calls finds the language patched and leaves it so.

The interpreter patches all of `triton.language` at every call of a jitted helper, which costs more than what most
helpers compute and changes nothing after the first of a launch.
"""

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """From here on; does nothing where this version of Triton has no such function."""
    original = getattr(interpreter, "_patch_lang", None)
    if original is None:
        return
    language, patched = interpreter.tl, []

    def patch(fn):
        modules = [value for value in fn.__globals__.values() if value is language or value is language.core]
        if patched and all(module in patched for module in modules):
            return None
        launching = not patched
        patched.extend(modules)
        scope = original(fn)
        return _Scope(scope, patched) if launching else scope

    interpreter._patch_lang = patch


class _Scope:
    """What a launch undoes at its end."""

    def __init__(self, scope, patched: list[object]):
        self._scope, self._patched = scope, patched

    def restore(self) -> None:
        self._patched.clear()
        self._scope.restore()
