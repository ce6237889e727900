"""Files of the Hugging Face Hub."""

from __future__ import annotations


def hub_file(repository: str, revision: str | None, name: str) -> str:
    """Return the local path of a file of a Hub repository, downloaded if it is not cached."""
    from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return cached
    # Without a network this fails at once; the download would retry for half a minute first.
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # its class depends on the HTTP library that the client uses
        raise OSError(f"{constants.ENDPOINT} cannot be reached ({error}).") from error
    return hf_hub_download(repository, name, revision=revision)
