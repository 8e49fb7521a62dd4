"""Telemetry: metrics, history, logs and traces of answered requests."""
