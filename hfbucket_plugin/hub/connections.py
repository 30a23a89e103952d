"""The HTTP client that requests go over: huggingface_hub's shared one, and what to say where the environment forbids it.

Making that client reads proxies and certificates from the environment, and lets out whatever goes wrong there: ImportError,
ValueError, FileNotFoundError without a name.
"""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from hfbucket_plugin.core import forks
from hfbucket_plugin.errors import ConfigError

_PROXIES: Final = ("http", "https", "all")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")

_lock = forks.ForkSafeLock()
_direct: httpx2.Client | None = None
_parents: httpx2.Client | None = None
"""A parent's client, kept alive in a forked child: to close it there would end TLS sessions of the parent."""


def session(endpoint: str) -> httpx2.Client:
    """The client for requests to a Hub.

    Raises:
        ConfigError: The environment's proxies or certificates cannot be used; the message names the variable.
        OfflineModeIsEnabled: HF_HUB_OFFLINE is set.
    """
    try:
        return get_session()
    except (ImportError, ValueError) as error:  # ImportError: SOCKS without the package for it
        lacking = isinstance(error, ImportError)
    except OSError:
        names = [name for name in _CERTIFICATES if os.environ.get(name)]
        if not names:
            raise
        raise ConfigError(
            f"{names[0]} names {os.environ[names[0]]!r}, from which no certificates can be read; correct or unset it"
        ) from None
    host = urlsplit(endpoint).hostname or ""
    if _exempt(host):
        return _without_proxies()
    names = _proxy_variables()
    advice = "install the package socksio" if lacking else "correct it"
    why = "a SOCKS proxy, for which the package socksio is missing" if lacking else "a proxy that cannot be used"
    raise ConfigError(
        f"{' or '.join(names) or 'a proxy variable'} names {why}; {advice}, or put {host!r} into NO_PROXY"
    )


def _exempt(host: str) -> bool:
    """Whether NO_PROXY lets this host be asked directly."""
    return bool(proxy_bypass(host))


def _proxy_variables() -> list[str]:
    """The variables that name proxies, as they are spelled; never their values, which may hold passwords."""
    return [name for name in os.environ if name.lower() in {f"{scheme}_proxy" for scheme in _PROXIES}]


def _without_proxies() -> httpx2.Client:
    global _direct  # noqa: PLW0603 - one pool of connections for the process, as huggingface_hub's is
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    with _lock:
        if _direct is None:
            context = httpx2.create_ssl_context()
            _direct = httpx2.Client(verify=context, trust_env=False, follow_redirects=False, timeout=None)
        return _direct


def _forget() -> None:
    """Leave the parent its connections: a forked child that wrote to them would mix its requests with those of the parent."""
    global _direct, _parents
    _parents, _direct = _direct, None


os.register_at_fork(after_in_child=_forget)
