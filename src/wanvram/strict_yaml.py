"""YAML from strangers: safe types only, no aliases, no duplicate keys, bounded size; every refusal names the file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wanvram.errors import InputError

__all__ = ["read_strict_yaml"]

MAX_FILE_BYTES = 1024 * 1024
MAX_NUMBER = 1 << 64


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases, which can blow a small file up to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """No lone surrogates, which an escape can write and no file can hold."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise yaml.constructor.ConstructorError(None, None, "a text is no Unicode", node.start_mark)
        return value

    def construct_whole(self, node: Any) -> int:
        """Bounded: hexadecimal digits without end make a number that cannot even be printed."""
        value = int(super().construct_yaml_int(node))
        if abs(value) > MAX_NUMBER:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_whole)


def _explain(error: yaml.YAMLError, text: str) -> tuple[str, int]:
    """(what is wrong, line)"""
    if isinstance(error, yaml.reader.ReaderError):
        return "a control character is not allowed", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or "malformed", mark.line + 1 if mark else 1


def read_strict_yaml(path: Path) -> Any:
    """The file's content as plain values. Raises InputError naming the file and what is wrong."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem, where = _explain(error, text)
        raise InputError(f"{path}: is not valid YAML at line {where}: {problem}") from error
    except (RecursionError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
