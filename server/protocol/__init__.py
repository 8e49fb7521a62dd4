"""The meaning of requests and answers, as pure functions over bytes; nothing here knows aiohttp."""
