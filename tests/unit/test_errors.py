import pickle

from r1ray import errors
from r1ray.errors import R1RayError, ServingError


def test_the_exception_tree_is_exactly_what_the_module_draws() -> None:
    assert errors.__all__ == [
        "ArtifactError",
        "BudgetError",
        "ConfigError",
        "DivergenceError",
        "ExchangeError",
        "ForgettingError",
        "ImageError",
        "R1RayError",
        "ServingError",
        "ShapeError",
    ]
    assert all(issubclass(getattr(errors, name), R1RayError) for name in errors.__all__)
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in errors.__all__)


def test_a_serving_error_carries_the_status_and_code() -> None:
    error = ServingError("too long", status=400, code="context_length_exceeded", param="messages")
    assert str(error) == "too long"
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    there = pickle.loads(pickle.dumps(error))  # in the ingress
    assert (type(there), str(there), vars(there)) == (ServingError, "too long", vars(error))
