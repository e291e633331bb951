"""A checkpoint from the Hugging Face Hub, or from its local cache."""

from __future__ import annotations

from pathlib import Path

from tsqp.errors import CheckpointNotFound, FetchError

# Only what is read. Not "*.safetensors": some repositories hold the same weights a second time in other layouts.
_FILES = [
    "config.json",
    "quantize_config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
]


def download_from_hub(repository: str) -> Path:
    """The local snapshot of a repository, downloading what the cache lacks; HF_HUB_OFFLINE=1 is honoured.

    Raises CheckpointNotFound when there is no such repository or it may not be read, FetchError when the download
    did not finish or could not begin.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_FILES))
    except errors.GatedRepoError as error:
        message = f"{repository} is gated on the Hub: accept its terms there and log in with `hf auth login`"
        raise CheckpointNotFound(message) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        message = f"there is no directory {repository!r} here, and no such model on the Hub that may be read"
        raise CheckpointNotFound(message) from error
    except errors.LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        message = f"{repository} is not in the local Hub cache and {reason}; name a directory or a .gguf file instead"
        raise FetchError(message) from error
    # HTTP and network errors of the hub's client derive from OSError or from its own base.
    except (OSError, errors.HfHubHTTPError) as error:
        raise FetchError(f"downloading {repository} from the Hub failed: {_first_line(error)}") from error


def cached_snapshot(repository: str) -> Path:
    """The snapshot of a repository in the local cache; nothing is asked of the Hub. Raises CheckpointNotFound."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_FILES, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        message = f"{repository} is no path here and not in the local Hub cache: tsqp model fetch {repository}"
        raise CheckpointNotFound(message) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
