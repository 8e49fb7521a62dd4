"""vLLM: its processes, the upstreams, and what identifies an answer's origin."""
