"""One decoder for training, compression and serving: the Llama, Qwen2 and Qwen3 families.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU MLP. Parameter names
are Hugging Face's, so a state dict moves both ways unchanged. The linear layers may be swapped
(`nn.Linear` -> INT8) without touching this file.

Price of a forward: 2 FLOP per parameter and token, plus 4·T²·N·H per layer for attention.

Shape legend: B batch, T new tokens, S cached tokens, N query heads, K key/value heads,
G = N/K heads per group, H head dimension, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1ray.config.schema import Scheme
from r1ray.errors import ShapeError
from r1ray.models.config import ModelConfig
from r1ray.models.fusion import Fusion, ImageContext, ImageView
from r1ray.models.kv_cache import CacheSlice
from r1ray.models.native_layers import NativeLayers, find_native_layers
from r1ray.models.rope import apply_rotary, rotary_tables
from r1ray.models.sparse import SparseForward
from r1ray.ops.block_gate import BlockGate, BoundsGate
from r1ray.ops.causal_attention import cached_attention, causal_attention
from r1ray.ops.packed_attention import Documents, packed_attention

__all__ = ["Attention", "Decoder"]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


Observer = Callable[["Attention", Tensor, Tensor, Tensor, Tensor], None]


class Attention(nn.Module):
    """Causal grouped-query attention over the new tokens, or their document, or a cache as well.

    Attributes:
        gate: guesses which blocks of keys count (`r1ray.models.gates`); None without.
        observe: called in every forward with this module, queries [B, T, N, H] and keys
            [B, T, K, H] before rotary positions, and both [B, N, T, H], [B, K, T, H] after.
    """

    gate: BlockGate | BoundsGate | None
    observe: Observer | None = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = None
        queries = config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: CacheSlice | None,
        documents: Documents | None = None,
        sparse: SparseForward | None = None,
    ) -> Tensor:
        batch, tokens, _ = x_BTD.shape
        heads = (batch, tokens, -1, self.config.head_dim)
        q_BTNH = self.q_proj(x_BTD).view(heads)
        k_BTKH = self.k_proj(x_BTD).view(heads)
        v_BKTH = self.v_proj(x_BTD).view(heads).transpose(1, 2)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BNTH = apply_rotary(q_BTNH.transpose(1, 2), *rotary)
        k_BKTH = apply_rotary(k_BTKH.transpose(1, 2), *rotary)
        if self.observe is not None:
            self.observe(self, q_BTNH, k_BTKH, q_BNTH, k_BKTH)
        if documents is not None:
            out_BNTH = packed_attention(q_BNTH, k_BKTH, v_BKTH, documents)
        elif cache is None:
            out_BNTH = causal_attention(q_BNTH, k_BKTH, v_BKTH)
        else:
            k, v = cache.write(self.layer, k_BKTH, v_BKTH, positions_BT)
            if sparse is not None:
                sparse.update(self, k)
            if sparse is not None and not sparse.is_dense:
                out_BNTH = sparse.attend(self, q_BTNH, q_BNTH, rotary, k, v)
            else:
                out_BNTH = cached_attention(q_BNTH, k, v, cache.starts)
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        wide, narrow, bias = config.intermediate_size, config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(narrow, wide, bias=bias)
        self.up_proj = nn.Linear(narrow, wide, bias=bias)
        self.down_proj = nn.Linear(wide, narrow, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions_BT: Tensor,
        cache: CacheSlice | None,
        documents: Documents | None = None,
        sparse: SparseForward | None = None,
    ) -> Tensor:
        normed_BTD = self.input_layernorm(x_BTD)
        x_BTD = x_BTD + self.self_attn(normed_BTD, rotary, positions_BT, cache, documents, sparse)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DecoderStack(nn.Module):
    """Embedding, blocks and final norm: token ids to hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; `Decoder(input_ids_BT)` gives logits [B, T, V].

    Attributes:
        scheme: how its weights are quantized (`r1ray.models.quantization`); None in float.
        fusion: what it sees images with (`r1ray.models.fusion_file`); None where it reads text.
    """

    scheme: Scheme | None = None
    fusion: Fusion | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fusion = None
        self.model = DecoderStack(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.get_parameter("weight")

    @property
    def is_sparse(self) -> bool:
        """Whether it attends to chosen blocks in a cache that keeps summaries: it has gates.

        Not where a token's rotation depends on the length of its sequence: a block's summary would
        change with every token.
        """
        return self.summary_size > 0

    @property
    def summary_size(self) -> int:
        """Floats that its gates need of each block of keys, layer and group; 0 where not sparse."""
        if self.config.rope.depends_on_length:
            return 0
        gates = (getattr(block.self_attn, "gate", None) for block in self.model.layers)
        return min(0 if gate is None else int(gate.summary_size) for gate in gates)

    def hidden(
        self,
        input_ids_BT: Tensor,
        cache: CacheSlice | None = None,
        document_lengths: Sequence[int] | None = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """Final-norm hidden states [B, T, D], those of late fusion added.

        Args:
            input_ids_BT: int64; rows are padded on the right, where causality hides the padding.
            cache: rows to continue; the new keys and values are written there, but not yet counted
                (`CacheSlice.advance`). Each row starts at its own stored length. Where the model is
                sparse and the cache keeps blocks, rows beyond 2,048 tokens are not padded.
            document_lengths: of the documents packed into the one row (B = 1), in its order and
                with a sum of T; padding counts as the last. Each document has the states that it
                has alone: positions restart, and attention stays inside it.
            images: of the rows; token ids at their places are negative. Places count from the
                beginning of the row, or of the sequence that is in the cache.
        Raises:
            ShapeError: `document_lengths` does not fit the row, or comes with a cache; or there are
                images, but no fusion.
        """
        documents = None
        if document_lengths is not None:
            documents = _build_documents(input_ids_BT, cache, document_lengths)
        x_BTD, sparse, view = self._begin(input_ids_BT, cache, images)
        layers = self._find_layers(x_BTD, cache, sparse, view)
        if layers is not None and cache is not None:
            layers.run(x_BTD, cache, sparse)
        else:
            x_BTD = self._run_blocks(x_BTD, cache, documents, sparse, view)
        return self._finish(x_BTD, view)

    def next_logits(
        self,
        input_ids_BT: Tensor,
        cache: CacheSlice,
        last: Sequence[int],
        layers: NativeLayers | None = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """Logits [L, V] of what follows some of the new tokens; cache and images as in `hidden`.

        Args:
            last: numbers of these tokens in [B · T].
            layers: native ones of this model, which has not changed since they were found.
        Raises:
            ShapeError: as in `hidden`.
        """
        x_BTD, sparse, view = self._begin(input_ids_BT, cache, images)
        layers = self._find_layers(x_BTD, cache, sparse, view, layers)
        if layers is not None and layers.has_head and view is None:
            return layers.run(x_BTD, cache, sparse, last=last)
        if layers is not None:
            layers.run(x_BTD, cache, sparse)
        else:
            x_BTD = self._run_blocks(x_BTD, cache, None, sparse, view)
        where = torch.tensor(last, device=x_BTD.device)
        if view is None:
            return self.lm_head(self.model.norm(x_BTD.flatten(0, 1)[where]))
        return self.lm_head(self._finish(x_BTD, view).flatten(0, 1)[where])

    def _begin(
        self, input_ids_BT: Tensor, cache: CacheSlice | None, images: ImageContext | None
    ) -> tuple[Tensor, SparseForward | None, ImageView | None]:
        """(embeddings, what this forward chooses blocks for, and sees; None without either)."""
        sparse = None
        if cache is not None and cache.keeps_blocks:
            sparse = SparseForward(self.config, cache, input_ids_BT.shape[1])
        if images is None:
            return self.model.embed_tokens(input_ids_BT), sparse, None
        if self.fusion is None:
            raise ShapeError("there are images, and this model reads text alone; attach a fusion")
        view = images.view(None if cache is None else cache.starts_R, input_ids_BT.shape[1])
        x_BTD = self.model.embed_tokens(input_ids_BT.clamp_min(0))
        return self.fusion.embed(x_BTD, view), sparse, view

    def _find_layers(
        self,
        x_BTD: Tensor,
        cache: CacheSlice | None,
        sparse: SparseForward | None,
        view: ImageView | None,
        known: NativeLayers | None = None,
    ) -> NativeLayers | None:
        """As `find_native_layers`; None where something comes in between the layers."""
        if view is not None and self.fusion is not None and self.fusion.changes_layers:
            return None
        return find_native_layers(self, x_BTD, cache, sparse, known)

    def _finish(self, x_BTD: Tensor, view: ImageView | None) -> Tensor:
        h_BTD: Tensor = self.model.norm(x_BTD)
        return h_BTD if view is None or self.fusion is None else self.fusion.after(h_BTD, view)

    def _run_blocks(
        self,
        x_BTD: Tensor,
        cache: CacheSlice | None,
        documents: Documents | None,
        sparse: SparseForward | None,
        view: ImageView | None,
    ) -> Tensor:
        if documents is not None:
            positions_BT = documents.positions_1T
            rotary = rotary_tables(self.config, positions_BT, documents.lengths)
        else:
            positions_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
            if cache is not None:
                positions_BT = cache.starts_R[:, None] + positions_BT
            rotary = rotary_tables(self.config, positions_BT)
        for layer, block in enumerate(self.model.layers):
            if view is not None and self.fusion is not None:
                x_BTD = self.fusion.before_layer(layer, x_BTD, view)
            x_BTD = block(x_BTD, rotary, positions_BT, cache, documents, sparse)
        return x_BTD

    def forward(
        self,
        input_ids_BT: Tensor,
        cache: CacheSlice | None = None,
        document_lengths: Sequence[int] | None = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each position; arguments as in `hidden`."""
        return self.lm_head(self.hidden(input_ids_BT, cache, document_lengths, images))


def _build_documents(
    input_ids_BT: Tensor, cache: CacheSlice | None, lengths: Sequence[int]
) -> Documents:
    """The documents of the one packed row `input_ids_BT`.

    Raises:
        ShapeError: as `Decoder.hidden` has it.
    """
    if cache is not None:
        raise ShapeError("document_lengths is for packed rows without a cache; pass one of the two")
    batch, tokens = input_ids_BT.shape
    if batch != 1:
        raise ShapeError(
            f"document_lengths needs one packed row, got a batch of {batch}; pack the rows into one"
        )
    documents = Documents(lengths, input_ids_BT.device)
    if documents.num_tokens != tokens:
        raise ShapeError(
            f"document_lengths {list(documents.lengths)} sum to {documents.num_tokens}, but the "
            f"row has {tokens} tokens; count its padding as the last document"
        )
    return documents
