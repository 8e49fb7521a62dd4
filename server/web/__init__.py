"""HTTP over aiohttp: requests, responses, sockets, and what surrounds each handler."""
