"""Workloads that are read from files: prompts, chats, requests, and traces."""
