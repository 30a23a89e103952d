"""What a bucket of full chunks cannot serve: the engine's own settings that must be so, and why."""

from __future__ import annotations


def complaints(*, save_unfull_chunk: bool, save_chunk_meta: bool, use_layerwise: bool, serde: object) -> list[str]:
    """What is wrong with an engine, a sentence each; nothing when a bucket can serve it.

    Args:
        save_unfull_chunk: LMCache's setting of that name.
        save_chunk_meta: `extra_config.save_chunk_meta`.
        use_layerwise: LMCache's setting of that name.
        serde: `remote_serde`; None is LMCache's default, `naive`.
    """
    wrong = {
        "save_unfull_chunk must be false: only full chunks are stored": save_unfull_chunk,
        "extra_config.save_chunk_meta must be false or left out: objects hold no chunk metadata": save_chunk_meta,
        "use_layerwise must be false: chunks of single layers are not full chunks": use_layerwise,
        f"remote_serde must be naive, not {serde!r}: other serdes change the size of a chunk": (
            serde not in (None, "naive")
        ),
    }
    return [text for text, is_wrong in wrong.items() if is_wrong]
