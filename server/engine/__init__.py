"""vLLM: its processes, the upstreams, and the identity of each model in keys."""
