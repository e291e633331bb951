"""Layer mathematics for either side: norms, rotary embedding, attention, linear groups. No secrets, no I/O."""
