"""Small models in linen that compute what GPT-2, Llama, BERT and ViT of transformers compute; names are their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

F64 = {"dtype": np.float64, "param_dtype": np.float64}


def gelu_erf(x):
    return nn.gelu(x, approximate=False)


def attended(q, k, v, mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)), v)


def causal(length):
    return np.tril(np.ones((length, length), bool))


class Gpt2Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-5, name="ln_1", **F64)(x)
        q, k, v = jnp.split(nn.Dense(3 * x.shape[-1], name="c_attn", **F64)(y), 3, -1)
        q, k, v = (each.reshape(*each.shape[:2], self.heads, -1) for each in (q, k, v))
        y = attended(q, k, v, causal(x.shape[1])).reshape(x.shape)
        x = x + nn.Dense(x.shape[-1], name="c_proj", **F64)(y)
        y = nn.Dense(4 * x.shape[-1], name="mlp_in", **F64)(nn.LayerNorm(epsilon=1e-5, name="ln_2", **F64)(x))
        return x + nn.Dense(x.shape[-1], name="mlp_out", **F64)(nn.gelu(y))


class Gpt2(nn.Module):
    vocabulary: int = 64
    width: int = 32
    layers: int = 3
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(self.vocabulary, self.width, name="wte", **F64)
        places = nn.Embed(64, self.width, name="wpe", **F64)
        x = table(tokens) + places(jnp.arange(tokens.shape[1]))
        for i in range(self.layers):
            x = Gpt2Block(self.heads, name=f"block_{i}")(x)
        return table.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f", **F64)(x))


def turned(x, base=10000.0):
    """Rotary positions, in halves; the frequencies are those of float32, as in transformers."""
    half = x.shape[-1] // 2
    frequencies = (1 / base ** (np.arange(half) / half)).astype("float32")
    angles = np.arange(x.shape[1])[:, None] * frequencies.astype(float)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    one, two = x[..., :half], x[..., half:]
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class LlamaBlock(nn.Module):
    heads: int
    groups: int

    @nn.compact
    def __call__(self, x):
        size = x.shape[-1] // self.heads
        y = nn.RMSNorm(epsilon=1e-6, name="input_layernorm", **F64)(x)
        q = nn.DenseGeneral((self.heads, size), use_bias=False, name="q", **F64)(y)
        k = nn.DenseGeneral((self.groups, size), use_bias=False, name="k", **F64)(y)
        v = nn.DenseGeneral((self.groups, size), use_bias=False, name="v", **F64)(y)
        k, v = (jnp.repeat(each, self.heads // self.groups, 2) for each in (turned(k), v))
        y = attended(turned(q), k, v, causal(x.shape[1]))
        x = x + nn.DenseGeneral(x.shape[-1], (-2, -1), use_bias=False, name="o", **F64)(y)
        y = nn.RMSNorm(epsilon=1e-6, name="post_attention_layernorm", **F64)(x)
        gate, up = (nn.Dense(64, use_bias=False, name=name, **F64)(y) for name in ("gate", "up"))
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down", **F64)(nn.silu(gate) * up)


class Llama(nn.Module):
    layers: int = 3

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32, name="embed", **F64)(tokens)
        for i in range(self.layers):
            x = LlamaBlock(4, 2, name=f"layers_{i}")(x)
        return nn.Dense(64, use_bias=False, name="head", **F64)(nn.RMSNorm(epsilon=1e-6, name="norm", **F64)(x))


class Encoder(nn.Module):
    """A layer of BERT, whose norms come last, or of ViT, whose norms come first."""

    first: bool

    @nn.compact
    def __call__(self, x):
        norms = [nn.LayerNorm(epsilon=1e-12, name=name, **F64) for name in ("attention_norm", "output_norm")]
        attention = nn.MultiHeadDotProductAttention(4, name="attention", **F64)
        wide, narrow = nn.Dense(64, name="intermediate", **F64), nn.Dense(x.shape[-1], name="output", **F64)
        if self.first:
            x = x + attention(norms[0](x))
            return x + narrow(gelu_erf(wide(norms[1](x))))
        x = norms[0](x + attention(x))
        return norms[1](x + narrow(gelu_erf(wide(x))))


class Bert(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32, name="word_embeddings", **F64)(tokens)
        x = x + nn.Embed(64, 32, name="position_embeddings", **F64)(jnp.arange(tokens.shape[1]))
        x = x + nn.Embed(2, 32, name="token_type_embeddings", **F64)(jnp.zeros_like(tokens))
        x = nn.LayerNorm(epsilon=1e-12, name="embeddings_norm", **F64)(x)
        for i in range(2):
            x = Encoder(False, name=f"layer_{i}")(x)
        return x


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (4, 4), strides=4, padding="VALID", name="patches", **F64)(images)
        x = x.reshape(x.shape[0], -1, 32)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, 32), np.float64)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 32)), x], 1)
        x = x + self.param("position_embeddings", nn.initializers.zeros, (1, x.shape[1], 32), np.float64)
        for i in range(2):
            x = Encoder(True, name=f"layer_{i}")(x)
        x = nn.LayerNorm(epsilon=1e-12, name="layernorm", **F64)(x)
        return nn.Dense(2, name="classifier", **F64)(x[:, 0])
