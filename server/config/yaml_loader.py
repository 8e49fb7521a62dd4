"""YAML as our files use it: no key stands twice, and a missing value isn't `null`."""

from collections.abc import Iterator
from typing import Any, Final

import yaml


class _Empty:
    """A value that is missing after its key, as where all below the key is commented out."""


EMPTY: Final = _Empty()


class Loader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice.

    A missing value is `EMPTY`, so that only a written `null` leaves something out.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.MarkedYAMLError(f"{', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_null(self, node: yaml.ScalarNode) -> Any:
        return None if node.value else EMPTY


Loader.add_constructor("tag:yaml.org,2002:null", Loader.construct_yaml_null)


def empty_in(value: Any, name: str = "") -> Iterator[str]:
    """Yield the paths of missing values in `value`, whose own path is `name`."""
    if value is EMPTY:
        yield name
    items = enumerate(value) if isinstance(value, list) else ()
    for part, each in value.items() if isinstance(value, dict) else items:
        yield from empty_in(each, f"{name}.{part}" if name else str(part))
