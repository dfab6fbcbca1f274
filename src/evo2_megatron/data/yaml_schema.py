# SPDX-License-Identifier: Apache-2.0
"""Read a YAML list of mappings and hold each against a dataclass: unknown keys and wrong types are errors."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from evo2_megatron.config import UserError


def read_yaml_list(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a YAML file that must hold a list of mappings with at least one entry.

    Several YAML documents (``---`` between them) count as one list.

    Raises:
        UserError: It does not, or a mapping has a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = [key for number, key in enumerate(keys) if key in keys[:number]]
            if twice:  # YAML itself would take the last one, silently
                raise UserError(f"{path}, line {node.start_mark.line + 1}: {twice[0]} is there twice; keep one")
            return super().construct_mapping(node, deep)

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        documents = [document for document in yaml.load_all(text, Loader) if document is not None]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    entries = [entry for document in documents for entry in (document if isinstance(document, list) else [None])]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{path} must be a list of datasets; put '- ' before the first key of each and indent the rest"
        )
    return entries


def expand_home(path: str) -> str:
    """A path with the home folder in place of ``~``, which a shell would have put there."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises where there is no such user


def check_fields(cls: type, entry: dict[str, Any]) -> dict[str, Any]:
    """Check the keys of a mapping against the fields of a dataclass, and the values against their annotations.

    Args:
        cls: The dataclass. Its annotations, as written, are among the keys of ``_TYPES``, or mappings of any kind.
        entry: What was read.

    Returns:
        The same, with whole numbers made floats where floats belong.

    Raises:
        UserError: A key is unknown (the nearest known one is named), or a value has the wrong type.
    """
    types = {f.name: f.type for f in fields(cls)}
    values = {}
    for key, value in entry.items():
        if key not in types:
            import difflib

            near = difflib.get_close_matches(str(key), types, 1)
            known = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(types)}"
            raise UserError(f"unknown key '{key}'; {known}")
        allowed, meaning = _TYPES[types[key].split("[str, ")[0]]
        if type(value) not in allowed:
            raise UserError(f"{key} is {value!r}; it must be {meaning}")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise UserError(f"{key} is {value!r}; each entry must be text")
        values[key] = float(value) if float in allowed else value
    return values


_NONE = type(None)
_TYPES = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "int | None": ((int, _NONE), "a whole number or null"),
    "float": ((int, float), "a number"),
    "str": ((str,), "text"),
    "str | None": ((str, _NONE), "text or null"),
    "list[str]": ((list,), "a list of texts"),
    "list[str] | str | None": ((list, str, _NONE), "a list of texts, the name of a file, or null"),
    "dict": ((dict,), "a mapping"),
}
