"""What is wrong with a request."""


class BadRequestError(ValueError):
    """The body can't be understood; the text says why, and `param` which field is meant."""

    status = 400
    """Of the response."""

    def __init__(self, problem: str, param: str | None = None) -> None:
        super().__init__(problem)
        self.param = param
