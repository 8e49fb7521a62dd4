"""Mistakes in requests."""


class BadRequestError(ValueError):
    """The request can't be answered. The text says why, and `param` names the field."""

    status = 400
    """The status of the response."""

    def __init__(self, problem: str, param: str | None = None) -> None:
        super().__init__(problem)
        self.param = param
