"""List the captioned videos of a source, and what cannot be used.

Only tables and folders are read here; `survey.py` opens the videos.
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


# By the part of `data.source` before a colon; the source itself interprets the rest.
SOURCES: dict[str, Callable[[SourceSpec], Listing]] = {
    "folder": _folder,
    "openvid": _openvid,
    "datasets": _datasets,
}


def list_videos(spec: SourceSpec) -> Listing:
    """Return the videos of a source that pass `data.filter` and `data.top_k`.

    Raises ValueError if the source is unknown, missing or empty, a table is malformed, or the
    filter does not parse or names a column that does not exist.
    """
    name = spec.source.partition(":")[0]
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise ValueError(f"data.source={spec.source} is unknown: choose one of {known}")
    if spec.filter:
        parse(spec.filter)  # fail before listing, which may take minutes
    return select(SOURCES[name](spec), spec.filter, spec.top_k, spec.top_by)


def select(listing: Listing, filter: str, top_k: int | None, top_by: str | None) -> Listing:
    """Keep the sources that pass `filter`, and of these the `top_k` with the greatest `top_by`."""
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
    """Return the sort key: scored sources first, the greatest score first, then by name."""
    score, source = scored
    return score is None, -(score or 0.0), source.name, source.start


def _not_in_top(score: float | None, column: str, top_k: int, least: float) -> str:
    if score is None:
        return f"data.top_k: {column} has no number"
    return (
        f"data.top_k: {column} {score:g} is not among the {top_k} greatest, which end at {least:g}"
    )
