import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from r1ray.config import load_config
from r1ray.config.exchange import DenseExchangeConfig
from r1ray.config.loader import describe_fields, parse_config
from r1ray.config.prepare import (
    BucketsConfig,
    FileSourceConfig,
    PackingConfig,
    TaskSourceConfig,
)
from r1ray.config.schema import identity
from r1ray.errors import ConfigError
from tests.unit.config.minimal import MINIMAL, TEXT, parse, refuse

DEMO = Path(__file__).parents[3] / "jobs" / "configs" / "demo.yaml"
CONFIGS = sorted((Path(__file__).parents[3] / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    updated = {"update": "demo"}  # a run of another configuration goes on
    assert load_config(path).run.name == updated.get(path.stem, path.stem)


def test_there_are_shipped_configurations() -> None:
    assert "demo.yaml" in [path.name for path in CONFIGS]


def test_all_mistakes_are_reported_at_once_with_paths_and_suggestions() -> None:
    message = refuse(
        "train.learning_rat=1e-3",
        "train.learning_rate=7",
        "run.seed=-1",
        "serve.port=123456",
        "prepare.max_tokens=many",
        "evaluat.num_problems=3",
    )
    assert "6 problem(s)" in message
    for line in (
        "train.learning_rat: unknown key; did you mean train.learning_rate?",
        "train.learning_rate: Input should be less than or equal to 1, got 7",
        "run.seed: Input should be greater than or equal to 0, got -1",
        "serve.port: Input should be less than or equal to 65535, got 123456",
        "prepare.max_tokens: Input should be a valid integer",
        "evaluat: unknown key; did you mean evaluate?",
    ):
        assert line in message


def test_a_missing_key_and_a_value_in_place_of_a_section_are_named() -> None:
    tree = {**MINIMAL, "run": {}, "train": 3}
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(tree), where="my.yaml")
    message = str(caught.value)
    assert "my.yaml: 2 problem(s)" in message
    assert "run.name: required key is missing" in message
    assert "train: expected a section with keys, got 3" in message


def test_exponents_without_a_point_are_numbers() -> None:
    """PyYAML reads `1e-4` as a string."""
    assert yaml.safe_load("1e-4") == "1e-4"
    assert parse("train.learning_rate=1e-4").train.learning_rate == 1e-4
    text = TEXT.replace("num_steps: 20", "num_steps: 20\n  learning_rate: 1e-4")
    assert parse_config(text).train.learning_rate == 1e-4


def test_overrides_apply_in_order_and_take_any_yaml_value() -> None:
    config = parse(
        "train.num_steps=30",
        "train.num_steps=40",
        "train.resources.num_workers=2",
        "prepare.sources=[{type: files, paths: [a.jsonl]}]",
        "run.name=other",
    )
    assert config.train.num_steps == 40
    assert config.train.resources.num_workers == 2
    assert config.prepare.sources == [FileSourceConfig(type="files", paths=["a.jsonl"])]
    assert config.run.name == "other"


def test_an_override_may_contain_an_equals_sign() -> None:
    assert parse("base.source=s3://bucket/a=b").base.source == "s3://bucket/a=b"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.num_steps", "not of the form section.key=value"),
        ("=3", "not of the form"),
        ("train.num_steps.deeper=3", "train.num_steps is not a section"),
        ("tasks.families.0.name=gcd", "tasks.families is not a section"),
        ("train.num_steps=[", "the value is not valid YAML"),
        ("train.num_steps=!!timestamp x", "the value is not valid YAML"),
        ("train..num_steps=3", "train.: unknown key"),
    ],
)
def test_wrong_overrides_are_named(override: str, complaint: str) -> None:
    message = refuse(override)
    assert complaint in message


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["prepare.max_tokens=256"],
            "prepare: batch_tokens (128) is below max_tokens (256); raise batch_tokens",
        ),
        (
            ["prepare.quadratic_tokens=63"],
            "prepare: batch_tokens (128) is below max_tokens (64, which cost 130); raise batch_",
        ),
        (
            ["prepare.sources=[{type: tasks, num_samples: 1}, {type: tasks, num_samples: 2}]"],
            "prepare: sources has more than one entry of type tasks; give each its own families",
        ),
        (
            ["train.resources.num_workers=3"],
            "train: batches_per_step (2) is not a multiple of resources.num_workers (3)",
        ),
        (
            ["train.warmup_steps=20"],
            "train: warmup_steps (20) is not below num_steps (20); lower warmup_steps",
        ),
        (
            ["train.fake_quant=w4a8"],
            "train.fake_quant (w4a8) is not compress.scheme (w8a8); serve what was trained for",
        ),
        (
            ["train.fake_quant_start_share=0.7"],
            "train: fake_quant_start_share (0.7) without fake_quant does nothing; set fake_quant",
        ),
        (
            [
                "train.resources.tiers={budget_mib: 64}",
                "train.precision=fp32",
                "train.fake_quant=w8a8",
                "train.fake_quant_start_share=0.5",
            ],
            "train: resources.tiers train through the rounding from the first step on; leave",
        ),
        (["student={}"], "student: nothing is named to be smaller; give layers or a width"),
        (["compress.exports=[gguf, gguf]"], "compress: exports ['gguf', 'gguf'] has one twice"),
        (
            ["distill={teacher: x, on_policy: {last_steps: 21}}"],
            "distill.on_policy.last_steps (21) is above train.num_steps (20); lower it",
        ),
        (
            ["train.resources.tiers={budget_mib: 64}", "train.exchange={type: delta4}"],
            "train: resources.tiers go with exchange {type: dense} and precision fp32, not with",
        ),
        (
            [
                "train.resources.tiers={budget_mib: 64}",
                "train.precision=fp32",
                "distill={teacher: x, logits: {type: online}}",
            ],
            "train.resources.tiers leave no room for a teacher in every worker",
        ),
        (
            ["serve.budget_mib=64", "compress.scheme=w4a8"],
            "serve.budget_mib goes with compress.scheme w8a8, not with w4a8",
        ),
        (
            ["prepare.sources=[{type: long_context, num_tasks: 0}]"],
            "num_tasks and num_documents are both 0; raise one of them",
        ),
    ],
)
def test_rules_across_fields_name_both_values(overrides: list[str], complaint: str) -> None:
    assert complaint in refuse(*overrides)


def test_variants_are_told_apart_by_type() -> None:
    assert parse().prepare.sources == [TaskSourceConfig(type="tasks", num_samples=10)]
    assert parse("train.exchange={type: dense, dtype: bf16}").train.exchange == (
        DenseExchangeConfig(type="dense", dtype="bf16")
    )
    message = refuse("prepare.sources=[{type: tape}]")
    assert "prepare.sources.0" in message
    assert "'files', 'tasks'" in message


def test_batching_is_buckets_unless_it_says_packing() -> None:
    assert parse().prepare.batching == BucketsConfig(type="buckets")
    assert parse("prepare.batching={type: packing}").prepare.batching == (
        PackingConfig(type="packing")
    )
    found = parse(
        "prepare.batching={type: buckets, num_buckets: 8, max_padding_share: null, fit_rows: 10000}"
    )
    assert found.prepare.batching == BucketsConfig(
        type="buckets", num_buckets=8, max_padding_share=None, fit_rows=10_000
    )
    assert identity(found.prepare) != identity(parse().prepare)
    message = refuse("prepare.batching={type: sorting}")
    assert "prepare.batching" in message
    assert "'buckets', 'packing'" in message


@pytest.mark.parametrize(
    ("batching", "complaint"),
    [
        ("{type: buckets, num_buckets: 0}", "num_buckets: Input should be greater than or equal"),
        ("{type: buckets, max_padding_share: 1}", "max_padding_share: Input should be less than 1"),
        ("{type: buckets, fit_rows: 0}", "fit_rows: Input should be greater than or equal to 1"),
        ("{num_buckets: 8}", "prepare.batching: Unable to extract tag using discriminator 'type'"),
    ],
)
def test_values_of_batching_are_bounded(batching: str, complaint: str) -> None:
    assert complaint in refuse(f"prepare.batching={batching}")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("prepare.batching={type: buckets, num_bucket: 8}", "prepare.batching.num_bucket"),
        ("prepare.batching={type: packing, num_buckets: 8}", "prepare.batching.num_buckets"),
        ("train.exchange={type: dense, dtypes: fp32}", "train.exchange.dtypes"),
        ("prepare.sources=[{type: files, path: [a]}]", "prepare.sources.0.path"),
    ],
)
def test_an_unknown_key_of_a_variant_is_named_with_its_dotted_path(section: str, key: str) -> None:
    assert f"{key}: unknown key" in refuse(section)


def test_the_cost_of_the_longest_sample_may_be_all_of_a_batch() -> None:
    assert parse("prepare.quadratic_tokens=64").prepare.quadratic_tokens == 64  # 64 + 64²/64
    message = refuse("prepare.quadratic_tokens=64", "prepare.batch_tokens=127")
    assert "batch_tokens (127) is below max_tokens (64, which cost 128)" in message


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65])
def test_a_run_name_is_one_plain_directory_name(name: str) -> None:
    assert "run.name" in refuse(f"run.name={name!r}")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse().run.seed = 3  # type: ignore[misc]


def test_identity_ignores_where_a_stage_runs() -> None:
    first = parse("train.batches_per_step=4")
    second = parse("train.batches_per_step=4", "train.resources.num_workers=4")
    third = parse("train.batches_per_step=8")
    assert identity(first.train) == identity(second.train)
    assert identity(first.train) != identity(third.train)
    assert identity(first.prepare) == identity(
        parse("prepare.resources.num_cpus_per_task=2").prepare
    )
    assert set(identity(first.base, first.compress)) == {"BaseConfig", "CompressConfig"}


def test_every_key_is_described() -> None:
    lines = [line.split(None, 1) for line in describe_fields().splitlines()]
    assert [line[0] for line in lines if len(line) == 1] == []
    described = dict(lines)
    assert "peak learning rate" in described["train.learning_rate"].lower()
    assert "train.resources.num_workers" in described
    assert "prepare.sources.paths" in described
    assert "length buckets" in described["prepare.batching.num_buckets"]


def test_reading_a_configuration_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys; from r1ray.config import load_config; import r1ray.artifacts;"
        f"load_config({str(CONFIGS[0])!r});"
        "sys.exit(','.join({'torch', 'ray', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_key_that_occurs_twice_is_refused_and_named() -> None:
    text = DEMO.read_text() + "\ntrain: {num_steps: 3}\n"
    with pytest.raises(ConfigError, match="key 'train' occurs twice"):
        parse_config(text)
    with pytest.raises(ConfigError, match="key 'num_steps' occurs twice"):
        parse_config(DEMO.read_text(), ["train={num_steps: 6, num_steps: 7}"])
