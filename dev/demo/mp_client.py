"""A client of `lmcache server` (MP mode): what an inference engine's worker is to it, with a KV cache on the CPU.

It speaks through LMCache's own client classes, as its vLLM connector does.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
from lmcache.v1.multiprocess.custom_types import IPCCacheServerKey
from lmcache.v1.multiprocess.transfer_context import EngineDrivenTransferContext
from lmcache.v1.multiprocess.transfer_context.shm import EngineDrivenContextShm
from lmcache.v1.multiprocess.transport.factory import RequestClientFactory

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_SECONDS = 0.001
_numbers = itertools.count(1)


class MPClient:
    """A worker of an engine. Use it as a context manager, or call `close`.

    Its KV cache has room for one prompt, whose place is the cache's start: what is stored or retrieved next lies there.

    Args:
        address: Of the server, such as `tcp://127.0.0.1:5555`.
        layers: Of the model.
        hidden: Bytes of a token's KV are `2 * layers * hidden * 2` (bfloat16).
        tokens: Of the longest prompt.
        block: Tokens of a block of the KV cache. Chunks are a multiple of it.
        model: The model's name, as it stands in keys.
        salt: The `cache_salt` of every request; prompts under different salts share nothing.
        timeout_s: How long the server may take for a request, and for the loads of a lookup, in seconds.

    Attributes:
        chunk_size: Tokens of a chunk, as the server says.

    Raises:
        TimeoutError: The server does not answer.
        ValueError: Its chunks are no multiple of `block`.
    """

    def __init__(
        self,
        address: str,
        *,
        layers: int = 2,
        hidden: int = 64,
        tokens: int = 1024,
        block: int = 16,
        model: str = "demo/tiny-llama",
        salt: str = "",
        timeout_s: float = 60.0,
    ) -> None:
        self._model = model
        self._salt = salt
        self._timeout_s = timeout_s
        self._block = block
        self._cache = torch.zeros((layers, 2, -(-tokens // block), block, 1, hidden), dtype=torch.bfloat16)
        self._caches = {f"layer.{number}": layer for number, layer in enumerate(self._cache)}
        self._instance = os.getpid() << 16 | next(_numbers)
        self._server: Any = RequestClientFactory.create(address)
        self._transfer: Any = EngineDrivenTransferContext(self._instance, self._server)
        try:
            self.chunk_size = int(self._answer(self._server.get_chunk_size()))
            self._register()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, and of the object that it becomes."""
        return int(self.kv(self.chunk_size).nbytes)

    @property
    def shares_memory(self) -> bool:
        """Whether it copies to and from the server's L1 itself; if not, KV is sent."""
        return isinstance(self._transfer.engine_driven_context, EngineDrivenContextShm)

    def kv(self, tokens: int) -> torch.Tensor:
        """The place of a prompt in the KV cache, `[2, layers, tokens, hidden]` as in chunks: the cache itself, no copy."""
        return self._cache.flatten(2, 4).transpose(0, 1)[:, :, :tokens]

    def random_kv(self, tokens: int, seed: int) -> torch.Tensor:
        """KV of that many tokens, shaped as `kv`: incompressible, as real KV nearly is."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.kv(tokens).shape, generator=generator).to(torch.bfloat16)

    def store(self, tokens: Sequence[int], kv: torch.Tensor | None = None) -> None:
        """Store the full chunks of a prompt in L1; the server writes them to its adapters in the background.

        Args:
            tokens: The prompt.
            kv: Its KV, `[2, layers, tokens, hidden]`; None for what the KV cache holds.

        Raises:
            RuntimeError: The server did not take it. That L1 has no room for a chunk, it does not tell.
        """
        if kv is not None:
            self.kv(len(tokens)).copy_(kv)
        request = replace(self._request(tokens), worker_id=0)
        self._move(self._transfer.submit_store, request)
        self._answer(self._server.end_session(request.request_id))

    def lookup(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt are cached, from its start.

        The server loads the hits into L1 for it, and forgets them at once when they came from an adapter.

        Raises:
            TimeoutError: The adapters took too long.
        """
        request = self._request(tokens)
        hit = self._prefetch(request)
        self._answer(self._server.free_lookup_locks(replace(request, end=hit), 1))
        self._answer(self._server.end_session(request.request_id))
        return hit

    def retrieve(self, tokens: Sequence[int]) -> tuple[int, torch.Tensor]:
        """Look a prompt up and retrieve what is cached of it.

        Returns:
            How many tokens were hit, from its start, and its place in the KV cache: zeros where they were not. The next
            call overwrites it.

        Raises:
            TimeoutError: The adapters took too long.
            RuntimeError: The server did not hand out what the lookup had hit.
        """
        place = self.kv(len(tokens))
        place.zero_()
        request = self._request(tokens)
        hit = self._prefetch(request)
        if hit:
            self._move(self._transfer.submit_retrieve, replace(request, worker_id=0, end=hit))
        self._answer(self._server.end_session(request.request_id))
        return hit, place

    def close(self) -> None:
        """Leave the server; no error when it is gone."""
        left = self._transfer.unregister()
        if left is not None:
            left.wait(timeout=1.0)
        self._transfer.close()
        self._server.close()

    def _register(self) -> None:
        """Tell the server how the KV cache is laid out."""
        if self.chunk_size % self._block:
            raise ValueError(f"chunks of {self.chunk_size} tokens are no multiple of blocks of {self._block}")
        blocks, hints = self.chunk_size // self._block, {"kv_layout": "NHD"}
        self._transfer.register(self._caches, self._model, 1, blocks, self._timeout_s, layout_hints=hints)

    def _request(self, tokens: Sequence[int]) -> Any:
        """A new request for a prompt's full chunks."""
        if len(tokens) > (room := self._cache[0, 0].shape[0] * self._block):
            raise ValueError(f"a prompt of {len(tokens)} tokens, and room for {room}")
        return IPCCacheServerKey(
            model_name=self._model,
            world_size=1,
            worker_id=None,
            num_kv_readers=1,
            token_ids=tuple(tokens),
            start=0,
            end=len(tokens) // self.chunk_size * self.chunk_size,
            request_id=f"{self._instance}-{next(_numbers)}",
            cache_salt=self._salt,
        )

    def _prefetch(self, request: Any) -> int:
        """Have the server load a request's hits into L1; returns how many tokens they are."""
        self._answer(self._server.lookup(request, 1))
        end = time.monotonic() + self._timeout_s
        while (chunks := self._answer(self._server.query_prefetch_status(request.request_id))) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"the lookup did not end within {self._timeout_s} s")
            time.sleep(_POLL_SECONDS)
        return int(chunks) * self.chunk_size

    def _move(self, submit: Any, request: Any) -> None:
        """Copy a request's KV between the KV cache and L1."""
        blocks = list(range(request.end // self._block))
        moved = submit(request.request_id, request, self._caches, [blocks], None, self.chunk_size // self._block)
        if not self._answer(moved):
            raise RuntimeError(f"the server did not do {submit.__name__} of {request.end} tokens")

    def _answer(self, future: Any) -> Any:
        return future.result(timeout=self._timeout_s)
