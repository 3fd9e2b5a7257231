"""Where results come from: the commands, seeds and commits that their files record."""

import shlex
from collections.abc import Iterable


def ranges(numbers: Iterable[int]) -> str:
    """Of 0, 1, 2, 5: 0 to 2, 5."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    # two neighbours are no range
    parts = ([f"{s[0]} to {s[-1]}"] if len(s) > 2 else map(str, s) for s in spans)
    return ", ".join(part for span in parts for part in span)


def commands(records: Iterable[dict]) -> str:
    """Each command once, in order of appearance, as it is typed; and of how many records it was not recorded."""
    found = [record.get("command") for record in records]
    known = dict.fromkeys(_code(shlex.join(command)) for command in found if command)
    unknown = found.count(None)
    if not known:
        return "command not recorded"
    return ", ".join(known) + (f", not recorded of {_counted(unknown, 'run')}" if unknown else "")


def _code(text: str) -> str:
    # a fence that is longer than what could end it
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def seeds(numbers: Iterable[int]) -> str:
    known = set(numbers)
    return f"seed{'s' if len(known) > 1 else ''} {ranges(known)}" if known else "seeds not recorded"


def commits(records: Iterable[dict]) -> str:
    """Each commit once; one that ends in + had changes on top."""
    known = dict.fromkeys(record["environment"].get("commit") for record in records)
    names = [str(name) for name in known if name]
    unknown = ["commit not recorded"] if None in known else []
    return ", ".join([f"commit{'s' if len(names) > 1 else ''} {', '.join(names)}"] * bool(names) + unknown)


def paragraph(records: list[dict], numbers: Iterable[int]) -> str:
    """One line on records of these seeds."""
    text = f"{commands(records)}; {seeds(numbers)}; {commits(records)}.\n"
    return text[0].upper() + text[1:]
