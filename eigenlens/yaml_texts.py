"""YAML that is read as it is meant: no key twice, no aliases that unfold without end."""

from typing import Any

import yaml

_LIMIT = 100_000  # values of a configuration, aliases written out


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not valid, has a key twice in one mapping, or unfolds without end.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # PyYAML's constructors fail in many ways at values that do not fit their tag (`!!int x`).
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _check_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values below ``node``; ``sizes`` holds those of finished nodes, 0 of open ones."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = 0
        sizes[id(node)] = 1 + sum(_check_size(child, sizes) for child in _children(node))
    if not 0 < sizes[id(node)] <= _LIMIT:
        raise ValueError(
            f"it holds over {_LIMIT:,} values, or an alias (*name) inside what it names"
        )
    return sizes[id(node)]


def _children(node: yaml.CollectionNode) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one mapping")
    return [part for pair in node.value for part in pair]
