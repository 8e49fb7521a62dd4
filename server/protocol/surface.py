"""What a tenant may ask an engine for: its answers, and not what it does for all or for others.

An engine has routes that stop it, change its weights or tell what others ask. Those, and any that
we don't know, are an operator's. So are Cohere's, which use the prefix cache without a cache salt,
and the one by which engines ask each other, which finds media by their hash.
"""

import re

from server.protocol.cache_salt import SALTED

ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""What would change a running engine, and is refused to all."""
_FIXED = SALTED | {
    "/detokenize", "/ping", "/tokenize", "/tokenizer_info", "/v1/audio/transcriptions",
    "/v1/audio/translations", "/v1/chat/completions/derender", "/v1/chat/completions/render",
    "/v1/completions/derender", "/v1/completions/render", "/v1/messages/count_tokens",
    "/v1/messages/render", "/v1/models", "/v1/realtime", "/v1/responses/render", "/version",
}  # fmt: skip
# What an engine keeps by an id can't be guessed, and models are no secret.
_ONE = re.compile(r"/v1/models/[^/].*|/v1/responses/[^/]+(/cancel)?", re.DOTALL).fullmatch


def is_for_tenants(path: str) -> bool:
    """Whether any tenant may ask an engine for this path, decoded."""
    if path in _FIXED:
        return True
    return _ONE(path) is not None and not {".", ".."} & set(path.split("/"))
