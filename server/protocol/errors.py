"""Mistakes in requests."""


class BadRequestError(ValueError):
    """The request is wrong. The text explains the mistake, and `param` names the field."""

    status = 400
    """The status of the response."""

    def __init__(self, problem: str, param: str | None = None) -> None:
        super().__init__(problem)
        self.param = param
