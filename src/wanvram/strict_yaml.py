"""YAML from strangers: safe types only, no aliases, no duplicate keys, bounded size; every refusal names the file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.input_files import read_text

__all__ = ["MAX_BYTES", "MAX_WRITTEN_BYTES", "read_strict_yaml"]

MAX_BYTES = 64 * 1024  # written by hand; PyYAML takes 8 s for 1 MiB of short keys
MAX_WRITTEN_BYTES = 1024 * 1024  # of a config.yaml that a run wrote, whose prompts may come from a file of their own
MAX_NUMBER = 1 << 64


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases, which can blow a small file up to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.MappingNode):  # the tag !!map or !!set before something else
            return super().construct_mapping(node, deep)
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
        self._refuse_base_60(node)
        value = int(super().construct_yaml_int(node))
        if abs(value) > MAX_NUMBER:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return value

    def construct_real(self, node: Any) -> float:
        self._refuse_base_60(node)
        return float(super().construct_yaml_float(node))

    def _refuse_base_60(self, node: Any) -> None:
        """No one means 630 by 10:30, and PyYAML takes quadratic time for it."""
        if ":" in str(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text like 10:30 would be a number of base 60; put it in quotes", node.start_mark
            )


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_whole)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_real)


def _explain(error: yaml.YAMLError, text: str) -> tuple[str, int]:
    """(what is wrong, line)"""
    if isinstance(error, yaml.reader.ReaderError):
        return "a control character is not allowed", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.constructor.ConstructorError) and isinstance(error.__context__, ValueError):
        return "a value is not what its tag says", mark.line + 1 if mark else 1  # !!binary whose text is no base64
    problem = getattr(error, "problem", None) or "malformed"
    problem = "a list or a mapping cannot be a key" if problem == "found unhashable key" else problem
    return problem, mark.line + 1 if mark else 1


def read_strict_yaml(path: Path, limit: int = MAX_BYTES) -> Any:
    """The content of a regular file of at most `limit` bytes, unpacked if gzipped, as plain values.

    Raises InputError naming the file and what is wrong.
    """
    text = read_text(path, limit)
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem, where = _explain(error, text)
        raise InputError(f"{path}: is not valid YAML at line {where}: {problem}") from error
    except (RecursionError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: is not valid YAML: {shown(error)}") from error
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML's own, as for `!!bool no boolean`
        raise InputError(f"{path}: is not valid YAML: a value is not what its tag says") from error
