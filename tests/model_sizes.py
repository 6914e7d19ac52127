"""The sizes of small models of transformers, by the names that configs of most families have."""

NO_TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)


def model_sizes(width, inner, layers, heads, kv_heads, **others):
    """Layers of so many heads, around an MLP with `inner` channels."""
    return dict(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **others,
    )
