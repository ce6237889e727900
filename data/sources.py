"""Where videos come from: a source lists captioned videos, and says what of it cannot be used.

Nothing is opened here but tables and folders: what the files hold is for `survey.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .filter import parse
from .listing import Dropped, Listing, Source, SourceSpec


def _folder(spec: SourceSpec) -> Listing:
    from .folder import list_folder

    return list_folder(spec)


def _openvid(spec: SourceSpec) -> Listing:
    from .openvid import list_openvid

    return list_openvid(spec)


def _datasets(spec: SourceSpec) -> Listing:
    from .hub import list_dataset

    return list_dataset(spec)


# By what stands before a colon in `data.source`; what follows it is the source's own affair.
SOURCES: dict[str, Callable[[SourceSpec], Listing]] = {
    "folder": _folder,
    "openvid": _openvid,
    "datasets": _datasets,
}


def list_videos(spec: SourceSpec) -> Listing:
    """The videos of a source that `data.filter` and `data.top_k` leave.

    Raises ValueError for a source that is unknown, missing or empty, for a malformed table, and for
    a filter that does not parse or names no column.
    """
    name = spec.source.partition(":")[0]
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"data.source={spec.source} is unknown: choose one of {known}")
    if spec.filter:
        parse(spec.filter)  # before minutes of listing
    return select(SOURCES[name](spec), spec.filter, spec.top_k, spec.top_by)


def select(listing: Listing, filter: str, top_k: int | None, top_by: str | None) -> Listing:
    """The sources that `filter` passes, and of these the `top_k` with the greatest `top_by`."""
    sources, dropped = listing.sources, list(listing.dropped)
    if filter:
        rule = parse(filter)
        rule.check_columns({name for source in sources for name in source.columns})
        passed = [rule(source.columns) for source in sources]
        dropped += [
            Dropped(source.name, "filtered", f"data.filter: {rule.explain(source.columns)}")
            for source, passes in zip(sources, passed, strict=True)
            if not passes
        ]
        sources = [source for source, passes in zip(sources, passed, strict=True) if passes]
    if top_k is not None:
        assert top_by is not None
        rule = parse(f'"{top_by}" > 0', what="data.top_by")
        rule.check_columns({name for source in sources for name in source.columns})
        scored = [(rule.number(source.columns, top_by), source) for source in sources]
        ranked = sorted(scored, key=_best_first)
        kept = {id(source) for score, source in ranked[:top_k] if score is not None}
        least = min((s for s, source in ranked if id(source) in kept and s is not None), default=0)
        dropped += [
            Dropped(source.name, "filtered", _not_in_top(score, top_by, top_k, least))
            for score, source in scored
            if id(source) not in kept
        ]
        sources = [source for source in sources if id(source) in kept]
    return replace(listing, sources=sources, dropped=dropped)


def _best_first(scored: tuple[float | None, Source]) -> tuple[bool, float, str, float]:
    score, source = scored
    return score is None, -(score or 0.0), source.name, source.start


def _not_in_top(score: float | None, column: str, top_k: int, least: float) -> str:
    if score is None:
        return f"data.top_k: {column} has no number"
    return f"data.top_k: {column} {score:g} is not among the {top_k} greatest, down to {least:g}"
