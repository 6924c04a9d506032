import pytest

from r1ray.config.continual import ContinualConfig, ReplayConfig
from tests.unit.config.minimal import parse, refuse


def test_it_is_off_unless_asked_for_and_replays_by_default() -> None:
    assert parse().continual is None
    assert parse("continual={}").continual == ContinualConfig(replay=ReplayConfig())
    alone = parse("continual={replay: null, averaging: {start_share: 0.25}}").continual
    assert alone is not None
    assert (alone.replay, alone.ewc, alone.lora) == (None, None, None)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["continual={ewc: {}, lora: {}}"], "ewc and lora are both given"),
        (["continual={}", "distill={teacher: x}"], "continual goes without distill, train.gates"),
        (
            ["continual={}", "train.gates={}", "train.precision=fp32"],
            "continual goes without distill, train.gates",
        ),
        (
            ["continual={lora: {}}", "train.fake_quant=w8a8"],
            "continual.lora trains beside weights that train.fake_quant (w8a8) would round",
        ),
        (["continual={replay: {share: 1.0}}"], "continual.replay.share"),
        (
            ["prepare.sources=[{type: tasks, num_samples: 1, families: [gdc]}]"],
            "prepare.sources names the family 'gdc', which is not in tasks.families",
        ),
        (
            [
                "prepare.sources=[{type: tasks, num_samples: 1, families: [gcd]}, "
                "{type: tasks, num_samples: 1, families: [gcd]}]"
            ],
            "sources has more than one entry of type tasks; give each its own families",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], complaint: str) -> None:
    assert complaint in refuse(*overrides)


def test_task_sources_may_share_the_families() -> None:
    config = parse(
        "tasks.families=[{name: gcd}, {name: chain_sum}]",
        "prepare.sources=[{type: tasks, num_samples: 1, families: [gcd]}, "
        "{type: tasks, num_samples: 1, families: [chain_sum]}]",
    )
    assert len(config.prepare.sources) == 2
