"""Layer mathematics for either side: norms, rotary embedding, attention, linear groups, and the KV cache.

On the trusted side these functions see activations, and the KV cache keeps them. Weights come from a checkpoint that
the caller opens.
"""
