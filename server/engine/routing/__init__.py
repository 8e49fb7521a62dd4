"""Which of a model's upstreams gets a request."""
