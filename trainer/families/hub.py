"""Files of the Hugging Face Hub."""

from __future__ import annotations


def hub_file(repository: str, revision: str | None, name: str) -> str:
    """One file of a Hub repository, from its local cache if it is there."""
    from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return cached
    # Without a network this fails at once; the download would retry for half a minute first.
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever HTTP library the client is built on
        raise OSError(f"{constants.ENDPOINT} cannot be reached ({error}).") from error
    return hf_hub_download(repository, name, revision=revision)
