"""The process: HTTP, configuration, and the engine."""
