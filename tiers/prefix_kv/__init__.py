"""Prefix blocks on disk: what an engine has computed of prompts' beginnings, kept over restarts."""
