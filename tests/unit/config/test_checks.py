"""What a configuration and a model do not do together."""

import dataclasses

import pytest

from r1ray.config import load_config
from r1ray.config.checks import check_padding
from r1ray.errors import ConfigError
from r1ray.models.config import RopeConfig
from tests.fakes import tiny_config

LONGROPE = RopeConfig(
    1e4,
    "longrope",
    {
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        (RopeConfig(1e4, "dynamic", {"factor": 4.0}), 256),
        (LONGROPE, 64),
    ],
)
def test_rows_whose_rotations_depend_on_their_length_are_not_padded(
    rope: RopeConfig, most: int
) -> None:
    shape = dataclasses.replace(tiny_config(max_positions=256), rope=rope)

    def check(tokens: int, kind: str, *more: str) -> None:
        overrides = [f"prepare.max_tokens={tokens}", f"prepare.batching={{type: {kind}}}"]
        overrides += ["prepare.batch_tokens=4096", *more]
        check_padding(load_config("jobs/configs/tiny.yaml", overrides), shape.even_context)

    assert tiny_config().even_context is None
    check(most, "buckets")
    check(most + 1, "packing")
    with pytest.raises(ConfigError, match=f"beyond {most} the model"):
        check(most + 1, "buckets")
    answers = "{last_steps: 1, max_new_tokens: 9}"
    on_policy = f"distill={{teacher: there, logits: {{type: online}}, on_policy: {answers}}}"
    check(most - 9, "packing", on_policy)
    with pytest.raises(ConfigError, match="on_policy pads rows"):
        check(most - 8, "packing", on_policy)
