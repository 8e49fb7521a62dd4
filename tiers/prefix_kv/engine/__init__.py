"""The store's side within an engine: what it loads, what it stores, and vLLM's connector."""
