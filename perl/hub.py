"""Names on the Hugging Face hub without a network: what is in the cache is used at once."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)

_TIMEOUT = 5.0


@functools.cache
def offline_if_unreachable() -> None:
    """Switch to the hub's offline mode where its server does not answer within seconds.

    Its client would try every file six times, half a minute or more each. A proxy is left to the client.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or not url.hostname or {"https", "all"} & getproxies().keys():
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), _TIMEOUT).close()
    except OSError as error:
        logger.warning("%s cannot be reached (%s); only its cache is used", url.hostname, error)
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if settings := sys.modules.get("datasets.config"):
            settings.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
