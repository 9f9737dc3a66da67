"""respkv inside other programs: what fits it to the frameworks that run models."""
