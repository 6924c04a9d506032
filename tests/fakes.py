"""Small stand-ins for real models: random decoders and a byte-level tokenizer.

The vocabulary of 300 is the 256 bytes, three control tokens and 41 merges, so that any text
round-trips and that tokens end inside characters as well as inside words.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from r1ray.models import Decoder, ModelConfig, save_model
from r1ray.models.config import Family, RopeConfig

__all__ = ["CHAT_TEMPLATE", "EOS_ID", "VOCAB_SIZE", "tiny_config", "tiny_model", "write_tiny_model"]

VOCAB_SIZE = 300
EOS_ID = 2
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other one there",
    "what is the sum of one and three, and when is it the other way round?",
)


def tiny_config(
    family: Family = "llama", *, tie_embeddings: bool = False, max_positions: int = 256
) -> ModelConfig:
    """Two layers of width 32 with grouped queries (4 heads on 2); 30 thousand parameters."""
    return ModelConfig(
        family=family,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_positions=max_positions,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=tie_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        eos_token_ids=(EOS_ID,),
        bos_token_id=0,
        pad_token_id=0,
    )


def tiny_model(
    family: Family = "llama",
    *,
    seed: int = 0,
    tie_embeddings: bool = False,
    max_positions: int = 256,
) -> Decoder:
    """A random decoder in eval mode; the same `seed` gives the same weights, whoever drew before.

    The head is scaled up so that the largest logit is ahead by more than rounding.
    """
    config = tiny_config(family, tie_embeddings=tie_embeddings, max_positions=max_positions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(config)
    if not tie_embeddings:
        with torch.no_grad():
            model.lm_head.weight.mul_(4.0)
    return model.eval()


def write_tiny_model(
    path: str | Path, family: Family = "llama", *, seed: int = 0, max_positions: int = 256
) -> Path:
    """Write a complete model directory (weights, tokenizer, chat template); returns its path."""
    path = Path(path)
    save_model(tiny_model(family, seed=seed, max_positions=max_positions), path)
    inner = RustTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=CONTROL_TOKENS[0],
        eos_token=CONTROL_TOKENS[EOS_ID],
        pad_token=CONTROL_TOKENS[0],
        additional_special_tokens=[CONTROL_TOKENS[1]],
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return path
