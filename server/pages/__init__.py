"""The pages that a browser shows of a server. Their files need no build step and no network.

`static_files` serves the files in `static`; `overview` and `openapi_handler` serve the JSON that
their scripts fetch.
"""
