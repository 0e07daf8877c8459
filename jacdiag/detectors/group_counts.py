"""Say how many sub-layers a list of names holds, and which other parameters are in it."""

from __future__ import annotations

from collections.abc import Sequence


def is_sublayer(name: str) -> bool:
    """Return whether a group of parameters is a sub-layer.

    Names such as (embedding) stand for parameters outside of the sub-layers.

    >>> is_sublayer("h.0.attn"), is_sublayer("(embedding)")
    (True, False)
    """
    return not name.startswith("(")


def count_groups(names: Sequence[str], every: Sequence[str] = ()) -> str:
    """Return how many sub-layers there are among some names, and the other names.

    Args:
        names: of groups of parameters.
        every: the names of all groups; empty if they are not known.

    >>> count_groups(["h.0.attn", "(embedding)", "(head)"], ["h.0.attn", "h.0.mlp", "(embedding)"])
    '1 of 2 sub-layers, (embedding) and (head)'
    >>> count_groups(["h.0.attn", "h.0.mlp"], ["h.0.attn", "h.0.mlp"])
    'all 2 sub-layers'
    >>> count_groups(["h.0.attn", "(norms)"])
    '1 sub-layer and (norms)'
    """
    # 1. The sub-layers.
    count = sum(map(is_sublayer, names))
    total = sum(map(is_sublayer, every))
    parts = []
    if count:
        parts.append(_count_sublayers(count, total))

    # 2. The others. They are few.
    parts += [name for name in names if not is_sublayer(name)]
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _count_sublayers(count: int, total: int) -> str:
    """Return "3 of 8 sub-layers"; "3 sub-layers" if the total is not known, and 0."""
    # 1. The noun is that of the last number.
    last_number = total or count
    noun = "sub-layers"
    if last_number == 1:
        noun = "sub-layer"

    # 2. The numbers.
    if not total:
        return f"{count} {noun}"
    are_all = count == total > 1
    if are_all:
        return f"all {total} {noun}"
    return f"{count} of {total} {noun}"
